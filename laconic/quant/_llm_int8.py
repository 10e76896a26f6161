"""`llm_int8`: products of 8-bit integers, with the few input features that hold outliers left to floats.

For inputs X (tokens, K) and weights W (rows, K), with the threshold h:

    O = {k : |X_tk| >= h for some t}                                 outlier features, found anew in every call
    a_t = max_k |X_tk| over entries below h,   b_n = max_k |W_nk|    absolute maxima by row
    Xq = round(127 X / a), columns in O set to 0,   Wq = round(127 W / b)
    Y = (Xq Wq^T) a_t b_n / 127^2 + X[:, O] W^[:, O]^T + bias        W^ = Wq b / 127

Integer products are exact. h = 0 finds no outliers: plain vector-wise quantization. Rows without anything stay zero.
The gradient is that of the float layer with W^: dX = dY W^, and W has none.

What is stored is Wq as a packed weight of 8 bits with the scales b / 127, so an artifact is read like any other.
Whoever applies the stored record alone gets the same weights and inputs that are not rounded. Nothing folds.

Source: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", Dettmers, Lewis, Belkada, Zettlemoyer,
2022, arXiv 2208.07339. Official code: bitsandbytes, MIT. We differ from it: the float part is added in float32; the
columns of W in O come from the 8-bit weights, as in the code, where the paper keeps them in 16 bits: give
`int8_linear(outlier_weight=...)` the float ones.

Use it where weights must be small without calibration data, products fast, and inputs have the outliers of large
transformers. Rounding weights alone (`rtn` at 8 bits) is as small and more exact, but multiplies in floats.

Example:
    >>> import torch
    >>> x = torch.tensor([[1.0, -0.5, 30.0], [0.25, 1.0, -2.0]])
    >>> rows = int8_rows(x, threshold=6.0)
    >>> rows.codes.tolist(), rows.absmax.tolist(), rows.outliers.tolist()
    ([[127, -64, 0], [16, 64, 0]], [1.0, 2.0], [2])
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import PACK, Record, apply_records, owner_of
from laconic.core.structure import Structure
from laconic.core.units import Unit, find_units, matches
from laconic.nn import PackedParameterSpec, matrix_view, pack_tensors
from laconic.numerics import Int, Scale, Scheme, check_finite

THRESHOLD = 6.0
TOP = 127
SCHEME = Scheme(Int(8), Scale("channel", dtype="float32"))
SHIFT = 0x80  # from signed codes to the stored, unsigned ones, and back
FLIP = int.from_bytes(4 * [SHIFT], "little", signed=True)  # of a word of four codes


# --- mathematics ------------------------------------------------------------------------------------


class Int8Rows(NamedTuple):
    """A matrix in 8 bits: codes (rows, K) int8, absmax (rows,) float32, outlier columns (any,) int64, rising."""

    codes: Tensor
    absmax: Tensor
    outliers: Tensor


def int8_rows(x: Tensor, threshold: float = 0.0) -> Int8Rows:
    """Codes round(127 x / a) of a matrix (rows, K), outlier columns left out; 0 finds no outliers."""
    magnitude = x.abs()
    if threshold > 0:
        outlier = magnitude >= threshold
        columns = outlier.any(0).nonzero()[:, 0]
        magnitude = magnitude.masked_fill(outlier, 0)
    else:
        columns = torch.empty(0, dtype=torch.int64, device=x.device)
    absmax = magnitude.amax(1).float() if x.shape[1] else x.new_zeros(len(x), dtype=torch.float32)
    step = torch.where(absmax == 0, 0.0, TOP / absmax)
    scaled = x.float() * step[:, None]
    scaled[:, columns] = 0
    return Int8Rows(scaled.round().to(torch.int8), absmax, columns)


def int8_linear(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None, threshold: float = THRESHOLD,
    outlier_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Y (tokens, rows) in the type of x.

    Args:
        x: (tokens, K).
        codes: Wq (rows, K) int8.
        absmax: b (rows,) float32.
        bias: (rows,).
        threshold: h; 0 for plain vector-wise quantization.
        outlier_weight: (rows, K) floats for outlier columns; W^ by default.
    """
    rows = int8_rows(x, threshold)
    y = torch._int_mm(rows.codes, codes.t()).float() * (rows.absmax[:, None] * (absmax / TOP**2))
    if len(rows.outliers):
        columns = rows.outliers
        stored = codes[:, columns].float() * (absmax / TOP)[:, None]
        weight = stored if outlier_weight is None else outlier_weight[:, columns].float()
        y = y + x[:, columns].float() @ weight.t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


