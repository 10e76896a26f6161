"""`place`: a transformer of transformers (Llama, GPT-2, BERT, ViT) with its norms where one wants them.

Every layer of these has two residual blocks, attention and a perceptron, and one norm for each. `place` gives both blocks
of layer l of L the `Placement` of a scheme (`laconic.core.placement`):

- The norm that a block has goes to the place that the scheme names, and keeps its path, gain and bias. Where a scheme
  has a second norm in a block, that one is new (`norm_out_1`, `norm_out_2` of the layer), with gain 1 and bias 0; where it
  has none, the norm becomes the identity.
- Where the last layer normalizes its sum, the model's last norm becomes the identity; where it does not and the model has
  no last norm (BERT), the last layer gets one, `norm_final`.

The layer stays the object that it is, of a subclass of its class, so that caches, output recording, gradient
checkpointing and the names of the weights are as before. The function that the model computes is another one: place a
fresh model and train it, or train on. To open saved weights, build the model, place it likewise, and load them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

from .placement import Placement, Scheme, placements, residual

__all__ = ["Placed", "place", "placements_of", "unscale_"]

Given = Mapping[str, Any]


@dataclass(frozen=True)
class _Anatomy:
    """Where the parts of a layer lie.

    Attributes:
        norms: paths of the norm of attention and of that of the perceptron, within the layer.
        branches: what they stand for: functions of (layer, input, the other arguments of the layer's call).
        last: name of the model's last norm, beside the list of layers; "" where there is none.
        carriers: paths of the linear layers on the way of values to the sums; queries and keys are not among them.
        writers: those among them that write to the sums.
        fused: path of a carrier that computes queries, keys and values at once, in this order; or "".
    """

    norms: tuple[str, str]
    branches: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    last: str
    carriers: tuple[str, ...]
    writers: tuple[str, str]
    fused: str = ""


def _llama_attention(layer: Any, h: Tensor, given: Given) -> Tensor:
    return layer.self_attn(hidden_states=h, **given)[0]


def _gpt2_attention(layer: Any, h: Tensor, given: Given) -> Tensor:
    own = {name: value for name, value in given.items() if not name.startswith("encoder_")}
    return layer.attn(h, **own)[0]


def _bert_attention(layer: Any, h: Tensor, given: Given) -> Tensor:
    own = {name: value for name, value in given.items() if not name.startswith("encoder_")}
    inner = layer.attention
    return inner.output.dropout(inner.output.dense(inner.self(h, **own)[0]))


def _bert_perceptron(layer: Any, h: Tensor, given: Given) -> Tensor:
    return layer.output.dropout(layer.output.dense(layer.intermediate(h)))


def _vit_attention(layer: Any, h: Tensor, given: Given) -> Tensor:
    return layer.dropout(layer.attention(h, **given)[0])


def _perceptron(layer: Any, h: Tensor, given: Given) -> Tensor:
    return layer.mlp(h)


_LLAMA = _Anatomy(
    ("input_layernorm", "post_attention_layernorm"),
    (_llama_attention, _perceptron),
    "norm",
    ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("self_attn.o_proj", "mlp.down_proj"),
)
# By the name of the layer's class: what a layer computes cannot be read off the names of its parts alone.
ANATOMIES: Mapping[str, _Anatomy] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "GPT2Block": _Anatomy(
        ("ln_1", "ln_2"),
        (_gpt2_attention, _perceptron),
        "ln_f",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        ("attn.c_proj", "mlp.c_proj"),
        fused="attn.c_attn",
    ),
    "BertLayer": _Anatomy(
        ("attention.output.LayerNorm", "output.LayerNorm"),
        (_bert_attention, _bert_perceptron),
        "",
        ("attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"),
        ("attention.output.dense", "output.dense"),
    ),
    "ViTLayer": _Anatomy(
        ("layernorm_before", "layernorm_after"),
        (_vit_attention, lambda layer, h, given: layer.dropout(layer.mlp(h))),
        "layernorm",
        ("attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
        ("attention.o_proj", "mlp.fc2"),
    ),
}


@dataclass(frozen=True)
class Placed:
    """What `place` did.

    Attributes:
        placements: path of each layer -> the placement of its two blocks.
        fresh: paths of norms and scales that are new.
        removed: paths of norms that are the identity now.
        notes: what else is to be known.
    """

    placements: dict[str, Placement] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def place(model: Any, scheme: str | Scheme = "pre", *, embed_norm: bool | None = None, init: bool = False) -> Any:
    """Give every layer of a model the placement of a scheme, in place.

    Args:
        model: a model of transformers whose layers are those of Llama, Mistral, Qwen2, GPT-2, BERT or ViT; or the config of
            a model of `laconic.zoo`, of which a copy with this placement is returned.
        scheme: a name of `laconic.core.placement.SCHEMES`, or a function of (layer, layers), counted from 1.
        embed_norm: normalize what the first layer reads; by default where the scheme is "peri" (and, in BERT, whose
            embeddings are normalized already, never).
        init: multiply the weights by the factors that the scheme has for first weights ("deepnorm", "fixup").

    Returns:
        What was done; of a config, the new config.

    Raises:
        BadInput: the layers are not of a known kind, have cross-attention, or were placed before.
    """
    if dataclasses.is_dataclass(model) and not isinstance(model, type) and hasattr(model, "placement"):
        return dataclasses.replace(model, placement=scheme, norm_embedding=embed_norm)
    if not isinstance(model, nn.Module):
        raise BadInput(f"a model or a config with a placement is wanted, not a {type(model).__name__}")
    parent, paths, anatomy = _layers_of(model)
    layers = [model.get_submodule(path) for path in paths]
    places = placements(scheme, len(layers))
    if any(one.norm_in and one.norm_after_add for one in places):
        raise BadInput("a placement has N_in and N_add, and a layer has one norm to a block: leave one of them out")
    first = scheme == "peri" if embed_norm is None else embed_norm
    if embed_norm is None and not anatomy.last:
        first = False
    fresh: list[str] = []
    removed: list[str] = []
    notes: list[str] = []
    for path, layer, place_ in zip(paths, layers, places, strict=True):
        like = _norms_of(layer, anatomy)[0]
        new, gone = _place_layer(layer, anatomy, place_)
        if layer is layers[0] and first:
            layer.norm_embedding = _reset(like)
            new.append("norm_embedding")
        if layer is layers[-1] and not anatomy.last and not place_.norm_after_add:
            layer.norm_final = _reset(like)
            new.append("norm_final")
        if init:
            _scale_first_weights(layer, anatomy, place_)
        elif place_.init_gain != 1.0 or place_.zero_last:
            notes.append(f"{path}: the scheme scales first weights: for a fresh model give init=True")
        fresh += [f"{path}.{name}" for name in new]
        removed += [f"{path}.{name}" for name in gone]
    if anatomy.last and places[-1].norm_after_add:
        last = f"{parent}.{anatomy.last}" if parent else anatomy.last
        model.set_submodule(last, nn.Identity())
        removed.append(last)
    return Placed(dict(zip(paths, places, strict=True)), tuple(fresh), tuple(removed), tuple(notes[:1]))


def placements_of(model: nn.Module) -> dict[str, Placement]:
    """Path of each layer that `place` has changed -> its placement."""
    return {path: module.placement for path, module in model.named_modules() if isinstance(module, PlacedLayer)}


def unscale_(model: nn.Module) -> tuple[str, ...]:
    """Fold every constant c_in into the gain (and bias) of the norm before it, in place; the function stays.

    Returns:
        Paths of the norms that took one.

    Raises:
        BadInput: no layer has such a constant, or one stands behind no norm with a gain.
    """
    found = []
    for path, layer in model.named_modules():
        if not isinstance(layer, PlacedLayer) or layer.placement.input_scale == 1.0:
            continue
        for name, norm in zip(layer.anatomy.norms, _norms_of(layer, layer.anatomy), strict=True):
            weight = getattr(norm, "weight", None)
            if not layer.placement.norm_in or weight is None:
                raise BadInput(
                    f"{path}.{name} has no gain that could take the factor {layer.placement.input_scale:.4g}"
                )
            with torch.no_grad():
                for parameter in (weight, getattr(norm, "bias", None)):
                    if parameter is not None:
                        parameter.mul_(layer.placement.input_scale)
            found.append(f"{path}.{name}")
        layer.placement = dataclasses.replace(layer.placement, input_scale=1.0)
    if not found:
        raise BadInput(f"no layer of {type(model).__name__} scales what a norm gives: place(model, 'lns') makes it so")
    return tuple(found)


# --- layers -----------------------------------------------------------------------------------------


class PlacedLayer:
    """What a placed layer computes, beside its own class.

    Attributes:
        placement: of both its blocks.
        anatomy: where its parts lie.
        norm_embedding, norm_out_1, norm_out_2, norm_final: norms that it did not have; None where it has none.
        scale_1, scale_2: the learned scales of the branches.
    """

    placement: Placement
    anatomy: _Anatomy
    signature: inspect.Signature

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, from the arguments that its class takes."""
        given = self.signature.bind(self, hidden_states, *args, **kwargs).arguments
        given = dict(list(given.items())[2:])  # without the layer and its input
        given |= given.pop("kwargs", {})
        if given.get("encoder_hidden_states") is not None:
            raise ValueError("a placed layer has no cross-attention, and encoder_hidden_states were given")
        place, x = self.placement, hidden_states
        x = x if self._extra("norm_embedding") is None else self._extra("norm_embedding")(x)
        for number, branch in enumerate(self.anatomy.branches, 1):
            norm = self.get_submodule(self.anatomy.norms[number - 1])  # type: ignore[attr-defined]
            out = self._extra(f"norm_out_{number}")
            if place.norm_out and out is None:  # the block's own norm is that one
                out = norm
            x = residual(
                x,
                functools.partial(branch, self, given=given),
                place,
                norm if place.norm_in else None,
                out,
                norm if place.norm_after_add else None,
                scale=self._extra(f"scale_{number}"),
            )
        return x if self._extra("norm_final") is None else self._extra("norm_final")(x)

    def _extra(self, name: str) -> Any:
        return getattr(self, name, None)


@functools.cache
def _placed_class(cls: type) -> type:
    members = {"anatomy": ANATOMIES[cls.__name__], "signature": inspect.signature(cls.forward)}  # type: ignore[attr-defined]
    return type(f"Placed{cls.__name__}", (PlacedLayer, cls), {**members, "__module__": __name__})


def _place_layer(layer: Any, anatomy: _Anatomy, place: Placement) -> tuple[list[str], list[str]]:
    """Make a layer a placed one; returns names of new parts, and of norms that are gone."""
    fresh: list[str] = []
    removed: list[str] = []
    norms = _norms_of(layer, anatomy)
    layer.__class__ = _placed_class(type(layer))  # type: ignore[arg-type]
    layer.placement = place
    for number, (name, norm) in enumerate(zip(anatomy.norms, norms, strict=True), 1):
        wanted = place.norm_in + place.norm_out + place.norm_after_add
        if place.norm_out and wanted > 1:
            setattr(layer, f"norm_out_{number}", _reset(norm))
            fresh.append(f"norm_out_{number}")
        if not wanted:
            layer.set_submodule(name, nn.Identity())
            removed.append(name)
        if place.learned:
            like = next(layer.parameters())
            start = torch.tensor(place.branch_scale, dtype=like.dtype, device=like.device)
            setattr(layer, f"scale_{number}", nn.Parameter(start))
            fresh.append(f"scale_{number}")
    return fresh, removed


def _layers_of(model: nn.Module) -> tuple[str, tuple[str, ...], _Anatomy]:
    """Path of what holds the layers, the paths of these, and their anatomy."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(isinstance(layer, PlacedLayer) for layer in module):
            raise BadInput(f"the norms of {path} were placed already: build the model anew, and place that")
        names = {type(layer).__name__ for layer in module}
        if len(names) != 1 or not names <= ANATOMIES.keys():
            continue
        crossed = [number for number, layer in enumerate(module) if hasattr(layer, "crossattention")]
        if crossed:
            raise BadInput(
                f"{path}.{crossed[0]} has cross-attention, a third residual block, which place does not know"
            )
        return (
            path.rpartition(".")[0],
            tuple(f"{path}.{number}" for number in range(len(module))),
            ANATOMIES[names.pop()],
        )
    chains = [f"{path} of {type(m[0]).__name__}" for path, m in _lists_of(model)]
    found = f"found {', '.join(chains)}" if chains else "no list of layers was found"
    raise BadInput(
        f"{type(model).__name__}: {found}; place knows {', '.join(ANATOMIES)}: build other models from "
        "laconic.core.placement.Residual, or give laconic.zoo.LlamaLMConfig a placement"
    )


def _lists_of(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield path, module


def _norms_of(layer: Any, anatomy: _Anatomy) -> list[nn.Module]:
    return [layer.get_submodule(name) for name in anatomy.norms]


def _reset(norm: nn.Module) -> nn.Module:
    """A copy with gain 1 and bias 0."""
    made = copy.deepcopy(norm)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.fill_(0.0 if name == "bias" else 1.0)
    return made


def _scale_first_weights(layer: nn.Module, anatomy: _Anatomy, place: Placement) -> None:
    with torch.no_grad():
        for path in anatomy.carriers:
            weight: Any = layer.get_submodule(path).weight
            part = weight[:, 2 * weight.shape[1] // 3 :] if path == anatomy.fused else weight  # the values' columns
            part.mul_(place.init_gain)
        for path in anatomy.writers if place.zero_last else ():
            nn.init.zeros_(layer.get_submodule(path).weight)  # type: ignore[arg-type]
