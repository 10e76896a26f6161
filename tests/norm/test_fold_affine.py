"""`fold_affine`: the same function without the norm, in every place that it can go, and what is left alone and why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from laconic.core.affine import rounding_bound
from laconic.core.passes import Context, run
from laconic.core.record import Record, apply_records
from laconic.core.structure import Structure
from laconic.norm import FoldAffine, PowerNorm, ProgressiveNorm, RepBN, UnifiedNorm, fold
from laconic.tasks.small.networks import Attention
from laconic.testing import Example


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gains, shifts and statistics as after training."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.ndim == 1 and tensor.is_floating_point() and not isinstance(module, (nn.Linear, nn.Conv2d)):
                positive = name in ("running_var", "running_phi")
                nn.init.uniform_(tensor, 0.5 if positive else -1.5, 2, generator=g)
    return model.eval()


class Fused(nn.Module):
    """A pre-norm block with fused queries, keys and values, and a perceptron."""

    def __init__(self, norm, width: int = 8):
        super().__init__()
        self.norm1, self.attention = norm(width), Attention(width, 2, causal=False)
        self.norm2, self.up, self.down = norm(width), nn.Linear(width, 12, bias=False), nn.Linear(12, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def _block(g):
    return [lively(Fused(RepBN)), torch.randn(2, 5, 8, generator=g)]


def _residual():
    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = RepBN(4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.norm(x)
            return y + self.linear(y)

    return lively(Post()), [torch.randn(2, 4)], "norm"


EXAMPLES = [
    Example(lambda: FoldAffine(), kind="Pass", traits=("exact",), inputs=_block, stated={"refused": _residual}),
    Example(
        lambda: FoldAffine(partial=True),
        kind="Pass",
        traits=("exact",),
        inputs=lambda g: [lively(Fused(nn.LayerNorm)), torch.randn(2, 5, 8, generator=g)],
        stated={"refused": _residual},
    ),
]


def channels_first(width: int) -> nn.Module:
    return UnifiedNorm(width, channel_dim=1)


MODELS = {
    "batch norm after a convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 6, 6), ["0"]),
    "batch norm before a convolution": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 6, 6), ["2"],
    ),
    "batch norm before a linear layer": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), (5, 4), ["1"]),
    "unified norm after a grouped transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), channels_first(6)), (2, 4, 5, 5), ["0"],
    ),
    "unified norm between linear layers": (
        lambda: nn.Sequential(nn.Linear(4, 6), UnifiedNorm(6), nn.Linear(6, 2)), (2, 5, 4), ["0"],
    ),
    "power norm": (
        lambda: nn.Sequential(nn.Tanh(), PowerNorm(4, layer_scale_groups=None), nn.Linear(4, 2)), (2, 5, 4), ["2"],
    ),
    "a norm that has faded": (
        lambda: nn.Sequential(ProgressiveNorm(nn.LayerNorm(4), RepBN(4), steps=0), nn.Linear(4, 2)), (2, 5, 4), ["1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_place(name):
    make, shape, layers = MODELS[name]
    model, x = lively(make()).double(), torch.randn(shape, dtype=torch.float64)
    want = model(x)
    done = fold(model, ((x,), {}))
    assert [list(into) for into in done.folded.values()] == [layers] and not done.left
    assert not any(hasattr(module, "as_affine") or "BatchNorm" in type(module).__name__ for module in model.modules())
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [RepBN, UnifiedNorm])
def test_fused_and_separate_readers_lose_no_more_than_stated(norm):
    model, x = lively(Fused(norm)), torch.randn(2, 5, 8)
    seen = {}
    exact = copy.deepcopy(model).double()
    exact.attention.qkv.register_forward_hook(lambda m, a, y: seen.update(exact=y))
    exact(x.double())
    done = fold(model, ((x,), {}))
    assert done.folded == {"norm1": ("attention.qkv",), "norm2": ("up",)}
    assert model.up.bias is not None
    bound = rounding_bound(model.attention.qkv.weight, model.attention.qkv.bias, x)
    assert bool(((model.attention.qkv(x).double() - seen["exact"]).abs() <= bound).all())
    gamma = done.records[0].data["layers"][0]["bound"]
    assert gamma == pytest.approx((8 + 2) * 2**-24, rel=1e-3)


def test_a_layer_scale_and_a_layer_norm_stay_and_their_gains_go():
    for norm in (PowerNorm, nn.LayerNorm, nn.RMSNorm):
        model, x = lively(Fused(norm)).double(), torch.randn(2, 5, 8, dtype=torch.float64)
        want = model(x)
        left = fold(model, ((x,), {})).left
        assert set(left) == {"norm1", "norm2"} and "partial=True" in left["norm1"]
        fold(model, ((x,), {}), partial=True)
        assert not list(model.norm1.parameters())
        torch.testing.assert_close(model(x), want)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(7, 4), RepBN(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.norm(self.words(ids)))


def test_a_tied_head_is_left_alone_or_untied():
    model, ids = lively(Tied()), torch.arange(6).view(2, 3)
    want, words = model(ids), model.words.weight.clone()
    done = fold(model, ((ids,), {}))
    assert "untie=True" in done.left["norm"] and model.head.weight is model.words.weight
    fold(model, ((ids,), {}), untie=True)
    assert isinstance(model.norm, nn.Identity) and torch.equal(model.words.weight, words)
    torch.testing.assert_close(model(ids), want)


def test_conv1d_of_transformers():
    gpt2 = pytest.importorskip("transformers.pytorch_utils")
    model, x = lively(nn.Sequential(RepBN(4), gpt2.Conv1D(6, 4))), torch.randn(2, 5, 4)
    want = model(x)
    assert fold(model, ((x,), {})).folded == {"0": ("1",)}
    torch.testing.assert_close(model(x), want)


def test_a_running_schedule_is_refused_and_nothing_is_changed():
    model = nn.Sequential(
        RepBN(4), nn.Linear(4, 4), ProgressiveNorm(nn.LayerNorm(4), RepBN(4), steps=3), nn.Linear(4, 2)
    )
    example = ((torch.randn(2, 4),), {})
    with pytest.raises(ValueError, match="^0: RepBN is in training mode"):
        fold(model, example)
    with pytest.raises(ValueError, match="^2: the old norm is still fading: 3 optimizer steps are left"):
        fold(model.eval(), example)
    assert isinstance(model[0], RepBN)
    assert "still fading" in FoldAffine().plan(Structure.build(model, example), model).skipped["2"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = RepBN(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(torch.relu(self.linear(self.norm(x))))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = RepBN(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.norm(torch.relu(self.a(self.norm(x)))))


LEFT = {
    "zeros around the input": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)), (2, 4, 6, 6), "pads its input",
    ),
    "the reader is called twice": (Twice, (2, 4), "is read in other places too"),
    "the norm is called twice": (Shared, (2, 4), "it is called 2 times"),
    "an activation follows": (lambda: nn.Sequential(nn.ReLU(), RepBN(4), nn.ReLU()), (2, 4), "also goes to relu"),
    "the model returns it": (lambda: nn.Sequential(nn.ReLU(), RepBN(4)), (2, 4), "the model returns its output"),
    "several linear layers on another axis": (
        lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(4), nn.Linear(5, 5)), (2, 4, 5), "channels are not those of 0",
    ),
    "a bare norm": (lambda: nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)), (2, 4), "no gain"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    make, shape, message = LEFT[name]
    model, x = lively(make()), torch.randn(shape)
    want = model(x)
    done = fold(model, ((x,), {}))
    assert not done.folded and message in " ".join(done.left.values())
    assert torch.equal(model(x), want)


def test_parametrizations_and_hooks_are_left_alone():
    for spoil, message in (
        (lambda m: nn.utils.parametrizations.weight_norm(m[1]), "its output also goes to linear in 1"),
        (lambda m: m[0].register_forward_hook(lambda *a: None), "forward hooks look at 0"),
    ):
        model = lively(nn.Sequential(RepBN(4), nn.Linear(4, 2)))
        spoil(model)
        assert message in fold(model, ((torch.randn(2, 4),), {})).left["0"]


def test_widths_that_do_not_match_are_refused():
    """A plan for one model, and a norm of another width in the model that it is solved on."""
    model, example = lively(nn.Sequential(RepBN(4), nn.Linear(4, 2))), ((torch.randn(2, 4),), {})
    structure = Structure.build(model, example)
    decision = FoldAffine().plan(structure, model)
    model[0] = RepBN(5).eval()
    with pytest.raises(ValueError, match="5 channels do not match a layer that reads 4"):
        FoldAffine().solve("0", decision, Context(model, structure))
    assert "5 channels do not match the 4 of 1" in FoldAffine().plan(structure, model).skipped["0"]


def test_an_artifact_makes_the_same_structure_again():
    model, x = lively(Fused(RepBN)), torch.randn(2, 5, 8)
    skeleton = Fused(RepBN).eval().to("meta")
    records, _ = run(FoldAffine(), Context(model, Structure.build(model, ((x,), {}))))
    apply_records(skeleton, [Record.from_json(record.to_json()) for record in records])
    loaded = skeleton.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))


def test_the_report():
    model = lively(nn.Sequential(nn.Linear(3, 4), RepBN(4), nn.ReLU(), nn.LayerNorm(4)))
    shown = repr(fold(model, ((torch.randn(2, 3),), {})))
    assert shown.startswith("folded 1 into 0\nleft 3: a LayerNorm stays")
    assert repr(fold(nn.Linear(2, 2), ((torch.randn(1, 2),), {}))) == "there was no norm to fold"
