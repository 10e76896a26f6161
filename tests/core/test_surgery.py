"""`swap`: what is replaced, what is kept of it, what is left alone and why."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import laconic
from laconic.core.surgery import swap
from laconic.errors import BadInput


@pytest.fixture(autouse=True)
def silent_unless_asserted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Net(nn.Module):
    """Two blocks with norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(6), "fc": nn.Linear(6, 6)}) for _ in range(2))
        self.norm = nn.LayerNorm(6, eps=1e-3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["fc"](block["norm"](x))
        return self.head(self.norm(x))


NET = ((torch.zeros(2, 6),), {})


def lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def same_layer(old: nn.Linear) -> nn.Linear:
    """A layer of the same sizes with weights of its own."""
    return nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)


# --- what is kept -----------------------------------------------------------------------------------


def test_a_norm_by_class_keeps_its_gain_and_its_eps() -> None:
    model = lively(Net())
    weight = model.norm.weight
    done = laconic.swap(model, nn.LayerNorm, nn.RMSNorm, example=NET)
    assert isinstance(model.norm, nn.RMSNorm) and model.norm.eps == 1e-3
    assert model.norm.weight is weight  # the very tensor, so that an optimizer still holds it
    assert [change.paths for change in done.changed] == [("blocks.0.norm",), ("blocks.1.norm",), ("norm",)]
    assert done.changed[0].kept == ("weight",) and done.changed[0].lost == {"bias": "no place"}
    assert done.left == {} and done.notes == []
    assert repr(done) == (
        "LayerNorm -> RMSNorm: 3 modules\n  blocks.0.norm, blocks.1.norm, norm\n  kept weight; lost bias (no place)"
    )
    assert model(*NET[0]).shape == (2, 3)


def test_the_same_class_again_is_the_same_function() -> None:
    model = lively(Net())
    x = torch.randn(5, 6)
    before = model(x)
    done = swap(model, (nn.LayerNorm, nn.Linear), lambda old: copy.deepcopy(old), example=NET)
    assert len(done.changed) == 6
    assert torch.equal(model(x), before)


def test_arguments_are_read_off_whatever_the_classes_call_them() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), stride=2, padding=1, dilation=2, groups=2, bias=False, padding_mode="reflect")
    model = nn.Sequential(conv, nn.BatchNorm2d(6, eps=0.1, momentum=None))

    class Layer(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 1

    class ByDim(nn.Module):
        def __init__(self, dim, epsilon=1.0, bias=True):
            super().__init__()
            self.dim, self.epsilon, self.has_bias = dim, epsilon, bias
            self.weight = nn.Parameter(torch.ones(dim))

    swap(model, nn.Conv2d, Layer, example=((torch.zeros(1, 4, 9, 9),), {}))
    assert type(model[0]) is Layer and repr(model[0]).removeprefix("Layer") == repr(conv).removeprefix("Conv2d")
    assert model[0].weight is conv.weight
    swap(model, nn.BatchNorm2d, ByDim, example=((torch.zeros(1, 4, 9, 9),), {}))
    assert (model[1].dim, model[1].epsilon, model[1].has_bias) == (6, 0.1, True)


def test_a_norm_that_tells_no_size_but_has_a_weight() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = nn.Sequential(LlamaRMSNorm(6, eps=1e-3))
    swap(model, LlamaRMSNorm, nn.RMSNorm, example=((torch.zeros(2, 6),), {}))
    assert model[0].normalized_shape == (6,) and model[0].eps == 1e-3


def test_a_partial_fixes_arguments() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6))
    example = ((torch.zeros(2, 6, 3, 3),), {})
    with pytest.raises(BadInput, match="0: GroupNorm needs num_groups, which a BatchNorm2d does not tell: give a func"):
        swap(model, nn.BatchNorm2d, nn.GroupNorm, example=example)
    assert isinstance(model[0], nn.BatchNorm2d)
    done = swap(model, nn.BatchNorm2d, functools.partial(nn.GroupNorm, 2, eps=0.5), example=example)
    assert model[0].num_groups == 2 and model[0].num_channels == 6 and model[0].eps == 0.5
    assert set(done.changed[0].lost) == {"running_mean", "running_var", "num_batches_tracked"}


