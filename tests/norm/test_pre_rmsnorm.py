"""`pre_rmsnorm`: models of transformers before and after, what stays and why, widths, ties, training on, the vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.passes import Context
from laconic.core.record import Record, apply_records
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.nn.stream_norm import StreamNorm
from laconic.norm import (
    CRMSNorm,
    PreRMSNorm,
    ZeroMeanOutput,
    crms_norm,
    fold_gains,
    to_pre_crmsnorm,
    to_pre_rmsnorm,
    untie,
    zero_mean,
)  # fmt: skip
from laconic.testing import Case, Example
from tests.core.test_placing import make, output

KEPT = 1e-5  # relative, in float32


class Block(nn.Module):
    """A Pre-LN stream: a table, a perceptron, a head."""

    def __init__(self, width: int = 8, bias: bool = True, post: bool = False):
        super().__init__()
        self.table = nn.Linear(5, width)
        self.norm, self.last = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, elementwise_affine=bias)
        self.up, self.down = nn.Linear(width, 12, bias=bias), nn.Linear(12, width, bias=bias)
        self.head = nn.Linear(width, 3, bias=False)
        self.post = post
        for norm in (self.norm, self.last):
            for parameter in norm.parameters():
                nn.init.normal_(parameter, 1.0, 0.5)

    def forward(self, x):
        h = self.table(x)
        if self.post:
            return self.head(self.last(self.norm(h) + self.down(F.gelu(self.up(self.norm(h))))))
        return self.head(self.last(h + self.down(F.gelu(self.up(self.norm(h))))))


def refused():
    model = Block(post=True).eval()
    return model, (torch.randn(2, 5),), "last"


EXAMPLES = [
    *[
        Example(
            lambda to=to: PreRMSNorm(to),
            kind="Pass",
            traits=("exact",),
            inputs=lambda g, bias=bias: [Block(bias=bias), torch.randn(4, 5, generator=g)],
            stated={"refused": refused},
        )
        for to in ("rms", "crms")
        for bias in (True, False)
    ],
    Example(
        lambda: CRMSNorm(7),
        kind="Layer",
        traits=("gradient:exact", "batch_independent_eval"),
        inputs=[(3, 5, 7)],
        wrong=[(3, 5, 8)],
    ),
    *[
        Example(
            lambda axis=axis: ZeroMeanOutput(axis),
            kind="Weight",
            traits=("gradient:exact", "right_inverse"),
            inputs=[(6, 4)],
        )
        for axis in (0, 1)
    ],
]


def run_vector(case: Case):
    """RMSNorm alone is another method's."""
    args = case.args
    if args.get("id") != "pre_rmsnorm":
        return NotImplemented
    if "identity" in args:
        full = case.array("input_full")
        whole = F.layer_norm(full, (args["d_full"],), eps=args["eps"])
        torch.testing.assert_close(crms_norm(full[..., :-1], args["eps"]), whole[..., :-1], rtol=1e-4, atol=1e-5)
        norm = StreamNorm(args["d_full"], args["eps"], short=True, restore=True)
        return {"layer_norm_full": norm(full[..., :-1]), "output": crms_norm(case.array("input"), args["eps"])}
    return {"output": CRMSNorm(args["d_kept"], args["eps"])(case.array("input"))}


