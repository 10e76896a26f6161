"""Packed modules against the float ones with the dequantized weight put in: every base, subclass and use."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.nn import (
    PackedParameterSpec,
    declare,
    declare_alias,
    fill,
    is_packed,
    matrix_view,
    pack_tensors,
    packed_specs,
    restore_view,
    storage_names,
    unpack_parameter,
)
from laconic.nn.packed import Packed, op_of
from laconic.numerics import Binary, Int, Levels, Scale, Scheme, Ternary, affine_params, quantize

INT8 = Scheme(Int(8), Scale("group", group=16, dtype="float16"), zero="int")
SCHEMES = [
    INT8,
    Scheme(Int(8), Scale("channel", dtype="float32")),
    Scheme(Int(5), Scale("tensor", dtype="float16"), zero="real"),
    Scheme(Int(4), Scale("group", group=16, dtype="bfloat16"), zero="int"),
    Scheme(Int(3), Scale("channel", dtype="float16"), zero="real"),
    Scheme(Levels("nf4"), Scale("group", group=16, dtype="float16")),
    Scheme(Ternary(), Scale("channel", dtype="float16", rule="absmean")),
    Scheme(Binary(), Scale("group", group=16, dtype="bfloat16", rule="absmean")),
]


def pack(module: nn.Module, name: str = "weight", scheme: Scheme = INT8, view: str | None = None) -> Tensor:
    """Pack a parameter in place by rounding, as the passes do; returns the value that it now stands for."""
    value = module._parameters[name].detach()
    if view is None:
        op = op_of(module, name)
        transposed = op == "linear" and not isinstance(module, nn.Linear)
        view = "transposed" if transposed else "last" if op in ("parameter", "experts") else "rows"
    spec = PackedParameterSpec(scheme, tuple(value.shape), view)
    matrix = matrix_view(value, view).float().contiguous()
    scale, zero = affine_params(matrix, scheme, name)
    tensors = pack_tensors(spec, quantize(matrix, scale, zero, scheme), scale, zero)
    declare(module, name, spec)
    fill(module, name, tensors)
    return unpack_parameter(module, name)


def twin(module: nn.Module, scheme: Scheme = INT8, *names: str) -> nn.Module:
    """Pack `module` in place; returns a float copy with the values that the packed one stands for."""
    other = copy.deepcopy(module)
    for name in names or ("weight",):
        value = pack(module, name, scheme)
        with torch.no_grad():
            getattr(other, name).copy_(value)
    return other


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- linear, embedding, convolution -------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(scheme, bias):
    packed = nn.Linear(21, 9, bias=bias)
    floats = twin(packed, scheme)
    assert isinstance(packed, nn.Linear) and is_packed(packed) and type(packed).__name__ == "PackedLinear"
    for shape in ((21,), (4, 21), (2, 3, 21), (0, 21)):
        assert torch.equal(packed(noise(*shape)), floats(noise(*shape)))
    assert torch.equal(packed.weight, floats.weight)
    assert str(scheme) in repr(packed) and "in_features=21" in repr(packed)


def test_linear_refuses_another_width():
    """The words of a row fit several widths: without the check, 20 features would be read as 21."""
    packed = nn.Linear(21, 9)
    pack(packed)
    for width in (20, 22):
        with pytest.raises(RuntimeError, match=rf"takes 21 features and got an input of shape \(4, {width}\)"):
            packed(noise(4, width))


def test_gpt2_conv1d():
    transformers = pytest.importorskip("transformers")
    packed = transformers.pytorch_utils.Conv1D(9, 21)
    floats = twin(packed)
    assert packed._packed["weight"].view == "transposed" and packed._packed["weight"].matrix == (9, 21)
    torch.testing.assert_close(packed(noise(2, 3, 21)), floats(noise(2, 3, 21)))
    assert torch.equal(packed.weight, floats.weight) and packed.weight.shape == (21, 9)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_embedding(scheme):
    packed = nn.Embedding(13, 10, padding_idx=0)
    floats = twin(packed, scheme)
    ids = torch.tensor([[0, 12, 3], [3, 3, 7]])
    assert torch.equal(packed(ids), floats(ids))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        packed(torch.tensor([-1]))


def test_embedding_that_rescales_itself_is_dequantized():
    """`max_norm` changes the weight in the forward: no op does that, and the packed weight cannot change."""
    module = nn.Embedding(13, 10, max_norm=1.0)
    assert op_of(module, "weight") == "parameter"


class Scaled(nn.Embedding):
    """Gemma's: the result times a factor."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Offset(nn.Embedding):
    """OPT's learned positions: the numbers shifted by two."""

    def forward(self, input: Tensor, past: int = 0) -> Tensor:
        return super().forward(input + 2 + past)