def test_shapes_that_do_not_fit_are_said() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    bias = model[0].bias
    done = swap(model, nn.Linear, lambda old: nn.Linear(5, 6), example=((torch.zeros(1, 4),), {}))
    assert done.changed[0].lost == {"weight": "(6, 4) does not fit (6, 5)"}
    assert done.changed[0].fresh == ("weight",) and model[0].bias is bias
    assert "lost weight ((6, 4) does not fit (6, 5)); new weight" in repr(done)


def test_keep_false_leaves_what_the_function_made() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    made = nn.Linear(4, 6)
    weight = made.weight
    done = swap(model, nn.Linear, lambda old: made, example=((torch.zeros(1, 4),), {}), keep=False)
    assert model[0].weight is weight
    assert done.changed[0].lost["weight"] == "not asked to be kept" and set(done.changed[0].fresh) == {"weight", "bias"}


def test_buffers_modes_dtype_and_frozen_weights_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)).bfloat16().eval()
    model[1].running_mean.fill_(3.0)
    model[1].weight.requires_grad_(False)
    model[2].train()
    example = ((torch.zeros(1, 3, 6, 6, dtype=torch.bfloat16),), {})

    class Norm(nn.BatchNorm2d):
        def __init__(self, num_features):
            super().__init__(num_features)
            self.extra = nn.Parameter(torch.zeros(num_features))
            self.count = nn.Buffer(torch.zeros(2, dtype=torch.int64))

        def forward(self, x):
            return super().forward(x)

    done = swap(model, nn.BatchNorm2d, lambda old: Norm(old.num_features), example=example)
    assert model[1].running_mean.eq(3).all() and not model[1].weight.requires_grad and not model[1].training
    assert model[1].extra.dtype == torch.bfloat16 and model[1].count.dtype == torch.int64
    assert done.changed[0].fresh == ("extra", "count")
    assert model[2].training


def test_a_skeleton_on_meta_stays_there() -> None:
    with torch.device("meta"):
        model = Net()
    swap(model, nn.LayerNorm, lambda old: nn.RMSNorm(old.normalized_shape), example=NET)
    swap(model, nn.Linear, same_layer, example=NET, keep=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert isinstance(model.norm, nn.RMSNorm)


def test_modules_without_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).double().eval()
    done = swap(model, nn.ReLU, nn.PReLU)
    assert model[1].weight.dtype == torch.float64 and not model[1].training
    assert done.notes == []  # what has no weights has no other readers


# --- which ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("blocks.*", ["blocks.0.norm", "blocks.1.norm"]),
        ("norm", ["norm"]),
        (["blocks.1.norm", "nor*"], ["blocks.1.norm", "norm"]),
        (lambda path, module: module.eps == 1e-3, ["norm"]),
    ],
)
def test_where(where: object, expected: list[str]) -> None:
    done = swap(Net(), nn.LayerNorm, nn.RMSNorm, where, example=NET)
    assert [change.paths[0] for change in done.changed] == expected


def test_a_path_that_is_something_else_is_said() -> None:
    done = swap(Net(), nn.LayerNorm, nn.RMSNorm, ["norm", "head"], example=NET)
    assert done.left == {"head": "it is a Linear, not a LayerNorm"}


def test_what_nothing_is_called() -> None:
    with pytest.raises(BadInput, match="matches 'block.0.norm'; did you mean 'blocks.0.norm'"):
        swap(Net(), nn.LayerNorm, nn.RMSNorm, "block.0.norm", example=NET)
    with pytest.raises(BadInput, match="`where` is a glob"):
        swap(Net(), nn.LayerNorm, nn.RMSNorm, [3], example=NET)