@pytest.mark.parametrize("convert", [to_pre_rmsnorm, to_pre_crmsnorm])
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_models_of_transformers_compute_the_same(name, convert):
    model, inputs = make(name)
    before = output(model, inputs)
    single = copy.deepcopy(model).float()
    done = convert(model)
    assert len(done.norms) == 9 and not done.left
    assert not [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    off = (output(model, inputs) - before).abs().max() / before.abs().max()
    assert off < 1e-12
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    before = output(single, inputs)
    convert(single)
    assert (output(single, inputs) - before).abs().max() / before.abs().max() < KEPT


def test_the_stream_has_mean_zero_and_no_gain_is_left():
    model, inputs = make("gpt2")
    seen = []
    handle = model.transformer.ln_f.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    output(model, inputs)
    handle.remove()
    to_pre_rmsnorm(model)
    model.transformer.ln_f.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    output(model, inputs)
    assert seen[0].mean(-1).abs().max() > 0.01 and seen[1].mean(-1).abs().max() < 1e-12
    assert not list(model.transformer.ln_f.parameters())


def test_one_channel_less():
    model, _ = make("gpt2")
    to_pre_crmsnorm(model)
    body = model.transformer
    assert body.wte.weight.shape == (23, 15) and body.wte.embedding_dim == 15
    assert body.h[0].attn.c_attn.weight.shape == (15, 48) and body.h[0].attn.c_attn.nx == 15
    assert body.h[0].mlp.c_proj.weight.shape == (64, 15) and body.h[0].mlp.c_proj.bias.shape == (15,)
    assert model.lm_head.weight.shape == (23, 15) and model.lm_head.in_features == 15


def test_a_norm_whose_output_is_returned_keeps_gain_and_width():
    model, inputs = make("vit")
    before = output(model, inputs)
    to_pre_crmsnorm(model)
    assert model.layernorm.restore and model.layernorm.weight.shape == (16,)
    assert output(model, inputs).shape == before.shape


def test_a_tied_head_is_left_to_the_user_by_the_pass_and_untied_by_the_function():
    model, inputs = make("gpt2")
    structure = Structure.build(model, ((), inputs))
    skipped = PreRMSNorm().plan(structure, model).skipped
    assert "transformer.wte.weight is tied to lm_head.weight" in skipped["transformer.ln_f"]
    before = output(model, inputs)
    (record,) = untie(model, structure)
    assert record.data["untie"] == ["lm_head.weight"] and not model.config.tie_word_embeddings
    assert torch.equal(output(model, inputs), before)
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_records_rebuild_the_model_from_a_fresh_one():
    for convert in (to_pre_rmsnorm, to_pre_crmsnorm):
        model, inputs = make("gpt2")
        done = convert(model)
        skeleton, _ = make("gpt2")
        skeleton = skeleton.to("meta")
        apply_records(skeleton, [Record.from_json(record.to_json()) for record in done.records])
        shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_bert_keeps_the_norms_behind_its_sums():
    model, inputs = make("bert")
    before = output(model, inputs)
    done = to_pre_rmsnorm(model)
    assert list(done.norms) == ["embeddings.LayerNorm"]
    reason = done.left["encoder.layer.0.output.LayerNorm"]
    assert (
        reason.startswith("it holds what the norm encoder.layer.0.attention.output.LayerNorm gives")
        and "Post-LN" in reason
    )
    torch.testing.assert_close(output(model, inputs), before)


def test_gains_fold_on_llama():
    model, inputs = make("llama")
    model = model.float()
    before = output(model, inputs)
    done = fold_gains(model)
    assert len(done.norms) == 9 and (model.model.layers[0].input_layernorm.weight == 1).all()
    off = (output(model, inputs) - before).abs().max() / before.abs().max()
    assert off < KEPT
    model, inputs = make("gpt2")
    before = output(model, inputs)
    assert "transformer.ln_f" in fold_gains(model).left
    torch.testing.assert_close(output(model, inputs), before)


def test_gains_stay_where_a_reader_has_no_bias():
    model, x = Block().eval(), torch.randn(2, 5)
    done = fold_gains(model, ((x,), {}))
    assert list(done.norms) == ["norm"] and done.left == {"last": "head, which reads it, has no place for its bias"}


@pytest.mark.parametrize("bias", [True, False])
def test_training_on_keeps_the_equality(bias):
    torch.manual_seed(0)
    plain, x = Block(bias=bias).double(), torch.randn(16, 5, dtype=torch.float64)
    other = copy.deepcopy(plain)
    to_pre_rmsnorm(other.eval(), ((x,), {}), train=True)
    torch.testing.assert_close(other(x), plain.eval()(x))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        other(x).square().mean().backward()
        optimizer.step()
    stream = other.table(x)
    assert stream.mean(-1).abs().max() < 1e-12 and other.table.parametrizations.weight.original.grad.abs().max() > 0
    with pytest.raises(BadInput, match=r"no layer norm"):
        to_pre_rmsnorm(other, ((x,), {}))


def test_readers_outside_the_norms_are_found():
    class Probed(Block):
        def forward(self, x):
            h = self.table(x)
            return self.head(self.last(h)), h.relu()

    with pytest.raises(BadInput, match=r"no norm of Probed can become rms .*last: relu in the model reads it as it is"):
        to_pre_rmsnorm(Probed().eval(), ((torch.randn(2, 5),), {}))


def test_mismatched_widths_name_both_layers():
    from dataclasses import replace

    model, x = Block().eval(), torch.randn(2, 5)
    structure = Structure.build(model, ((x,), {}))
    model.head = nn.Linear(9, 3)
    with pytest.raises(BadInput, match="head reads 9 channels and last gives 8"):
        PreRMSNorm().solve("norm", PreRMSNorm().plan(structure, model), Context(model, structure))
    wrong = replace(structure, streams=tuple(replace(stream, width=9) for stream in structure.streams))
    with pytest.raises(BadInput, match=r"norm normalizes \(8,\), and what it reads is 9 wide"):
        PreRMSNorm().plan(wrong, model)


def test_a_parametrized_writer_is_left_alone():
    model, x = Block().eval(), torch.randn(2, 5)
    nn.utils.parametrizations.weight_norm(model.down)
    structure = Structure.build(model, ((x,), {}))
    assert PreRMSNorm().plan(structure, model).units == {}


def test_the_equation_of_crms_by_hand():
    x = torch.randn(3, 5, dtype=torch.float64)
    full = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    want = full / (full.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(crms_norm(x), want[:, :-1])
    half = (200 * torch.randn(2, 64)).half()  # squares overflow in float16
    assert crms_norm(half).isfinite().all() and StreamNorm(64)(half).isfinite().all()


def test_zero_mean_of_large_half_precision_weights():
    weight = (1000 + torch.randn(64, 4)).bfloat16()
    assert zero_mean(weight).float().mean(0).abs().max() < 8


def test_bad_options():
    with pytest.raises(BadInput, match="norms become 'rms' or 'crms', not 'batch'"):
        PreRMSNorm("batch")
    with pytest.raises(ValueError, match="CRMSNorm of 0 values"):
        CRMSNorm(0)
    for options, message in (
        ({"restore": True}, "short"),
        ({"short": True, "affine": True}, "fold it"),
        ({"bias": True}, "affine"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamNorm(4, **options)
    with pytest.raises(BadInput, match="Linear brings no example of a call"):
        to_pre_rmsnorm(nn.Linear(2, 2))