class _Product(torch.autograd.Function):
    """`int8_linear` of a packed weight, with the gradient of the float layer for the input and the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, k: int, threshold: float
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.k, ctx.biased = k, None if bias is None else bias.dtype
        y = int8_linear(x.reshape(-1, k), _signed(packed, k), scale[:, 0] * TOP, bias, threshold)
        return y.view(*x.shape[:-1], len(packed))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed, scale = ctx.saved_tensors
        weight = _signed(packed, ctx.k).float() * scale
        to_x = (gradient.float() @ weight).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        to_bias = gradient.reshape(-1, len(packed)).sum(0).to(ctx.biased) if ctx.needs_input_grad[3] else None
        return to_x, None, None, to_bias, None, None


def _signed(packed: Tensor, k: int) -> Tensor:
    """Wq (rows, K) int8 of the stored words, four bytes at a time: unsigned codes differ in the first bit alone."""
    return (packed ^ FLIP).view(torch.int8)[:, :k]


# --- the module -------------------------------------------------------------------------------------


class _Int8Forward:
    """Comes before a packed class of linear layer, and rounds its inputs too."""

    def forward(self: Any, input: Tensor) -> Tensor:
        spec: PackedParameterSpec = self._packed["weight"]
        k = spec.matrix[1]
        if input.shape[-1] != k:
            raise RuntimeError(f"{self} takes {k} features and got an input of shape {tuple(input.shape)}")
        packed, scale, _ = self.packed_operands("weight")
        return _Product.apply(input, packed, scale, self.bias, k, self._int8_threshold)


_CLASSES: dict[type, type] = {}


def round_inputs(module: nn.Module, threshold: float = THRESHOLD) -> None:
    """Let a packed linear layer of 8 bits round its inputs as well, in place.

    Raises:
        ValueError: it is no such layer.
    """
    spec = getattr(module, "_packed", {}).get("weight")
    if spec is None or spec.scheme != SCHEME:
        raise ValueError(f"{type(module).__name__}: inputs are rounded for weights packed as {SCHEME} alone")
    module._int8_threshold = threshold  # type: ignore[assignment]
    cls = type(module)
    if not issubclass(cls, _Int8Forward):
        module.__class__ = _CLASSES.setdefault(cls, type(cls.__name__, (_Int8Forward, cls), {}))


# --- the pass ---------------------------------------------------------------------------------------


class LLMInt8:
    """The pass: every linear layer, but for those left out.

    Args:
        threshold: h; 0 for plain vector-wise quantization.
        skip: patterns of parameters that stay as they are; the output layer of language models by default.

    Raises:
        ValueError: a negative threshold.
    """

    id: ClassVar = "llm_int8"
    stage: ClassVar = "quantize"
    scope: ClassVar = "module"
    needs: ClassVar = frozenset({"float"})

    def __init__(self, threshold: float = THRESHOLD, skip: Sequence[str] = ("lm_head",)):
        if not threshold >= 0:
            raise ValueError(f"LLMInt8: threshold={threshold} is negative")
        self.threshold, self.skip = threshold, tuple(skip)

    def plan(self, structure: Structure, model: nn.Module) -> Decision:
        """Weight -> how it is stored; weight of a linear layer -> why it is left alone."""
        units, skipped = {}, {}
        found = {name: unit for unit in find_units(model, structure, bits=(8,)) for name in unit.names}
        for path, module in model.named_modules():
            name = f"{path}.weight" if path else "weight"
            unit = found.get(name)
            if unit is None and isinstance(module, nn.Linear):
                skipped[name] = "a parametrization computes it"
            elif unit is not None and (isinstance(module, nn.Linear) or unit.op == "linear"):
                why = self._refusal(name, unit)
                if why:
                    skipped[name] = why
                else:
                    units[name] = {"spec": unit.spec(SCHEME).to_json(), "aliases": [], "threshold": self.threshold}
        return Decision(units, skipped)

    def _refusal(self, name: str, unit: Unit) -> str:
        skipped = next((p for p in self.skip if matches(p, name) or fnmatch.fnmatchcase(name, f"*.{p}.*")), None)
        if skipped is not None:
            return f"named by skip={skipped!r}"
        if len(unit.names) > 1:
            return f"it is tied: {' = '.join(unit.names)}"
        if unit.reason:
            return unit.reason
        return "" if unit.op == "linear" else "its layer does not multiply by it itself"

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """Wq and b / 127 of the weight at `path`."""
        said = decision.units[path]
        spec = PackedParameterSpec.from_json(said["spec"])
        W = matrix_view(ctx.model.get_parameter(path).detach(), spec.view)
        check_finite(W, path)
        rows = int8_rows(W)
        scale = torch.where(rows.absmax == 0, 1.0, rows.absmax / TOP)[:, None]
        lost = (rows.codes.float() * scale - W.float()).double().square().sum()
        loss = float(lost / W.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny))
        codes = rows.codes.view(torch.uint8) ^ SHIFT
        data = {"pass": self.id, "method": self.id, "op": "linear", "loss": loss, **said}
        return Record(PACK, path, data, pack_tensors(spec, codes, scale, None))

    def apply(self, model: nn.Module, record: Record) -> None:
        """Pack the weight, and let its layer round inputs."""
        apply_records(model, [record])
        round_inputs(owner_of(model, record.path)[0], record.data["threshold"])


CARD = Card(
    id="llm_int8",
    title="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
    authors="Dettmers, Lewis, Belkada, Zettlemoyer",
    year=2022,
    source="arXiv 2208.07339",
    family="quant",
    summary="Multiplies in 8-bit integers, and leaves the few input features that hold outliers to floats.",
    objects={"LLMInt8": "Pass"},
    use="To store and multiply the weights of a large transformer in 8 bits without calibration data.",
    avoid="Where only size counts, or on machines without fast 8-bit products: rtn loses less at the same size.",
    composes=("smoothquant",),
    vectors=("llm_int8",),
    code="bitsandbytes, MIT",
    claim={
        "text": "Where two features hold outliers, leaving those to floats loses less of a language model than "
        "rounding all inputs to 8 bits by row.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.005,
        "arms": ("vector-wise", "decomposed"),
        "seeds": 5,
        "minutes": 4,
        "task": "chars",
    },
)
