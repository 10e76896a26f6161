"""Structure: every parameter of the zoo is accounted for, and the answers about known models are right."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from laconic.core.structure import Structure, Use
from laconic.errors import BadInput
from tests.zoo import ZOO, llama_1b_meta, outputs

# Parameters that the forward pass of the zoo's example does not read.
UNUSED = {
    "called_twice": ["never.weight", "never.bias"],
    "wav2vec2": ["wav2vec2.masked_spec_embed"],  # read only while masking, in training
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_of(name: str) -> nn.Module:
    return ZOO[name].build()


@functools.cache
def structure_of(name: str, how: str | None = None) -> Structure:
    model = model_of(name)
    return Structure.build(model, ZOO[name].example(model), how=how)


def uses(name: str, parameter: str) -> tuple[Use, ...]:
    return structure_of(name).parameters[parameter].uses


# --- the whole zoo ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_accounted_for(name: str) -> None:
    structure = structure_of(name)
    assert structure.how == "export", structure.why
    named = dict(model_of(name).named_parameters(remove_duplicate=False))
    assert {n for info in structure.parameters.values() for n in info.names} == set(named)
    for info in structure.parameters.values():
        assert info.shape == tuple(named[info.name].shape)
        assert bool(info.uses) == bool(info.calls)
    assert structure.unused() == UNUSED.get(name, [])


@pytest.mark.parametrize("name", ZOO)
def test_every_use_names_a_module_that_runs(name: str) -> None:
    structure = structure_of(name)
    paths = dict(model_of(name).named_modules())
    for info in structure.parameters.values():
        for use in info.uses:
            assert use.module in paths
            assert structure.calls[use.module] >= 1


@pytest.mark.parametrize("name", ZOO)
def test_ties_are_the_names_of_one_tensor(name: str) -> None:
    structure = structure_of(name)
    assert bool(structure.ties) == ZOO[name].tied
    tensors = dict(model_of(name).named_parameters(remove_duplicate=False))
    for group in structure.ties:
        assert len({id(tensors[n]) for n in group}) == 1
        assert all(structure.name_of(n) == group[0] for n in group)


@pytest.mark.parametrize("name", ZOO)
def test_hooks_say_the_same_as_export(name: str) -> None:
    exported, watched = structure_of(name), structure_of(name, "hooks")
    assert watched.how == "hooks"
    for parameter, info in exported.parameters.items():
        assert watched.parameters[parameter].uses == info.uses
    assert watched.calls == exported.calls
    assert watched.batchnorm_pairs == exported.batchnorm_pairs
    assert watched.chains == exported.chains
    if name != "transformer_encoder":  # hooks don't see into multi_head_attention_forward and say so
        assert watched.norms == exported.norms


def test_hooks_admit_that_they_dont_see_who_reads_a_norm_inside_torchs_attention() -> None:
    structure = structure_of("transformer_encoder", "hooks")
    assert structure.readers("encoder.layers.0.norm1") == ()
    assert "multi_head_attention_forward" in structure.reason("encoder.layers.0.norm1")


@pytest.mark.parametrize("name", ["bert", "llama_tied", "mixtral", "t5", "convnet", "lstm"])
def test_a_meta_model_gives_the_same_answer(name: str) -> None:
    model = copy.deepcopy(model_of(name)).to("meta")
    if ZOO[name].tied:
        model.tie_weights()
    assert Structure.build(model, ZOO[name].example(model)) == structure_of(name)


def test_a_meta_skeleton_with_real_buffers_and_real_inputs() -> None:
    model = copy.deepcopy(model_of("llama"))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(parameter.to("meta")))
    assert not model.model.rotary_emb.inv_freq.is_meta
    example = ZOO["llama"].example(model_of("llama"))
    assert Structure.build(model, example) == structure_of("llama")


@pytest.mark.parametrize("name", ["bert", "mixtral", "convnet", "lstm", "wav2vec2"])
@pytest.mark.parametrize("how", ["export", "hooks"])
def test_the_model_is_left_as_it_was(name: str, how: str) -> None:
    model = ZOO[name].build().train()
    next(model.children()).eval()
    example = ZOO[name].example(model)
    handle = next(model.children()).register_forward_hook(lambda *_: None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    identities = [id(parameter) for parameter in model.parameters()]
    hooks = [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in model.modules()]
    random = torch.get_rng_state()

    Structure.build(model, example, how=how)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == training
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert hooks == [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), random)
    handle.remove()
    fresh = ZOO[name].build()
    pairs = zip(outputs(model.eval(), example), outputs(fresh, example), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_billion_parameters_on_meta_take_seconds() -> None:
    model, example = llama_1b_meta()
    began = time.process_time()  # whatever else the machine does
    structure = Structure.build(model, example)
    assert time.process_time() - began < 15
    assert structure.how == "export"
    assert structure.unused() == []
    assert structure.ties == [("model.embed_tokens.weight", "lm_head.weight")]
    assert structure.blocks == tuple(f"model.layers.{index}" for index in range(16))
    assert sum(readers.complete for readers in structure.norms.values()) == 32


# --- uses -------------------------------------------------------------------------------------------


def test_conv1d_of_gpt2_is_a_transposed_linear() -> None:
    path = "transformer.h.0.attn.c_attn"
    assert uses("gpt2", f"{path}.weight") == (Use(path, "linear", True, "weight"),)
    assert uses("gpt2", f"{path}.bias") == (Use(path, "linear", False, "bias"),)


def test_a_tied_embedding_is_read_as_embedding_and_as_linear() -> None:
    info = structure_of("llama_tied").parameters["model.embed_tokens.weight"]
    assert info.names == ("model.embed_tokens.weight", "lm_head.weight")
    assert info.calls == 2
    assert info.uses == (
        Use("model.embed_tokens", "embedding", False, "weight"),
        Use("lm_head", "linear", False, "weight"),
    )
    assert "lm_head.weight" not in structure_of("llama_tied").parameters
    with pytest.raises(KeyError, match="no parameter is called 'lm_head.bias'"):
        structure_of("llama_tied").name_of("lm_head.bias")


def test_t5_reads_its_shared_embedding_three_times() -> None:
    info = structure_of("t5").parameters["shared.weight"]
    assert [use.op for use in info.uses] == ["embedding", "embedding", "linear"]
    assert len(info.names) == 4


@pytest.mark.parametrize("how", ["export", "hooks"])
def test_attention_reads_out_proj_itself(how: str) -> None:
    structure = structure_of("multihead_attention", how)
    parameters = structure.parameters
    assert parameters["attention.out_proj.weight"].uses == (Use("attention", "linear", False, "weight"),)
    assert parameters["attention.out_proj.bias"].uses == (Use("attention", "linear", False, "bias"),)
    assert parameters["attention.in_proj_weight"].uses == (Use("attention", "linear", False, "weight"),)
    assert structure.calls["attention.out_proj"] == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_fused_experts(name: str) -> None:
    path = "model.layers.0.mlp.experts"
    for parameter in ("gate_up_proj", "down_proj"):
        assert uses(name, f"{path}.{parameter}") == (Use(path, "experts", False, "weight"),)
    assert [use.op for use in uses(name, "model.layers.0.mlp.gate.weight")] == ["linear"]


def test_mamba_reads_the_weights_of_its_submodules_itself() -> None:
    path = "backbone.layers.0.mixer"
    assert uses("mamba", f"{path}.conv1d.weight") == (Use(path, "conv", False, "weight"),)
    assert uses("mamba", f"{path}.dt_proj.weight") == (Use(path, "matmul", False, "weight"),)
    assert uses("mamba", f"{path}.in_proj.weight") == (Use(f"{path}.in_proj", "linear", False, "weight"),)
    assert uses("mamba", f"{path}.A_log") == (Use(path, "other:exp", False, "other"),)


def test_lstm() -> None:
    assert uses("lstm", "lstm.weight_ih_l0") == (Use("lstm", "rnn", False, "weight"),)
    assert uses("lstm", "lstm.bias_hh_l1_reverse") == (Use("lstm", "rnn", False, "bias"),)
    assert uses("lstm", "embed.weight") == (Use("embed", "embedding", False, "weight"),)


def test_raw_parameters() -> None:
    assert uses("raw_parameters", "first") == (Use("", "linear", True, "weight"),)
    assert uses("raw_parameters", "scale") == (Use("", "other:mul", False, "other"),)
    assert uses("raw_parameters", "cube") == (Use("", "other:einsum", False, "other"),)
    assert uses("raw_parameters", "rows.0") == (Use("", "linear", True, "weight"),)


def test_a_module_called_twice_and_one_never_called() -> None:
    structure = structure_of("called_twice")
    assert structure.calls["shared"] == 2
    assert structure.calls["never"] == 0
    info = structure.parameters["shared.weight"]
    assert info.uses == (Use("shared", "linear", False, "weight"),)
    assert info.calls == 2


def test_weight_normalization_reads_its_two_halves() -> None:
    path = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight"
    for half in ("original0", "original1"):
        (use,) = uses("wav2vec2", f"{path}.{half}")
        assert use.op == "other:_weight_norm"


def test_handwritten_norms_are_norms() -> None:
    for name, parameter in (
        ("llama", "model.norm.weight"),
        ("gemma2", "model.norm.weight"),
        ("t5", "encoder.final_layer_norm.weight"),
    ):
        assert uses(name, parameter) == (Use(parameter.removesuffix(".weight"), "norm", False, "weight"),)


def test_operations_of_a_module() -> None:
    assert structure_of("llama").ops["lm_head"] == ("linear",)
    assert structure_of("gpt2").ops["transformer.h.0.attn.c_attn"] == ("view", "addmm", "view")
    assert structure_of("gemma2").ops["model.embed_tokens"] == ("embedding", "mul")


# --- norms and their readers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral"])
def test_readers_of_llamas_norms(name: str) -> None:
    structure = structure_of(name)
    attention = "model.layers.1.self_attn"
    assert structure.readers("model.layers.1.input_layernorm") == tuple(
        f"{attention}.{projection}" for projection in ("q_proj", "k_proj", "v_proj")
    )
    if name != "mixtral":
        mlp = "model.layers.0.mlp"
        assert structure.readers("model.layers.0.post_attention_layernorm") == (
            f"{mlp}.gate_proj",
            f"{mlp}.up_proj",
        )


def test_a_tied_head_is_no_reader_that_can_be_scaled() -> None:
    assert structure_of("llama").readers("model.norm") == ("lm_head",)
    tied = structure_of("llama_tied")
    assert tied.readers("model.norm") == ()
    assert tied.norms["model.norm"].modules == ("lm_head",)
    assert "model.embed_tokens.weight" in tied.reason("model.norm")


def test_router_and_experts_read_the_same_norm() -> None:
    readers = structure_of("mixtral").norms["model.layers.0.post_attention_layernorm"]
    assert readers.complete
    assert readers.weights == (
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
    )


def test_post_norm_of_bert_also_goes_to_the_residual() -> None:
    structure = structure_of("bert")
    norm = "bert.encoder.layer.0.attention.output.LayerNorm"
    assert structure.readers(norm) == ()
    assert structure.norms[norm].modules == ("bert.encoder.layer.0.intermediate.dense",)
    assert structure.reason(norm) == "its output also goes to add in bert.encoder.layer.0.output"
    last = "bert.encoder.layer.1.output.LayerNorm"
    assert structure.readers(last) == ("cls.predictions.transform.dense",)
    assert "not a norm" in structure.reason("bert.encoder.layer.0")


def test_gemma_adds_one_to_its_weight() -> None:
    norms = structure_of("gemma2").norms
    assert {readers.offset for readers in norms.values()} == {1.0}
    assert {readers.offset for readers in structure_of("llama").norms.values()} == {0.0}


def test_a_returned_norm_cant_be_scaled() -> None:
    assert "the model returns its output" in structure_of("t5").reason("encoder.final_layer_norm")


def _scale(model: nn.Module, structure: Structure, norm: str) -> None:
    """Scale the norm's channels by a random vector and undo it in its readers."""
    parameters = dict(model.named_parameters())
    found = structure.norms[norm]
    weight = parameters[f"{norm}.weight"]
    scale = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    with torch.no_grad():
        weight.copy_((weight + found.offset) * scale - found.offset)
        if f"{norm}.bias" in parameters:
            parameters[f"{norm}.bias"].mul_(scale)
        for name in found.weights:
            transposed = structure.parameters[name].uses[0].transposed
            parameters[name].div_(scale[:, None] if transposed else scale)


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma2", "gpt2", "opt", "mixtral", "qwen2_moe", "mamba", "t5", "whisper", "vit", "swin"]
    + ["convnext", "clip", "wav2vec2", "bert", "transformer_encoder"],
)
def test_a_scale_really_moves_from_every_complete_norm_into_its_readers(name: str) -> None:
    structure, model = structure_of(name), model_of(name)
    example = ZOO[name].example(model)
    expected = outputs(model, example)
    norms = [norm for norm, readers in structure.norms.items() if readers.complete]
    assert norms
    model = copy.deepcopy(model)
    for norm in norms:
        _scale(model, structure, norm)
    for got, wanted in zip(outputs(model, example), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["llama_tied", "bert", "bart", "gemma2"])