def test_doing_nothing_is_not_silent() -> None:
    with pytest.warns(UserWarning, match="swap replaced nothing: no GroupNorm was found"):
        done = swap(Net(), nn.GroupNorm, nn.RMSNorm, example=NET)
    assert repr(done) == "nothing was replaced"


def test_shared_modules_are_swapped_once_for_all_paths() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()), shared)
    done = swap(model, nn.Linear, same_layer, where="1.0", example=((torch.zeros(1, 6),), {}))
    assert [change.paths for change in done.changed] == [("0", "1.0", "2")]
    assert model[0] is model[1][0] is model[2] is not shared
    assert "0 = 1.0 = 2" in repr(done)


def test_the_outer_of_two_is_replaced() -> None:
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), nn.Linear(2, 2))
    done = swap(model, nn.Sequential, lambda old: nn.Identity(), where="0*", example=((torch.zeros(1, 2),), {}))
    assert isinstance(model[0], nn.Identity)
    assert done.left == {"0.0": "it is inside 0, which is replaced itself"}


def test_a_wrapper_holds_the_old_module_as_it_was() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.gain * self.inner(x)

    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)).double().train()
    model[1].eval()
    olds, x = list(model), torch.randn(3, 4, dtype=torch.float64)
    before = model(x)
    done = swap(model, nn.Linear, lambda old: Wrapped(old), example=((x,), {}))
    assert torch.equal(model(x), before)
    assert [wrapped.inner for wrapped in model] == olds
    assert not model[1].inner.training and not model[1].training and model[0].training
    assert done.changed[1].lost == {} and done.changed[1].kept == ("weight", "bias")
    assert model[1].gain.dtype == torch.float64


# --- ties -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


TIED = ((torch.zeros(1, 2, dtype=torch.long),), {})


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    swap(model, nn.Linear, same_layer, example=TIED)
    assert model.head.weight is model.embed.weight
    swap(model, (nn.Embedding, nn.Linear), copy.deepcopy, example=TIED)
    assert model.head.weight is model.embed.weight


def test_a_tie_that_would_break_is_refused() -> None:
    model = Tied()
    with pytest.warns(UserWarning, match="replaced nothing: 1 left alone"):
        done = swap(model, nn.Linear, lambda old: nn.Linear(4, 8), example=TIED)
    assert done.left == {"head": "its weight is tied to embed.weight, and the new Linear does not take it over"}
    assert model.head.weight is model.embed.weight
    with pytest.warns(UserWarning, match="replaced nothing"):
        done = swap(model, nn.Linear, same_layer, example=TIED, keep=False)
    assert "head" in done.left


# --- what is refused --------------------------------------------------------------------------------