class Clipped(nn.Linear):
    """A linear layer that does more before and after, and looks at its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-1, 1)) + self.weight.mean()


class CausalConv(nn.Conv1d):
    """Pads on the left and calls torch's inner method."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (2, 0)))


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: Scaled(9, 6), (torch.tensor([[1, 8]]),)),
        (lambda: Offset(9, 6), (torch.tensor([[1, 3]]), 1)),
        (lambda: Clipped(12, 6), (noise(3, 12),)),
        (lambda: CausalConv(4, 6, 3), (noise(2, 4, 11),)),
    ],
)
def test_subclasses_keep_what_they_do(make, arguments, monkeypatch):
    """Equal to the float subclass, and through the op: the weight is not dequantized as a whole."""
    packed = make()
    floats = twin(packed)
    torch.testing.assert_close(packed(*arguments), floats(*arguments), rtol=0, atol=1e-6)
    assert isinstance(packed, type(floats)) and op_of(packed, "weight") != "parameter"
    if not isinstance(packed, Clipped):
        monkeypatch.setattr(type(packed), "weight", property(lambda self: pytest.fail("dequantized")))
        packed(*arguments)


def test_subclass_whose_forward_does_not_call_up():
    """It reads `self.weight`, and gets the dequantized one."""

    class Normalised(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, F.normalize(self.weight, dim=1), self.bias)

    packed = Normalised(12, 6)
    floats = twin(packed)
    assert torch.equal(packed(noise(3, 12)), floats(noise(3, 12)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("dims", [1, 2])
def test_convolution_padding(mode, padding, dims):
    make = (nn.Conv1d, nn.Conv2d)[dims - 1]
    packed = make(4, 6, 3, padding=padding, padding_mode=mode, groups=2, dilation=2)
    floats = twin(packed)
    for batch in ((2,), ()):
        x = noise(*batch, 4, *[9, 8][:dims])
        assert torch.equal(packed(x), floats(x))


def test_convolution_with_even_kernel_and_same_padding():
    packed = nn.Conv2d(3, 4, (2, 5), padding="same", bias=False)
    floats = twin(packed)
    torch.testing.assert_close(packed(noise(1, 3, 6, 7)), floats(noise(1, 3, 6, 7)))


def test_convolution_stride():
    packed = nn.Conv2d(3, 4, 3, stride=(2, 1), padding=(1, 0))
    floats = twin(packed)
    assert torch.equal(packed(noise(2, 3, 9, 9)), floats(noise(2, 3, 9, 9)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)), (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
     (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)), (lambda: nn.Bilinear(4, 4, 3), None),
     (lambda: nn.EmbeddingBag(9, 6), None)],
)  # fmt: skip
def test_modules_without_an_op_are_dequantized_on_access(make, shape):
    packed = make()
    assert op_of(packed, "weight") == "parameter"
    floats = twin(packed)
    if isinstance(packed, nn.Bilinear):
        arguments = (noise(2, 4), noise(2, 4, seed=1))
    else:
        arguments = (torch.tensor([[1, 2], [8, 0]]),) if shape is None else (noise(*shape),)
    assert torch.equal(packed(*arguments), floats(*arguments))


# --- modules that read their own parameters -----------------------------------------------------------------


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_recurrent(make):
    packed = make(10, 12, num_layers=2, bidirectional=True, batch_first=True).eval()
    names = [name for name, parameter in packed.named_parameters() if parameter.ndim == 2]
    floats = twin(packed, INT8, *names)
    found, expected = packed(noise(2, 5, 10)), floats(noise(2, 5, 10))
    assert all(map(torch.equal, packed._flat_weights, floats._flat_weights))
    torch.testing.assert_close(found, expected)
    again = copy.deepcopy(packed).to(torch.float64).to(torch.float32)
    assert torch.equal(again(noise(2, 5, 10))[0], found[0])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"kdim": 20, "vdim": 28}])
def test_multihead_attention(sizes):
    packed = nn.MultiheadAttention(24, 4, batch_first=True, **sizes).eval()
    floats = copy.deepcopy(packed)
    for name, parameter in list(packed.named_parameters(recurse=False)):
        if parameter.ndim == 2:
            getattr(floats, name).copy_(pack(packed, name))
    floats.out_proj.weight.copy_(pack(packed.out_proj))
    key, value = noise(2, 5, sizes.get("kdim", 24), seed=1), noise(2, 5, sizes.get("vdim", 24), seed=2)
    for need in (True, False):
        found, expected = (m(noise(2, 3, 24), key, value, need_weights=need) for m in (packed, floats))
        torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(norm_first):
    """In eval mode without gradients torch takes a fused path, which reads its parts' weights itself."""
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, norm_first=norm_first)
    packed = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    floats = copy.deepcopy(packed)
    for (_, module), (_, other) in zip(packed.named_modules(), floats.named_modules(), strict=True):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 2:
                getattr(other, name).copy_(pack(module, name))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for options in ({}, {"src_key_padding_mask": mask}):
        torch.testing.assert_close(packed(noise(2, 5, 24), **options), floats(noise(2, 5, 24), **options))
    with torch.enable_grad():  # the other path
        torch.testing.assert_close(packed(noise(2, 5, 24)), floats(noise(2, 5, 24)))