def test_a_scale_does_not_move_where_the_structure_says_so(name: str) -> None:
    """The refusals are needed: scaling all the same changes what the model says."""
    structure, model = structure_of(name), model_of(name)
    example = ZOO[name].example(model)
    expected = outputs(model, example)
    norms = [norm for norm, readers in structure.norms.items() if not readers.complete]
    assert norms
    for norm in norms:
        scaled = copy.deepcopy(model)
        _scale(scaled, structure, norm)
        got = outputs(scaled, example)
        assert not all(
            torch.allclose(one, other, rtol=2e-4, atol=2e-5) for one, other in zip(got, expected, strict=True)
        )


# --- batch norms ------------------------------------------------------------------------------------


def test_batch_norm_pairs_of_the_conv_net() -> None:
    pairs = structure_of("convnet").batchnorm_pairs
    assert pairs == [
        ("stem.0", "stem.1"),
        ("depthwise", "bn"),
        ("down", "down_bn"),
        ("hidden", "hidden_bn"),
    ]  # not ("both", "both_bn"): what lies between them also goes to the residual sum


def test_every_batch_norm_of_the_resnet_folds() -> None:
    norms = [p for p, m in model_of("resnet").named_modules() if isinstance(m, nn.BatchNorm2d)]
    pairs = structure_of("resnet").batchnorm_pairs
    assert sorted(norm for _, norm in pairs) == sorted(norms)
    assert all(conv == norm.replace("normalization", "convolution") for conv, norm in pairs)


