"""Objects of the kinds Layer, Weight, Init and Model: sound ones, and one that breaks each promise.

`BROKEN` holds (name of the check, example, what the finding says).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from laconic.testing import Example, Ints

CALLS = itertools.count()


class Affine(nn.Module):
    """y = scale x + shift per feature; the sound layer that the broken ones change in one place."""

    def __init__(self, features: int, device=None, dtype=None):
        super().__init__()
        self.features = features
        self.scale = nn.Parameter(torch.rand(features, device=device, dtype=dtype) + 0.5)
        self.shift = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.features:
            raise ValueError(f"{x.shape[1]} features were given, and {self.features} are expected")
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift

    def as_affine(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift


class ShortOutput(Affine):
    def compute(self, x):
        return super().compute(x)[:, :2]


class AlwaysFloat32(Affine):
    def compute(self, x):
        return super().compute(x).float()


class WithoutDtype(Affine):
    def __init__(self, features):
        super().__init__(features)


class HiddenState(Affine):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.hidden = torch.rand(features)

    def compute(self, x):
        return super().compute(x) + self.hidden.to(x.dtype)


class RandomInEvaluation(Affine):
    def compute(self, x):
        return super().compute(x) + torch.rand_like(x)


class CountsInEvaluation(Affine):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.register_buffer("calls", torch.zeros(()))

    def compute(self, x):
        self.calls += 1
        return super().compute(x)


class Centred(Affine):
    def compute(self, x):
        return super().compute(x - x.mean(0))


class Standardized(Affine):
    def compute(self, x):
        return super().compute(x) / x.var(0, correction=0).sqrt()


class IgnoresStrides(Affine):
    def compute(self, x):
        return super().compute(x.as_strided(x.shape, (x.shape[1], 1)))


class BranchesOnValues(Affine):
    def compute(self, x):
        return super().compute(x) if float(x.sum()) > 0 else super().compute(x) * 2


class InPlace(Affine):
    def compute(self, x):
        return super().compute(x.detach().mul_(2))


class TakesAnything(Affine):
    def forward(self, x):
        return x * self.scale[: x.shape[1]].sum()


class BareAssertion(Affine):
    def forward(self, x):
        assert x.shape[1] == self.features
        return self.compute(x)


class SaysNothing(Affine):
    def forward(self, x):
        if x.shape[1] != self.features:
            raise ValueError("a bad shape")
        return self.compute(x)


class Detached(Affine):
    def compute(self, x):
        return x * self.scale.detach() + self.shift


class _TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class WrongGradient(Affine):
    def compute(self, x):
        return _TwiceTheGradient.apply(super().compute(x))


class FoldsToAnother(Affine):
    def as_affine(self):
        return self.scale, self.shift + 1


class OtherEachTime(Affine):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        with torch.no_grad():
            self.scale.fill_(float(next(CALLS)))


def layer(kind: type[nn.Module], *traits: str) -> Example:
    return Example(lambda: kind(3), kind="Layer", traits=traits, inputs=[(4, 3)], wrong=[(4, 5)])


class Centre(nn.Module):
    """w minus the mean of its rows."""

    def forward(self, w: Tensor) -> Tensor:
        return w - w.mean(1, keepdim=True)


class Exponential(nn.Module):
    """exp(w), which has an inverse on all it can make."""

    def forward(self, w):
        return w.exp()

    def right_inverse(self, w):
        return w.log()


class NotItsInverse(Exponential):
    def right_inverse(self, w):
        return w


class Undefined(nn.Module):
    def forward(self, w):
        return w / w.detach().sub(w.detach())


class GradientStops(nn.Module):
    def forward(self, w):
        return w.detach() * 2


class WrongWeightGradient(nn.Module):
    def forward(self, w):
        return _TwiceTheGradient.apply(w)


class ChangesOriginal(nn.Module):
    def forward(self, w):
        with torch.no_grad():
            w.mul_(0.5)
        return w * 1


class RandomWeight(nn.Module):
    def forward(self, w):
        return w + torch.rand_like(w)


class OtherEachRead(nn.Module):
    def forward(self, w):
        return w + next(CALLS)


class HiddenGain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = float(torch.rand(()))

    def forward(self, w):
        return w * self.gain


def weight(kind: type[nn.Module], *traits: str) -> Example:
    return Example(kind, kind="Weight", traits=traits)


def normal_(module: nn.Module, generator: torch.Generator) -> None:
    """Standard deviation 0.1, drawn in float32 and stored in the parameter's type."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adds_to_what_is_there_(module, generator):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def constant_(module, generator):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.1)