def test_parametrized_parameter():
    """`weight_norm` keeps its parts in a list of parametrizations; they are packed there."""
    module = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    other = copy.deepcopy(module)
    value = pack(module.parametrizations.weight, "original1", view="last")
    with torch.no_grad():
        other.parametrizations.weight.original1.copy_(value)
    assert torch.equal(module(noise(2, 4, 9)), other(noise(2, 4, 9)))


def test_raw_parameter_of_any_shape():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.cube = nn.Parameter(torch.randn(2, 5, 7))

        def forward(self, x):
            return torch.einsum("bi,eij->bej", x, self.cube)

    packed = Raw()
    floats = twin(packed, INT8, "cube")
    assert torch.equal(packed(noise(3, 5)), floats(noise(3, 5)))
    assert [name for name, _ in packed.named_parameters()] == ["cube_packed", "cube_zero_point", "cube_shape"]


def test_two_parameters_of_one_module():
    """Packing a second parameter keeps the op of the first."""
    module = nn.Linear(12, 6)
    module.register_parameter("extra", nn.Parameter(torch.randn(3, 8)))
    floats = twin(module, INT8, "weight", "extra")
    assert type(module).__mro__[1] is Packed and type(module).__name__ == "PackedLinear"
    assert torch.equal(module(noise(2, 12)), floats(noise(2, 12)))
    assert torch.equal(module.extra, floats.extra) and set(packed_specs(module)) == {"weight", "extra"}


# --- experts ------------------------------------------------------------------------------------------------


def experts(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    if kind == "mixtral":
        config = transformers.MixtralConfig(**common, intermediate_size=20, num_local_experts=3, num_key_value_heads=2)
        module = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
    else:
        config = transformers.Qwen2MoeConfig(**common, moe_intermediate_size=20, num_experts=3)
        module = transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)])
@torch.no_grad()
def test_experts(kind, names):
    """All of them, or one of the two weights, packed."""
    packed = experts(kind)
    assert all(op_of(packed, name) == "experts" for name in names)
    original = copy.deepcopy(packed)
    floats = twin(packed, INT8, *names)
    x = noise(6, 24)
    index = torch.tensor([[0, 2], [2, 0], [0, 0], [2, 2], [0, 2], [2, 0]])  # the second one gets nothing
    weights = torch.rand(6, 2)
    found = packed(x, index, weights)
    torch.testing.assert_close(found, floats(x, index, weights))
    exact = original(x, index, weights)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()
    assert packed(x[:0], index[:0], weights[:0]).shape == (0, 24)


# --- types, devices, copies, ties ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to"])
def test_casts_leave_what_is_stored_alone(scheme, cast):
    module = nn.Sequential(nn.Linear(16, 8), nn.Embedding(5, 16))
    for part in module:
        pack(part, scheme=scheme)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if cast == "to":
        module.to(torch.bfloat16)
    else:
        getattr(module, cast)()
    dtype = {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    after = module.state_dict()
    for name, tensor in after.items():
        if name == "0.bias":
            assert tensor.dtype == dtype
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert module[0](noise(2, 16).to(dtype)).dtype == dtype
    assert module[0].weight.dtype == dtype and module[1](torch.tensor([1])).dtype == dtype
    module.float()
    assert module[0](noise(2, 16)).dtype == torch.float32


def test_casting_to_half_and_back_loses_nothing():
    module = nn.Linear(16, 8, bias=False)
    floats = twin(module, SCHEMES[1])
    module.half().bfloat16().float()
    assert torch.equal(module(noise(2, 16)), floats(noise(2, 16)))


def test_the_model_still_tells_its_type():
    """`next(p for p in parameters if floating)` is how transformers finds out; a scale must not be found."""
    module = nn.Sequential(nn.Linear(16, 8))
    pack(module[0], scheme=SCHEMES[0])
    assert {p.dtype for p in module.parameters() if p.is_floating_point()} == {torch.float32}
    assert not any(p.requires_grad for n, p in module.named_parameters() if n != "0.bias")


def test_meta_and_to_empty():
    with torch.device("meta"):
        module = nn.Linear(16, 8)
    declare(module, "weight", PackedParameterSpec(INT8, (8, 16)))
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert module(torch.empty(3, 16, device="meta")).shape == (3, 8)
    module.to_empty(device="cpu")
    assert module.weight_scale.dtype == torch.float16 and not module.weight_scale.is_meta


def test_deepcopy_is_apart():
    module = nn.Linear(16, 8)
    floats = twin(module)
    other = copy.deepcopy(module)
    assert torch.equal(other(noise(2, 16)), floats(noise(2, 16)))
    other.weight_scale.zero_()
    assert torch.equal(module(noise(2, 16)), floats(noise(2, 16)))


def test_state_dict_round_trip():
    module = nn.Sequential(nn.Linear(16, 8))
    pack(module[0])
    spec = module[0]._packed["weight"]
    names = storage_names("0.weight", spec)
    assert set(module.state_dict()) == {*names.values(), "0.bias"}
    other = nn.Sequential(nn.Linear(16, 8))
    declare(other[0], "weight", spec)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(noise(2, 16)), other(noise(2, 16)))