class InPlace(nn.Module):
    """What the first convolution makes is changed in place before its batch norm sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.first_bn = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.second_bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, 4, height, width)."""
        x = self.first_bn(self.relu(self.first(x)))
        y = self.second_bn(self.second(x))
        y += x
        return self.relu(y)


@pytest.mark.parametrize("how", ["export", "hooks"])
def test_what_is_changed_in_place_is_not_a_pair(how: str) -> None:
    structure = Structure.build(InPlace(), ((torch.randn(1, 3, 4, 4),), {}), how=how)
    assert structure.batchnorm_pairs == [("second", "second_bn")]


class OtherAxes(nn.Module):
    """Batch norms over an axis that is as long as the output channels of the layer before it, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.tokens_bn = nn.Linear(8, 6), nn.BatchNorm1d(6)  # on (batch, 6 tokens, 8)
        self.rows, self.rows_bn = nn.Linear(6, 6), nn.BatchNorm1d(6)  # on (rows, 6)
        self.picture, self.picture_bn = nn.Conv2d(3, 6, 1), nn.BatchNorm1d(6)  # on (3, 6, 5), without a batch
        self.series, self.series_bn = nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)  # on (batch, 3, 5)

    def forward(self, x: Tensor, picture: Tensor, series: Tensor) -> tuple[Tensor, ...]:
        """(batch, 6, 8), (3, 6, 5), (batch, 3, 5) -> what each batch norm makes."""
        tokens = self.tokens_bn(self.tokens(x))
        rows = self.rows_bn(self.rows(tokens.flatten(0, 1)))
        return rows, self.picture_bn(self.picture(picture)), self.series_bn(self.series(series))


@pytest.mark.parametrize("how", ["export", "hooks"])
def test_a_batch_norm_over_another_axis_is_not_a_pair(how: str) -> None:
    inputs = (torch.randn(2, 6, 8), torch.randn(3, 6, 5), torch.randn(2, 3, 5))
    structure = Structure.build(OtherAxes(), (inputs, {}), how=how)
    assert structure.batchnorm_pairs == [("rows", "rows_bn"), ("series", "series_bn")]


# --- blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("bert", "bert.encoder.layer"),
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("t5", "decoder.block"),
        ("mamba", "backbone.layers"),
        ("vit", "vit.layers"),
        ("transformer_encoder", "encoder.layers"),
    ],
)
def test_blocks(name: str, blocks: str) -> None:
    assert structure_of(name).blocks == (f"{blocks}.0", f"{blocks}.1")


def test_both_chains_of_an_encoder_and_a_decoder() -> None:
    assert structure_of("bart").chains == (
        ("model.encoder.layers.0", "model.encoder.layers.1"),
        ("model.decoder.layers.0", "model.decoder.layers.1"),
    )


def test_models_without_blocks() -> None:
    assert structure_of("lstm").blocks == ()
    assert structure_of("called_twice").blocks == ()


class Branches(nn.Module):
    """Two heads on the same input: a ModuleList, but no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the heads."""
        return sum(head(x) for head in self.heads)


def test_parallel_branches_are_no_blocks() -> None:
    assert Structure.build(Branches(), ((torch.randn(2, 8),), {})).chains == ()


def test_a_plain_sequential_of_equal_layers_is_a_chain() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    assert Structure.build(model, ((torch.randn(2, 8),), {})).blocks == ("0", "1", "2")


# --- where export or fake tensors fail --------------------------------------------------------------


@dataclass
class Box:
    """A type that torch.export does not know."""

    inside: Tensor


class Boxed(nn.Module):
    """A norm, a linear layer and a batch norm; takes and returns boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 12)
        self.bn = nn.BatchNorm1d(12)

    def forward(self, x: Box | Tensor) -> Box:
        """(batch, 8) -> (batch, 12)."""
        h = self.norm(x.inside if isinstance(x, Box) else x)
        return Box(self.bn(self.linear(h)))


