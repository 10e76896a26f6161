"""Just enough of ggml by ctypes: matrices in its types, repacked as llama.cpp would, and their product with a vector.

llama-cpp-python ships the library and binds none of this. A weight goes to the first kind of buffer that supports its product
(llama.cpp's own rule: repacked, where the CPU has a kernel for that, else as it lies).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from typing import Any

import numpy as np

__all__ = ["TYPES", "Products", "quantized", "row_bytes"]

# Numbers of ggml's types, which files hold.
TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "TQ2_0": 35, "Q1_0": 41}
OVERHEAD = 1 << 20  # bytes for the descriptions of tensors and of the graph


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_silent = _Log(lambda level, line, data: None)  # kept: ggml calls it for every tensor that it repacks


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


@cache
def _library() -> Any:
    from llama_cpp._ggml import libggml as lib

    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_log_set": (None, [_Log, c_void_p]),
        "ggml_init": (c_void_p, [_InitParams]),
        "ggml_free": (None, [c_void_p]),
        "ggml_row_size": (c_size_t, [c_int, c_int64]),
        "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
        "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
        "ggml_new_graph": (c_void_p, [c_void_p]),
        "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
        "ggml_backend_cpu_init": (c_void_p, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
        "ggml_backend_cpu_reg": (c_void_p, []),
        "ggml_backend_cpu_buffer_type": (c_void_p, []),
        "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
        "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
        "ggml_backend_buft_name": (c_char_p, [c_void_p]),
        "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
        "ggml_backend_buffer_free": (None, [c_void_p]),
        "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
        "ggml_backend_free": (None, [c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.ggml_log_set(_silent, None)
    return lib


def row_bytes(kind: str, k: int) -> int:
    """Bytes of a row of k numbers."""
    return int(_library().ggml_row_size(TYPES[kind], k))


def quantized(weight: np.ndarray, kind: str) -> np.ndarray:
    """A float32 matrix (n, k) in one of ggml's types: (n, bytes of a row) uint8."""
    weight = np.ascontiguousarray(weight, np.float32)
    n, k = weight.shape
    out = np.empty((n, row_bytes(kind, k)), np.uint8)
    _library().ggml_quantize_chunk(
        TYPES[kind], weight.ctypes.data_as(ctypes.POINTER(c_float)), out.ctypes.data, 0, n, k, None
    )
    return out


class Products:
    """y_i = x W_i^T for a number of copies W_i, as one graph.

    Args:
        packed: (n, bytes of a row), from `quantized`.
        kind: its type.
        x: (m, k) float32.
        turns: copies.
        threads: of the backend.
    """

    def __init__(self, packed: np.ndarray, kind: str, x: np.ndarray, turns: int, threads: int):
        self._lib = _library()
        self._owned: list[tuple[Any, Any]] = []  # (function that frees, what)
        self._backend = self._lib.ggml_backend_cpu_init()
        self._lib.ggml_backend_cpu_set_n_threads(self._backend, threads)
        for name, buffer_type in self._buffer_types():
            if self._build(buffer_type, packed, kind, x, turns):
                self.buffer = name
                return
            self._release()
        raise RuntimeError(f"ggml's CPU backend has no product with {kind}")

    def _buffer_types(self) -> Iterator[tuple[str, Any]]:
        """The extra kinds of the CPU (repacked and the like) in their order, then the plain one."""
        lib = self._lib
        device = lib.ggml_backend_reg_dev_get(lib.ggml_backend_cpu_reg(), 0)
        address = lib.ggml_backend_reg_get_proc_address(lib.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
        if address:
            found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
            at = 0
            while found and found[at]:
                yield lib.ggml_backend_buft_name(found[at]).decode(), found[at]
                at += 1
        plain = lib.ggml_backend_cpu_buffer_type()
        yield lib.ggml_backend_buft_name(plain).decode(), plain

    def _build(self, buffer_type: Any, packed: np.ndarray, kind: str, x: np.ndarray, turns: int) -> bool:
        """Whether the graph could be built with weights in this kind of buffer."""
        lib, (n, _), (m, k) = self._lib, packed.shape, x.shape
        context = self._context()
        weights = [lib.ggml_new_tensor_2d(context, TYPES[kind], k, n) for _ in range(turns)]
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            return False
        self._owned.append((lib.ggml_backend_buffer_free, buffer))
        inner = self._context()
        vector = lib.ggml_new_tensor_2d(inner, TYPES["F32"], k, m)
        outputs = [lib.ggml_mul_mat(inner, weight, vector) for weight in weights]
        device = lib.ggml_backend_reg_dev_get(lib.ggml_backend_cpu_reg(), 0)
        if not lib.ggml_backend_dev_supports_op(device, outputs[0]):
            return False
        packed = np.ascontiguousarray(packed)
        for weight in weights:
            lib.ggml_backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        graph = lib.ggml_new_graph(inner)
        for output in outputs:
            lib.ggml_build_forward_expand(graph, output)
        self._owned.append((lib.ggml_backend_buffer_free, lib.ggml_backend_alloc_ctx_tensors(inner, self._backend)))
        x = np.ascontiguousarray(x, np.float32)
        lib.ggml_backend_tensor_set(vector, x.ctypes.data, 0, x.nbytes)
        self._graph, self._output, self._shape = graph, outputs[0], (m, n)
        return True

    def _context(self) -> Any:
        context = self._lib.ggml_init(_InitParams(OVERHEAD, None, True))
        self._owned.append((self._lib.ggml_free, context))
        return context

    def __call__(self) -> None:
        """Compute all products."""
        if self._lib.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("ggml did not compute the graph")

    def first(self) -> np.ndarray:
        """The first product (m, n)."""
        out = np.empty(self._shape, np.float32)
        self._lib.ggml_backend_tensor_get(self._output, out.ctypes.data, 0, out.nbytes)
        return out

    def close(self) -> None:
        """Give everything back."""
        self._release()
        self._lib.ggml_backend_free(self._backend)

    def _release(self) -> None:
        for free, what in reversed(self._owned):
            free(what)
        self._owned.clear()