class Tied(nn.Module):
    """An embedding whose weight is also that of the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("change", ["nothing", "double", "half", "deepcopy"])
def test_a_tie_is_one_set_of_tensors(change):
    model = Tied()
    value = pack(model.embed)
    declare_alias(model.head, "weight", model.embed, "weight")
    if change == "double":
        model.to(torch.float64).to(torch.float32)
    elif change == "half":
        model.half().float()
    elif change == "deepcopy":
        model = copy.deepcopy(model)
    ids = torch.tensor([[1, 2, 10]])
    assert torch.equal(model(ids), F.linear(F.embedding(ids, value), value))
    assert not list(model.head.parameters()) and not list(model.head.buffers())
    assert set(packed_specs(model)) == {"embed.weight"}
    model.embed.weight_scale.mul_(2)
    assert torch.equal(model.head.weight, 2 * value)


def test_alias_of_itself_is_nothing():
    module = nn.Linear(16, 8)
    pack(module)
    declare_alias(module, "weight", module, "weight")
    assert set(packed_specs(module)) == {"weight"}


def test_gradient_reaches_the_input_and_the_bias():
    module = nn.Linear(16, 8)
    floats = twin(module)
    results = []
    for each in (module, floats):
        x = noise(3, 16).requires_grad_()
        each(x).square().sum().backward()
        results.append((x.grad, each.bias.grad))
    torch.testing.assert_close(*results)


# --- what is refused ----------------------------------------------------------------------------------------


def test_declare_refuses_what_does_not_fit():
    module = nn.Linear(16, 8, bias=False)
    with pytest.raises(ValueError, match="Linear has no parameter 'wait' to pack"):
        declare(module, "wait", PackedParameterSpec(INT8, (8, 16)))
    with pytest.raises(ValueError, match="has no parameter 'bias'"):
        declare(module, "bias", PackedParameterSpec(INT8, (8,)))
    with pytest.raises(ValueError, match=r"weight has shape \(8, 16\), the record says \(16, 8\)"):
        declare(module, "weight", PackedParameterSpec(INT8, (16, 8)))
    assert not is_packed(module) and module.weight.requires_grad
    declare(module, "weight", PackedParameterSpec(INT8, (8, 16)))
    with pytest.raises(ValueError, match="has no parameter 'weight' to pack"):
        declare(module, "weight", PackedParameterSpec(INT8, (8, 16)))


def test_fill_refuses_what_does_not_fit():
    module = nn.Linear(16, 8)
    pack(module)
    spec = module._packed["weight"]
    stored = {suffix: module.packed_tensor("weight", suffix) for suffix in spec.tensors()}
    with pytest.raises(ValueError, match=r"weight_scale: expected torch.float16 .* got nothing"):
        fill(module, "weight", {k: v for k, v in stored.items() if k != "scale"})
    with pytest.raises(ValueError, match=r"weight_scale: expected torch.float16 .* got torch.float32"):
        fill(module, "weight", {**stored, "scale": stored["scale"].float()})
    with pytest.raises(ValueError, match=r"weight_packed: .* got torch.int32 of shape \(7, 4\)"):
        fill(module, "weight", {**stored, "packed": stored["packed"][:7]})


def test_a_packed_weight_cannot_be_assigned():
    module = nn.Linear(16, 8)
    pack(module)
    with pytest.raises((AttributeError, TypeError, KeyError)):
        module.weight = nn.Parameter(torch.zeros(8, 16))


@pytest.mark.parametrize("view", ["rows", "last", "transposed"])
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5), (0, 4), (4, 0), (7,)])
def test_views_are_inverted(view, shape):
    if view == "transposed" and len(shape) != 2:
        with pytest.raises(ValueError, match="has no transposed view"):
            PackedParameterSpec.from_json({"scheme": str(INT8), "shape": list(shape), "view": view})
        return
    x = torch.randn(shape)
    spec = PackedParameterSpec(INT8, shape, view)
    assert tuple(matrix_view(x, view).shape) == spec.matrix
    assert torch.equal(restore_view(matrix_view(x, view), spec), x)
    assert PackedParameterSpec.from_json(spec.to_json()) == spec