@pytest.mark.parametrize("boxed", [False, True])
def test_hooks_where_export_fails(boxed: bool) -> None:
    x = torch.randn(4, 8)
    structure = Structure.build(Boxed(), ((Box(x) if boxed else x,), {}))
    assert structure.how == ("hooks" if boxed else "export")
    assert structure.why.startswith("export: " if boxed else "")
    assert structure.readers("norm") == ("linear",)
    assert structure.batchnorm_pairs == [("linear", "bn")]
    assert structure.unused() == []


def test_a_model_that_returns_a_cache_is_exported() -> None:
    args, kwargs = ZOO["llama"].example(model_of("llama"))
    structure = Structure.build(model_of("llama"), (args, {**kwargs, "use_cache": True}))
    assert structure.how == "export"
    assert structure.parameters == structure_of("llama").parameters
    assert structure.norms == structure_of("llama").norms


class DependsOnValues(nn.Module):
    """Sends the rows to one of two layers, one at a time, by their values; a batch norm counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8)."""
        rows = [self.layers[int(row.sum().item() > 0)](row) for row in x]
        return self.bn(torch.stack(rows))


def test_a_forward_that_depends_on_values_runs_once_for_real_and_is_put_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = DependsOnValues().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    x = torch.linspace(-1, 1, 32).view(4, 8)
    structure = Structure.build(model, ((x,), {}))
    assert structure.how == "hooks"
    assert structure.why.endswith("so it was run once")
    assert capsys.readouterr() == ("", "")
    assert structure.calls["layers.0"] == structure.calls["layers.1"] == 2
    assert structure.unused() == []
    assert model.training and model.bn.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_such_a_forward_on_meta_is_refused() -> None:
    with pytest.raises(BadInput, match="DependsOnValues can't be traced on the example inputs: export: "):
        Structure.build(DependsOnValues().to("meta"), ((torch.randn(4, 8, device="meta"),), {}))


