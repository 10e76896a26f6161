"""Transformer blocks that run as two calls of compiled code instead of some hundred operations of torch.

`fuse(model)` changes the class of every block that it knows and that has packed linear layers, in place: paths, names and
tensors stay as they are, and the block's own forward (the truth) still runs wherever the short way does not apply: in
training, with gradients, on another device or type, with hooks inside the block, or under a tracer.

A `Family` says where a block of one architecture keeps its parts; adding an architecture is adding one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.kernels import cpu_linear, native
from laconic.kernels.inputs import static_scale
from laconic.kernels.ops import ACTIVATIONS
from laconic.numerics import Codebook, Scheme

from .packed import Packed

__all__ = ["FAMILIES", "Family", "fuse", "fuse_block", "why_not"]


@dataclass(frozen=True)
class Family:
    """Where blocks of one kind keep their parts, as paths inside the block.

    Attributes:
        classes: names of the block's classes in transformers.
        q, k, v, o, up, down, gate: linear layers; no gate: "".
        before, after: the first and the second norm.
        act: the activation, or the module that is one.
        attention: the module that knows `scaling` and the number of heads.
        pre_norm: whether norms come before what they belong to, or after the sum.
        heads: of the attention module and the block's config, queries' and keys' heads.
        rotary: whether queries and keys are turned by position.
        causal: whether a query sees later keys when no mask is given.
    """

    classes: tuple[str, ...]
    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    before: str
    after: str
    act: str
    attention: str
    gate: str = ""
    pre_norm: bool = True
    rotary: bool = False
    causal: bool = False


FAMILIES = (
    Family(
        classes=("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer"),
        q="attention.self.query", k="attention.self.key", v="attention.self.value", o="attention.output.dense",
        up="intermediate.dense", down="output.dense",
        before="attention.output.LayerNorm", after="output.LayerNorm",
        act="intermediate.intermediate_act_fn", attention="attention.self", pre_norm=False,
    ),
    Family(
        classes=("TransformerBlock",),  # DistilBERT's
        q="attention.q_lin", k="attention.k_lin", v="attention.v_lin", o="attention.out_lin",
        up="ffn.lin1", down="ffn.lin2", before="sa_layer_norm", after="output_layer_norm",
        act="ffn.activation", attention="attention", pre_norm=False,
    ),
    Family(
        classes=("ViTLayer", "DeiTLayer"),
        q="attention.q_proj", k="attention.k_proj", v="attention.v_proj", o="attention.o_proj",
        up="mlp.fc1", down="mlp.fc2", before="layernorm_before", after="layernorm_after",
        act="mlp.activation_fn", attention="attention",
    ),
    Family(
        classes=("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"),
        q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
        gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
        before="input_layernorm", after="post_attention_layernorm",
        act="mlp.act_fn", attention="self_attn", rotary=True, causal=True,
    ),
)  # fmt: skip


def family_of(block: nn.Module) -> Family | None:
    """The family of a block of transformers, by the name of its class."""
    cls = getattr(type(block), "_laconic_block", type(block))
    if not cls.__module__.startswith("transformers."):
        return None
    return next((family for family in FAMILIES if cls.__name__ in family.classes), None)


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    """Path, block and family of every block that a family knows."""
    for path, module in model.named_modules():
        family = family_of(module)
        if family is not None:
            yield path, module, family


def why_not(block: nn.Module, family: Family) -> str:
    """Why a block cannot run the short way; "" if it can."""
    linear = [getattr(family, part) for part in ("q", "k", "v", "o", "gate", "up", "down") if getattr(family, part)]
    for path in linear:
        try:
            layer = block.get_submodule(path)
        except AttributeError:
            return f"{path} is not there"
        if not isinstance(layer, nn.Linear):
            return f"{path} is a {type(layer).__name__} and no linear layer"
        if type(layer).forward is not nn.Linear.forward and not isinstance(layer, Packed):
            return f"{path} is a {type(layer).__name__} with a forward of its own"
        if isinstance(layer, Packed) and layer._packed["weight"].order:
            return f"{path} has sorted inputs"
        if isinstance(layer, Packed) and not _readable(layer._packed["weight"].scheme):
            return f"{path} is stored as no block kernel reads it: {layer._packed['weight'].scheme}"
    if not any(isinstance(block.get_submodule(path), Packed) for path in linear):
        return "none of its linear layers is packed"
    if getattr(block, "add_cross_attention", False):
        return "it attends to another sequence as well"
    if any(getattr(module, "chunk_size_feed_forward", 0) for module in block.modules()):
        return "its feed-forward part runs in chunks"
    if _act_of(_at(block, family.act)) is None:
        return f"its activation {type(_at(block, family.act)).__name__} has no kernel"
    for path in (family.before, family.after):
        norm = block.get_submodule(path)
        if _eps_of(norm) is None or norm.weight is None:
            return f"{path} is a {type(norm).__name__} that no kernel knows"
    return ""


def _readable(scheme: Scheme) -> bool:
    """Whether the kernels of blocks read weights of this scheme where they lie."""
    return cpu_linear.takes(scheme) and not isinstance(scheme.element, Codebook)


def fuse(model: nn.Module) -> dict[str, str]:
    """Let every block that can run the short way.

    Returns:
        Path of every block of a known family -> "" if it was changed, else why it was left alone.
    """
    found = {}
    for path, block, family in list(blocks_of(model)):
        found[path] = why_not(block, family)
        if not found[path]:
            fuse_block(block)
    return found


def fuse_block(block: nn.Module) -> None:
    """Change the class of one block, in place.

    Raises:
        ValueError: its class belongs to no family.
    """
    family = family_of(block)
    if family is None:
        raise ValueError(f"{type(block).__name__} is no transformer block that laconic knows")
    if isinstance(block, FusedBlock):
        return
    cls = type(block)
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Fused{cls.__name__}", (FusedBlock, cls), {"_laconic_block": cls})
    object.__setattr__(block, "_family", family)
    object.__setattr__(block, "_prepared", None)
    block.__class__ = _CLASSES[cls]


class FusedBlock(nn.Module):
    """Common part of every fused block; comes first in the method resolution order."""

    _family: Family
    _prepared: _Prepared | None
    _laconic_block: type

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, **kwargs: Any) -> Any:
        prepared = self._ready(hidden_states, rest, kwargs)
        mask = _usable_mask(attention_mask) if prepared is not None else None
        if prepared is None or mask is _UNKNOWN:
            return super().forward(hidden_states, attention_mask, *rest, **kwargs)
        return prepared.run(hidden_states, mask, kwargs)

    def _ready(self, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Prepared | None:
        """The compiled form of the block, if it may run on these inputs."""
        if (
            any(value is not None for value in rest)
            or self.training
            or torch.is_grad_enabled()
            and x.requires_grad
            or x.dtype != torch.float32
            or x.device.type != "cpu"
            or x.dim() != 3
            or x.numel() == 0
            or kwargs.get("output_attentions")
            or kwargs.get("encoder_hidden_states") is not None
            or torch.compiler.is_compiling()
            or type(x) not in (Tensor, nn.Parameter)
            or native.load() is None
        ):
            return None
        prepared = self._prepared
        if prepared is None or not prepared.current():
            prepared = _Prepared.of(self, self._family)
            object.__setattr__(self, "_prepared", prepared)
        if prepared is None or prepared.hooked():
            return None
        if self._family.rotary and not prepared.fits_rotary(kwargs.get("position_embeddings")):
            return None
        cache = kwargs.get("past_key_values")
        if not self._family.causal and cache is not None:
            return None
        if getattr(cache, "reads_packed", None) is not None and cache.reads_packed(x.shape[1]):
            return None  # the compiled block attends to floats, the block's own forward to the packed cache
        return prepared


class _NotTaken(Exception):
    """A tensor is of a type or in a place that the kernels do not take."""


def _nothing() -> None:
    """What a pickled `_Prepared` comes back as."""


_CLASSES: dict[type, type] = {}
_UNKNOWN: Any = object()  # a mask that only the block's own forward understands


class _Prepared:
    """A block's parts as the extension takes them, and how to call it."""

    def __init__(self, block: nn.Module, family: Family):
        self.family = family
        self.kept: list[tuple[dict[str, Any], str, int]] = []  # where a tensor was found, and its address
        self.modules = [m for m in block.modules() if m is not block]
        # An adapter takes the place of a layer, whose own tensors stay what they are.
        self.places = [(m._modules, name, child) for m in block.modules() for name, child in m._modules.items()]
        attention: Any = block.get_submodule(family.attention)
        self.layer_index = getattr(attention, "layer_idx", None)
        layers = {part: self._layer(block, path) for part in _LINEAR if (path := getattr(family, part))}
        q, k = (block.get_submodule(path) for path in (family.q, family.k))
        self.width = q.in_features
        self.dim = int(getattr(attention, "head_dim", 0) or attention.attention_head_size)
        self.heads, self.kv_heads = q.out_features // self.dim, k.out_features // self.dim
        act = _act_of(_at(block, family.act))
        assert act is not None
        self.cpu = native.module().Block(
            layers["q"], layers["k"], layers["v"], layers["o"], layers.get("gate"), layers["up"], layers["down"],
            self._norm(block, family.before), self._norm(block, family.after), self.width, self.heads, self.kv_heads,
            self.dim, cpu_linear.ACTS[act], family.pre_norm, float(attention.scaling),
        )  # fmt: skip

    @staticmethod
    def of(block: nn.Module, family: Family) -> _Prepared | None:
        """None where a part is of a kind, type or place that the kernels do not take."""
        if why_not(block, family):
            return None
        try:
            return _Prepared(block, family)
        except _NotTaken:
            return None

    # A copy of the block makes its own, of its own tensors.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return _nothing, ()

    def _take(self, holder: nn.Module, name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """A tensor of a module, whose address the extension keeps."""
        home: dict[str, Any] = holder._parameters if name in holder._parameters else holder._buffers
        tensor = home.get(name)
        if tensor is None or tensor.dtype not in dtypes or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise _NotTaken
        self.kept.append((home, name, tensor.data_ptr()))
        return tensor

    def _layer(self, block: nn.Module, path: str) -> Any:
        linear: Any = block.get_submodule(path)
        bias = self._take(linear, "bias", (torch.float32,)) if linear.bias is not None else None
        at = bias.data_ptr() if bias is not None else 0
        if not isinstance(linear, Packed):
            weight = self._take(linear, "weight", (torch.float32,))
            return native.module().Layer(weight.data_ptr(), weight.numel(), *weight.shape, at, linear.out_features)
        spec, owner = linear._packed["weight"], linear._packed_owner.get("weight", (linear, "weight"))
        if not _readable(spec.scheme):
            raise _NotTaken
        zero = spec.scheme.beside
        dtypes = (torch.int32, torch.float32, torch.float16, torch.bfloat16)
        codes, scale = (self._take(owner[0], f"{owner[1]}_{suffix}", dtypes) for suffix in ("packed", "scale"))
        zeros = self._take(owner[0], f"{owner[1]}_{zero}", dtypes) if zero else None
        int8 = bool(spec.inputs)
        if int8 and not cpu_linear.takes_int8(spec.scheme, spec.matrix[1]):
            raise _NotTaken
        weights = cpu_linear.weights_of(codes, scale, zeros, spec.scheme, spec.matrix[1])
        return native.module().Layer(weights, at, spec.matrix[0], int8, static_scale(spec.inputs))

    def _norm(self, block: nn.Module, path: str) -> Any:
        module: Any = block.get_submodule(path)
        weight = self._take(module, "weight", (torch.float32,))
        bias = self._take(module, "bias", (torch.float32,)) if getattr(module, "bias", None) is not None else None
        address = bias.data_ptr() if bias is not None else 0
        centred = isinstance(module, nn.LayerNorm)
        return native.module().Norm(weight.data_ptr(), address, weight.numel(), self.width, _eps_of(module), centred)

    def current(self) -> bool:
        """Whether the block's parts and tensors are still those whose addresses were taken."""
        if any(home.get(name) is not child for home, name, child in self.places):
            return False
        return all((tensor := home.get(name)) is not None and tensor.data_ptr() == at for home, name, at in self.kept)

    def hooked(self) -> bool:
        """Whether somebody wants to see the inside of the block."""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self.modules)

    def fits_rotary(self, positions: Any) -> bool:
        """Whether cos and sin are (1 or batch, tokens, head) as float32."""
        return (
            isinstance(positions, tuple)
            and len(positions) == 2
            and all(p.dim() == 3 and p.dtype == torch.float32 and p.shape[-1] == self.dim for p in positions)
        )

    def run(self, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """y (batch, tokens, width) of x."""
        x = x.contiguous()
        batch, tokens, width = x.shape
        many, threads = batch * tokens, torch.get_num_threads()
        q = torch.empty((many, self.heads * self.dim))
        k = torch.empty((many, self.kv_heads * self.dim))
        v = torch.empty_like(k)
        cos = sin = None
        if self.family.rotary:
            cos, sin = (p.expand(batch, tokens, self.dim).contiguous() for p in kwargs["position_embeddings"])
        self.cpu.begin(
            x.data_ptr(), x.numel(), many, cos.data_ptr() if cos is not None else 0,
            sin.data_ptr() if sin is not None else 0, cos.numel() if cos is not None else 0,
            q.data_ptr(), q.numel(), k.data_ptr(), v.data_ptr(), k.numel(), threads, -1,
        )  # fmt: skip
        keys = k.view(batch, tokens, self.kv_heads, self.dim).transpose(1, 2)
        values = v.view(batch, tokens, self.kv_heads, self.dim).transpose(1, 2)
        cache = kwargs.get("past_key_values")
        if cache is not None:
            keys, values = (_float(t) for t in cache.update(keys, values, self.layer_index))
        seen = keys.shape[2]
        causal = self.family.causal and mask is None and tokens > 1
        if mask is not None and (mask.shape[-1] < seen or mask.shape[-2] not in (1, tokens)):
            raise ValueError(f"a mask of shape {tuple(mask.shape)} for {tokens} queries and {seen} keys")
        out = torch.empty_like(x)
        self.cpu.end(
            x.data_ptr(), x.numel(), batch, tokens, seen, q.data_ptr(), q.numel(), *_strided(keys), *_strided(values),
            mask.data_ptr() if mask is not None else 0, mask.numel() if mask is not None else 0,
            mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0,
            mask.stride(2) if mask is not None and mask.shape[2] > 1 else 0,
            causal, out.data_ptr(), out.numel(), threads, -1,
        )  # fmt: skip
        return out


_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


def _strided(x: Tensor) -> tuple[int, ...]:
    """Address, elements from there to the end of the storage, and strides of (batch, heads, tokens, dim)."""
    left = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.data_ptr(), left, x.stride(0), x.stride(1), x.stride(2)


def _float(x: Tensor) -> Tensor:
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _usable_mask(mask: Any) -> Any:
    """A mask (batch or 1, 1, queries or 1, keys) as float32 to be added; None if there is none."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        return _UNKNOWN
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    return mask.float().contiguous()


def _at(block: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(block.get_submodule(owner), name)


def _act_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name under which the kernels know an activation, by its values."""
    x = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        try:
            y = function(x)
        except (RuntimeError, TypeError):
            return None
        return next(
            (name for name, own in ACTIVATIONS.items() if torch.allclose(own(x), y, rtol=1e-5, atol=1e-6)), None
        )


def _eps_of(norm: Any) -> float | None:
    """Epsilon of a layer norm or of transformers' plain RMS norms, None for what is neither."""
    if isinstance(norm, nn.LayerNorm):
        return float(norm.eps) if len(norm.normalized_shape) == 1 else None
    if type(norm).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"):
        return float(norm.variance_epsilon)
    return None