def global_(module, generator):
    normal_(module, generator)
    torch.rand(())


def too_wide_(module, generator):
    normal_(module, generator)
    with torch.no_grad():
        module.weight.mul_(10)


def new_objects_(module, generator):
    module.weight = nn.Parameter(torch.randn(module.weight.shape, generator=generator) * 0.1)


def frozen_(module, generator):
    normal_(module, generator)
    module.weight.requires_grad_(False)


def always_float32_(module, generator):
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def narrow(module: nn.Module) -> bool:
    return 0.08 < float(module.weight.detach().std()) < 0.12


def init(function, *traits: str, holds=narrow) -> Example:
    return Example(lambda: function, kind="Init", traits=traits, inputs=lambda g: [nn.Linear(32, 16)], holds=holds)


def zero_(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()


class TinyLM(nn.Module):
    """Embedding, a running mean over the past, a head: causal, 5 * 4 + 4 * 4 + 4 + 4 * 5 parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.past(self.embed(tokens)))))

    def past(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        return x.cumsum(1) / steps[:, None]


class MixesBatch(TinyLM):
    def past(self, x):
        return super().past(x) - x.mean(0)


class UnusedParameter(TinyLM):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(2))


class LearnsBackwards(TinyLM):
    def forward(self, tokens):
        out = super().forward(tokens)
        return 2 * out.detach() - out  # the value is right, the gradient points up


class HiddenModelState(TinyLM):
    def __init__(self):
        super().__init__()
        self.hidden = torch.rand(4)

    def past(self, x):
        return super().past(x) + self.hidden.to(x.dtype)


class RandomModel(TinyLM):
    def past(self, x):
        return super().past(x) + torch.rand_like(x)


class OtherModelEachTime(TinyLM):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.mix.bias.fill_(float(next(CALLS)))


class ChangesTokens(TinyLM):
    def forward(self, tokens):
        return super().forward(tokens.clamp_(max=1))


class BranchingModel(TinyLM):
    def forward(self, tokens):
        return super().forward(tokens if int(tokens.sum()) > 3 else tokens * 0)


class SeesTheFuture(TinyLM):
    def past(self, x):
        return x + x.mean(1, keepdim=True)


def model(kind: type[nn.Module], *traits: str, parameters: int = 60) -> Example:
    return Example(kind, kind="Model", traits=traits, inputs=[Ints((3, 6), 5)], stated={"parameters": parameters})


SOUND = [
    layer(Affine, "gradient:exact", "batch_independent_eval", "folds"),
    layer(nn.BatchNorm1d, "batch_independent_eval"),
    Example(lambda: nn.Linear(3, 2), kind="Layer", inputs=[(4, 3)], wrong=[(4, 5)], stated={"output": (4, 2)}),
    weight(Centre),
    Example(
        Exponential,
        kind="Weight",
        traits=("right_inverse",),
        inputs=lambda g: [torch.rand(6, 4, generator=g) + 0.1],
    ),
    init(normal_),
    Example(
        lambda: zero_,
        kind="Init",
        traits=("deterministic",),
        inputs=lambda g: [nn.Linear(4, 4)],
        holds=lambda module: not module.weight.any(),
    ),
    model(TinyLM, "causal"),
    Example(
        TinyLM,
        kind="Model",
        inputs=[Ints((3, 6), 5)],
        stated={"parameters": 60, "published": (lambda: nn.Linear(1000, 1000), 1_001_000)},
    ),
]

BROKEN = [
    ("check_layer_shape", layer(ShortOutput), "(4, 3) is stated"),
    ("check_layer_dtypes", layer(AlwaysFloat32), "gives a torch.float32 output"),
    ("check_layer_signature", layer(WithoutDtype), "does not take device and dtype"),
    ("check_layer_state_dict", layer(HiddenState), "another output"),
    ("check_layer_eval_deterministic", layer(RandomInEvaluation), "two calls"),
    ("check_layer_eval_deterministic", layer(CountsInEvaluation), "changed the state"),
    ("check_layer_batch_independent_eval", layer(Centred, "batch_independent_eval"), "alone"),
    ("check_layer_batch_of_one", layer(Standardized), "batch of one in evaluation mode is not finite"),
    ("check_layer_noncontiguous", layer(IgnoresStrides), "non-contiguous"),
    ("check_layer_export", layer(BranchesOnValues), "raised"),
    ("check_layer_keeps_input", layer(InPlace), "changed in place"),
    ("check_layer_refuses_wrong_shape", layer(TakesAnything), "without a word"),
    ("check_layer_refuses_wrong_shape", layer(BareAssertion), "AssertionError"),
    ("check_layer_refuses_wrong_shape", layer(SaysNothing), "names none of [5]"),
    ("check_layer_gradient", layer(Detached), "no gradient reaches scale"),
    ("check_layer_gradient", layer(WrongGradient), "not the derivative"),
    ("check_layer_folds", layer(FoldsToAnother, "folds"), "another function"),
    ("check_layer_repeats_from_seed", layer(OtherEachTime), "same seed"),
    ("check_weight_shape_and_dtype", weight(Undefined), "not finite"),
    ("check_weight_gradient", weight(GradientStops), "raised RuntimeError"),
    ("check_weight_gradient", weight(WrongWeightGradient), "not the derivative"),
    ("check_weight_keeps_original", weight(ChangesOriginal), "changed the original"),
    ("check_weight_eval_deterministic", weight(RandomWeight), "two calls"),
    ("check_weight_bakes", weight(OtherEachRead), "that is left is another"),
    ("check_weight_state_dict", weight(HiddenGain), "another output"),
    ("check_weight_right_inverse", weight(NotItsInverse, "right_inverse"), "another one back"),
    ("check_weight_without_right_inverse", weight(Exponential), "declare the trait"),
    ("check_init_repeats_from_seed", init(adds_to_what_is_there_), "other values"),
    ("check_init_depends_on_seed", init(constant_), "declare 'deterministic'"),
    ("check_init_leaves_global_random_numbers", init(global_), "global random numbers"),
    ("check_init_values", init(too_wide_), "not what is stated"),
    ("check_init_values", init(normal_, holds=None), "Example(holds=...)"),
    ("check_init_keeps_parameters", init(new_objects_), "another object"),
    ("check_init_keeps_parameters", init(frozen_), "False"),
    ("check_init_dtypes", init(always_float32_), "is torch.float32"),
    ("check_model_forward", model(MixesBatch), "alone"),
    ("check_model_backward", model(UnusedParameter), "no gradient reaches unused"),
    ("check_model_learns", model(LearnsBackwards), "the loss went from"),
    ("check_model_parameter_count", model(TinyLM, parameters=61), "it has 60 parameters, not 61"),
    (
        "check_model_parameter_count",
        Example(
            TinyLM,
            kind="Model",
            inputs=[Ints((3, 6), 5)],
            stated={"parameters": 60, "published": (lambda: nn.Linear(9, 9), 91)},
        ),
        "published config has 90",
    ),
    ("check_model_state_dict", model(HiddenModelState), "another output"),
    ("check_model_eval_deterministic", model(RandomModel), "two calls"),
    ("check_model_repeats_from_seed", model(OtherModelEachTime), "same seed"),
    ("check_model_keeps_input", model(ChangesTokens), "changed in place"),
    ("check_model_export", model(BranchingModel), "raised"),
    ("check_model_causal", model(SeesTheFuture, "causal"), "later inputs"),
]