def test_a_forward_that_fails_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"Linear: its forward fails on the example inputs: RuntimeError: mat1"
    ):
        Structure.build(nn.Linear(8, 8), ((torch.randn(4, 9),), {}))


def test_a_lazy_layer_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"^0\.weight is lazy"):
        Structure.build(nn.Sequential(nn.LazyLinear(4)), ((torch.randn(4, 9),), {}))


@pytest.mark.parametrize("how", [None, "hooks"])
def test_experts_that_are_looped_over(how: str | None) -> None:
    """transformers' plain loop over experts selects slices `W[expert]` by data."""
    model = ZOO["mixtral"].build()
    model.set_experts_implementation("eager")
    structure = Structure.build(model, ZOO["mixtral"].example(model), how=how)
    for parameter in ("gate_up_proj", "down_proj"):
        path = "model.layers.0.mlp.experts"
        assert structure.parameters[f"{path}.{parameter}"].uses == (Use(path, "experts", False, "weight"),)
    assert structure.unused() == []


class Dropped(nn.Module):
    """Computes something that it does not return."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Linear(8, 8)
        self.dropped = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8)."""
        self.dropped(x)
        return self.kept(x)


@pytest.mark.parametrize("how", ["export", "hooks"])
def test_reads_whose_result_is_dropped_are_still_reads(how: str) -> None:
    structure = Structure.build(Dropped(), ((torch.randn(2, 8),), {}), how=how)
    assert structure.unused() == []
    assert structure.parameters["dropped.weight"].uses == (Use("dropped", "linear", False, "weight"),)