def test_a_module_whose_weight_another_reads_is_left() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv1d(4, 4, 3, groups=4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((x * self.conv.weight[:, 0]).sum(-1))

    model = Reader()
    example = ((torch.zeros(2, 4, 3),), {})
    with pytest.warns(UserWarning, match="replaced nothing"):
        done = swap(model, nn.Conv1d, copy.deepcopy, example=example)
    assert done.left == {"conv": "the model itself reads its weight directly and would not call the new module"}
    assert len(swap(model, nn.Linear, same_layer, example=example).changed) == 1
    done = swap(model, nn.Conv1d, copy.deepcopy)  # without an example it cannot be known, and that is said
    assert (
        len(done.changed) == 1 and "pass example=(args, kwargs)" in done.notes[0] and "note: no example" in repr(done)
    )


@pytest.mark.parametrize("with_example", [True, False])
def test_torchs_attention_reads_its_output_layer(with_example: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    example = ((torch.zeros(1, 3, 8),), {}) if with_example else None
    done = swap(layer, nn.Linear, same_layer, example=example)
    assert done.left == {
        "self_attn.out_proj": "MultiheadAttention reads its weight directly and would not call the new module"
    }
    assert [change.paths[0] for change in done.changed] == ["linear1", "linear2"]


def test_parametrized_and_hooked_weights_are_left() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    parametrizations.weight_norm(model[0])
    torch.nn.utils.spectral_norm(model[1])
    parametrizations.weight_norm(model[2][0])
    example = ((torch.zeros(1, 4),), {})
    with pytest.warns(UserWarning, match="replaced nothing: 3 left alone"):
        done = swap(model, nn.Linear, same_layer, example=example)
    assert "parametrization" in done.left["0"] and "parametrization" in done.left["2.0"]
    assert done.left["1"] == "SpectralNorm of torch.nn.utils computes its weights: remove it first"
    with pytest.warns(UserWarning, match="replaced nothing"):
        done = swap(model, nn.Sequential, lambda old: nn.Linear(4, 4), where="2", example=example)
    assert "parametrization" in done.left["2"]


def test_a_subclass_may_do_more_unless_its_forward_is_the_same() -> None:
    class Halved(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    class Named(nn.LayerNorm):
        pass

    model = nn.Sequential(Halved(4), Named(4))
    done = swap(model, nn.LayerNorm, nn.RMSNorm, example=((torch.zeros(1, 4),), {}))
    assert done.left == {"0": "Halved has a forward of its own and may do more than LayerNorm: name it as `old`"}
    assert isinstance(model[1], nn.RMSNorm)
    swap(model, Halved, nn.RMSNorm, example=((torch.zeros(1, 4),), {}))
    assert isinstance(model[0], nn.RMSNorm)


def test_the_model_itself_and_what_the_function_declines() -> None:
    with pytest.warns(UserWarning, match="replaced nothing"):
        done = swap(nn.Linear(2, 2), nn.Linear, same_layer, example=((torch.zeros(1, 2),), {}))
    assert "left the model itself: a module cannot be replaced inside itself" in repr(done)
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    example = ((torch.zeros(1, 2),), {})
    done = swap(model, nn.Linear, lambda old: same_layer(old) if old.in_features == 4 else None, example=example)
    assert done.left == {"0": "`new` left it as it is"} and len(done.changed) == 1


def test_hooks_are_warned_about() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda module, args, out: None)
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    with pytest.warns(UserWarning, match="0 had forward hooks and backward hooks, which the new module does not have"):
        done = swap(model, nn.Linear, same_layer, example=((torch.zeros(1, 2),), {}))
    assert len(done.changed) == 1 and len(done.notes) == 1


def test_nothing_is_changed_when_one_cannot_be_made() -> None:
    model = Net()
    before = list(model.modules())

    def only_small(old: nn.Linear) -> nn.Module:
        if old.out_features == 3:
            raise RuntimeError("too small")
        return same_layer(old)

    with pytest.raises(RuntimeError, match="too small"):
        swap(model, nn.Linear, only_small, example=NET)
    assert list(model.modules()) == before


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="`old` is a class of modules or a tuple of them; found 'LayerNorm'"):
        swap(Net(), "LayerNorm", nn.RMSNorm)
    with pytest.raises(
        BadInput, match="`new` is a class of modules or a function of the old module; found an object of RMSNorm"
    ):
        swap(Net(), nn.LayerNorm, nn.RMSNorm(6))
    with pytest.raises(BadInput, match="head: `new` must give a module or None; found an object of int"):
        swap(Net(), nn.Linear, lambda old: 3, where="head", example=NET)
    with pytest.raises(BadInput, match=r"0: MultiheadAttention\(embed_dim=6, num_heads=4.*is not possible"):
        bad = nn.Sequential(nn.Linear(2, 2))
        bad[0].embed_dim, bad[0].num_heads = 6, 4
        swap(bad, nn.Linear, nn.MultiheadAttention, example=((torch.zeros(1, 2),), {}))


# --- models of transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_brings_its_own_example_and_says_the_same(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (2, 5))
    before = model(ids).logits
    done = swap(model, LlamaRMSNorm, nn.RMSNorm)
    assert len(done.changed) == 5 and done.left == {} and done.notes == []
    done = swap(model, nn.Linear, same_layer)
    assert len(done.changed) == 2 * 7 + 1
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
