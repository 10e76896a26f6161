"""Low-rank adapters over frozen linear layers, also over packed ones: y = base(x) + (alpha / r) dropout(x) A^T B^T.

    paths = add_lora_(model, rank=8)          # all else is frozen; train the model as ever
    merge_lora_(model)                        # float layers W + (alpha / r) B A in their places

A (r, in) is drawn as torch draws a linear layer's weight, B (out, r) starts as zeros, so nothing changes at first.

`lora_state` and `load_lora_state_` speak the names of PEFT's adapter files, `base_model.model.PATH.lora_A.weight`, so
adapters go from one library to the other.

Source: "LoRA: Low-Rank Adaptation of Large Language Models", Hu et al., 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.errors import BadInput
from laconic.nn import is_packed
from laconic.nn.packed import _is_conv1d

__all__ = [
    "LoRALinear", "adapt_layer_", "add_lora_", "freeze_but_adapters_", "linear_layers", "load_lora_state_",
    "lora_layers", "lora_state", "merge_lora_",
]  # fmt: skip

PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank adapter.

    Args:
        base: `nn.Linear`, or the `Conv1D` of transformers; packed or not. Its parameters are frozen.
        rank: r.
        alpha: the adapter's output is multiplied by alpha / r; r by default.
        dropout: of what enters the adapter.
        device, dtype: of A and B; those of the layer by default.

    Raises:
        ValueError: the base is no linear layer, or the rank is not positive.
    """

    def __init__(
        self, base: nn.Module, rank: int = 64, alpha: float | None = None, dropout: float = 0.0,
        *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if not (isinstance(base, nn.Linear) or _is_conv1d(base)):
            raise ValueError(f"LoRALinear is for linear layers, not for a {type(base).__name__}")
        if rank < 1:
            raise ValueError(f"LoRALinear(rank={rank}): an adapter has a rank of at least 1")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = _features(base)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.dropout = nn.Dropout(dropout)
        device, dtype = _device(base) if device is None else device, dtype or _dtype(base)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as torch draws it, B zeros."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def weight(self) -> Any:
        """The base's, for code that looks at it; without the adapter."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"LoRALinear takes {self.in_features} features and got an input of {tuple(x.shape)}")
        y = self.base(x)
        update = F.linear(F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A), self.lora_B)
        return y + (self.scaling * update).to(y.dtype)

    def merged(self) -> nn.Linear:
        """A float layer W + (alpha / r) B A, of the base's device and type; a packed W is the value that it stands for."""
        weight: Tensor = self.base.weight.detach()  # type: ignore[operator,union-attr]
        weight = weight.t() if _is_conv1d(self.base) else weight
        wide = torch.promote_types(weight.dtype, self.lora_A.dtype)
        whole = weight.to(wide) + self.scaling * (self.lora_B.detach().to(wide) @ self.lora_A.detach().to(wide))
        bias: Any = self.base.bias
        layer = nn.Linear(
            self.in_features, self.out_features, bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            layer.weight.copy_(whole)
            if bias is not None:
                layer.bias.copy_(bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def linear_layers(
    model: nn.Module, select: Callable[[str, nn.Module], bool] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Paths of the linear layers that may take an adapter, and path -> why another may not.

    Args:
        model: any.
        select: whether to take the layer at a path; by default all but output layers of language models (`lm_head`).
    """
    chosen, left = [], {}
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
            continue
        if path.rpartition(".")[2] == "base" and isinstance(model.get_submodule(path.rpartition(".")[0]), LoRALinear):
            continue
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        if not path:
            left[path] = "it is the model itself: put it into another"
        elif isinstance(parent, nn.MultiheadAttention):
            left[path] = "MultiheadAttention reads its weight directly and would not call the adapter"
        elif select(path, module) if select is not None else path.rpartition(".")[2] != "lm_head":
            chosen.append(path)
    return chosen, left


def add_lora_(
    model: nn.Module, rank: int = 64, alpha: float | None = None, dropout: float = 0.0,
    select: Callable[[str, nn.Module], bool] | None = None,
) -> list[str]:  # fmt: skip
    """Put a `LoRALinear` around linear layers, in place, and freeze everything but the adapters.

    Args:
        model: any; packed layers are taken as they are.
        rank, alpha, dropout: see `LoRALinear`.
        select: see `linear_layers`.

    Returns:
        Paths of the layers.

    Raises:
        BadInput: no layer is left to take, or a rank that is none.
    """
    chosen, left = linear_layers(model, select)
    if not chosen:
        why = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in left.items())
        raise BadInput(f"{type(model).__name__} has no linear layer to adapt{f': {why}' if why else ''}")
    if rank < 1:
        raise BadInput(f"rank={rank}: an adapter has a rank of at least 1")
    for path in chosen:
        if not isinstance(model.get_submodule(path), LoRALinear):  # else the same layer under another name
            adapt_layer_(model, path, rank, alpha, dropout)
    freeze_but_adapters_(model)
    return chosen


def adapt_layer_(
    model: nn.Module, path: str, rank: int, alpha: float | None = None, dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> LoRALinear:  # fmt: skip
    """Put a `LoRALinear` around one layer, under each of its names, in place; see there."""
    base = model.get_submodule(path)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is base]
    layer = LoRALinear(base, rank, alpha, dropout, dtype=dtype).train(base.training)
    for name in names:
        model.set_submodule(name, layer)
    return layer


def freeze_but_adapters_(model: nn.Module) -> None:
    """Leave the adapters of a model alone to be trained, in place."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> layer with an adapter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora_(model: nn.Module) -> list[str]:
    """Replace layers with adapters by float layers that compute the same, in place; returns their paths.

    What was packed is float afterwards; quantizing it again loses a part of what the adapter learned.

    Raises:
        BadInput: there is none.
    """
    found = _found(model)
    plain: dict[nn.Module, nn.Linear] = {layer: layer.merged() for layer in found.values()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in plain:
            model.set_submodule(path, plain[module])
    return list(found)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters, under the names of a PEFT adapter file.

    Raises:
        BadInput: there is none.
    """
    return {
        f"{PEFT_PREFIX}{path}.{name}.weight": getattr(layer, name).detach()
        for path, layer in _found(model).items()
        for name in ("lora_A", "lora_B")
    }


@torch.no_grad()
def load_lora_state_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Adapters from a PEFT adapter file into those of a model, in place; alpha is what the model was made with.

    Raises:
        BadInput: the file has other layers or shapes than the model; nothing is changed then.
    """
    wanted = {
        f"{PEFT_PREFIX}{path}.{name}.weight": getattr(layer, name)
        for path, layer in _found(model).items()
        for name in ("lora_A", "lora_B")
    }
    missing, strange = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or strange:
        said = [f"it lacks {name}" for name in missing[:1]] + [f"the model has no {name}" for name in strange[:1]]
        raise BadInput(f"the adapter does not fit: {'; '.join(said)}")
    for name, parameter in wanted.items():
        if parameter.shape != state[name].shape:
            raise BadInput(
                f"the adapter does not fit: {name} is {tuple(state[name].shape)}, and {tuple(parameter.shape)} in the model"
            )
    for name, parameter in wanted.items():
        parameter.copy_(state[name])


def _found(model: nn.Module) -> dict[str, LoRALinear]:
    found = lora_layers(model)
    if not found:
        raise BadInput(f"{type(model).__name__} has no layer with an adapter: see add_lora_")
    return found


def _features(base: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    shape = base._packed["weight"].shape if is_packed(base) else base.weight.shape
    return shape[0], shape[1]


def _dtype(base: Any) -> torch.dtype:
    return base._packed_dtype if is_packed(base) else base.weight.dtype


def _device(base: nn.Module) -> torch.device:
    return next(base.parameters()).device