class Precise(nn.Module):
    """A region without autocast (a graph within the exported graph), casts and chunks of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8))
        self.turned = nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8)."""
        with torch.autocast("cpu", enabled=False):
            x = self.inner(x.float())
        first, second = self.weight.to(torch.float32).chunk(2)
        return torch.relu(x @ first.t()) + nn.functional.linear(x, second) + torch.matmul(x, self.turned)


@pytest.mark.parametrize("how", ["export", "hooks"])
def test_reads_inside_regions_and_through_casts_and_chunks(how: str) -> None:
    structure = Structure.build(Precise(), ((torch.randn(2, 8),), {}), how=how)
    assert structure.parameters["inner.weight"].uses == (Use("inner", "linear", False, "weight"),)
    assert structure.parameters["weight"].uses == (Use("", "linear", False, "weight"),)
    assert structure.parameters["weight"].calls == 2
    assert structure.parameters["turned"].uses == (Use("", "linear", True, "weight"),)


class Reshaped(nn.Module):
    """Products with a weight that is not used as it is stored, after a norm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm = nn.LayerNorm(8)
        self.weight = nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 8 or 4)."""
        weight = self.weight.view(8, 8) if self.how == "view" else self.weight[:, 8:]
        return nn.functional.linear(self.norm(x), weight)


@pytest.mark.parametrize("how", ["export", "hooks"])
@pytest.mark.parametrize(("change", "op"), [("view", "matmul"), ("slice", "linear")])
def test_a_weight_that_is_not_used_as_it_is_stored_is_no_reader(how: str, change: str, op: str) -> None:
    structure = Structure.build(Reshaped(change), ((torch.randn(2, 8),), {}), how=how)
    assert structure.parameters["weight"].uses == (Use("", op, False, "weight"),)
    assert structure.readers("norm") == ()
    assert structure.reason("norm") == "its output also goes to linear in the model"


def test_norms_that_share_their_weight_cant_be_scaled() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    structure = Structure.build(model, ((torch.randn(2, 8),), {}))
    assert structure.readers("0") == structure.readers("2") == ()
    assert structure.reason("0") == "0.weight, its own, is read in other places too"


def test_one_storage_under_two_parameters_is_a_tie() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = nn.Parameter(model[0].weight.data)
    structure = Structure.build(model, ((torch.randn(2, 8),), {}))
    assert structure.ties == [("0.weight", "2.weight")]
    assert [use.module for use in structure.parameters["0.weight"].uses] == ["0", "2"]


def test_buffers() -> None:
    buffers = structure_of("llama").buffers
    assert not buffers["model.rotary_emb.inv_freq"].persistent
    running = structure_of("convnet").buffers["bn.running_mean"]
    assert running.persistent and running.shape == (16,) and running.dtype == torch.float32


def test_how_is_checked() -> None:
    with pytest.raises(ValueError, match="'guess'"):
        Structure.build(nn.Linear(2, 2), ((torch.randn(1, 2),), {}), how="guess")


def test_describe() -> None:
    text = structure_of("called_twice").describe()
    assert "8 parameters, 3,864 elements, read by export" in text
    assert "called 2 times: shared" in text
    assert "never read: never.weight" in text
    assert "tied: transformer.wte.weight = lm_head.weight" in structure_of("gpt2").describe()
