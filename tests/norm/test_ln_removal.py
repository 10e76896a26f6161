"""`ln_removal`: the recorded phases, the schedule on the clock, resuming, and folding, which is refused too early."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.core.fit import fit
from laconic.errors import BadInput
from laconic.norm import FakeLayerNorm, LayerNormRemover, RemovalSchedule, std_loss
from laconic.testing import Case, Example
from tests.core.test_placing import make, output

EXAMPLES = [
    Example(
        lambda: FakeLayerNorm(8, 6),
        kind="Layer",
        traits=("gradient:exact", "batch_independent_eval"),
        inputs=[(3, 5, 8)],
        wrong=[(3, 5, 7)],
    ),
    Example(
        lambda: FakeLayerNorm(8, 6, init_average_std=0.7, init_bos_std=3.0).make_fake(),
        kind="Layer",
        traits=("gradient:exact", "batch_independent_eval"),
        inputs=[(3, 5, 8)],
        wrong=[(3, 7, 8)],
    ),
]
OPTIONS = (
    "eps", "momentum", "bos_special_treatment", "correct_bos", "recompute_std_on_real", "recompute_std_on_fake",
    "non_bos_average_std", "grad_acc_steps", "init_average_std", "init_bos_std",
)  # fmt: skip


def run_vector(case: Case):
    args = case.args
    if case.name.startswith("aux_loss"):
        hidden = case.array("hidden").requires_grad_()
        loss = std_loss(
            hidden, case.array("ids"), eos_id=int(case.array("eos_id")), weight=args["aux_weight"], eps=args["eps"]
        )
        loss.backward()
        return {"loss": loss, "grad_hidden": hidden.grad}
    if "normalized_shape" not in args:
        return NotImplemented
    if "steps" not in args:  # the path of end-of-text tokens, from recorded constants
        held = case.array("bos_std_buffer")
        norm = FakeLayerNorm(args["normalized_shape"], args["n_ctx"], args.get("eps", 1e-5)).make_fake().eval()
        norm.bos_std.copy_(held)
        norm.load_state_dict({"weight": case.array("weight"), "bias": case.array("bias")}, strict=False)
        return {"output": norm(case.array("input"), args["std_type"])}
    options = {key: args[key] for key in OPTIONS if key in args}
    options |= {key: float(case.array(key)) for key in ("momentum", "init_average_std", "init_bos_std") if key in case}
    norm = FakeLayerNorm(args["normalized_shape"], args["n_ctx"], **options)
    norm.load_state_dict({"weight": case.array("weight"), "bias": case.array("bias")}, strict=False)
    names = {
        "average_std_buffer_after": "average_std", "bos_std_buffer_after": "bos_std",
        "real_average_std_after": "real_average_std", "real_bos_std_after": "real_bos_std",
    }  # fmt: skip
    found: dict[str, list] = {key: [] for key in ("output", "grad_input", "grad_weight", *names)}
    inputs, grads = case.arrays("input"), case.arrays("grad_output")
    for x, grad, before in zip(inputs, grads, args["before_step"], strict=True):
        if before is not None:
            getattr(norm, before)()
        norm.zero_grad()
        x.requires_grad_()
        y = norm(x, args.get("std_type", "avg"))
        y.backward(grad)
        found["output"].append(y)
        found["grad_input"].append(x.grad)
        found["grad_weight"].append(norm.weight.grad)
        for key, name in names.items():
            found[key].append(getattr(norm, name).clone())
    return found


def gpt2(n_ctx: int = 16):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=n_ctx, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


SHORT = RemovalSchedule(start=2, gap_mlp=1, gap_attention=1, gap_last=1, gap_bos=2)


class Tokens:
    """A task for `fit`: predict the next of random tokens."""

    id, batch_size, drop_last = "tokens", 4, False

    class metric:
        name, higher_is_better = "loss", False

    def __init__(self):
        self.ids = torch.randint(23, (16, 10), generator=torch.Generator().manual_seed(0))

    def train_data(self):
        return self

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index]

    def model(self, seed):
        return gpt2()

    def loss(self, model, batch):
        return F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model, split="test"):
        return 0.0


def test_the_schedule_of_gpt2_small():
    norms = tuple(f"h.{n}.ln_{k}" for n in range(12) for k in (1, 2)) + ("ln_f",)
    at, bos = RemovalSchedule().steps(norms)
    assert at["h.0.ln_2"] == 20 and at["h.11.ln_2"] == 42 and at["h.0.ln_1"] == 44
    assert at["ln_f"] == 44 + 12 * 5 + 2 and bos == at["ln_f"] + 12
    assert len(set(at.values())) == 25  # never two at once


def test_norms_go_by_the_clock_and_the_folded_model_is_the_fake_one():
    model, task = gpt2(), Tokens()
    remover = LayerNormRemover(model, SHORT)
    assert remover.norms[0] == "transformer.h.0.ln_1" and remover.norms[-1] == "transformer.ln_f"
    with pytest.raises(BadInput, match=r"folding while the schedule is running: 5 of 5 norms .* may after step 9"):
        remover.fold()
    fit(model, task, torch.optim.Adam(model.parameters(), 1e-3), steps=7, hooks=[remover], quiet=True)
    assert [norm.is_fake for norm in remover._fakes().values()] == [True] * 5 and not remover.done
    with pytest.raises(BadInput, match="the first position is treated apart still, after step 7; it may after step 9"):
        remover.fold()
    fit(model, task, torch.optim.Adam(model.parameters(), 1e-3), steps=9, hooks=[remover], quiet=True)
    assert remover.done
    inputs = {"input_ids": task.ids[:3]}
    model.eval().double()
    before = output(model, inputs)
    records = remover.fold()
    off = (output(model, inputs) - before).abs().max() / before.abs().max()
    assert off < 1e-6  # the constants themselves are kept in float32
    assert not [m for m in model.modules() if "Norm" in type(m).__name__]
    assert (
        records[0].data["untie"] == ["lm_head.weight"]
        and records[-1].data["norms"]["transformer.ln_f"]["kind"] == "none"
    )
    with pytest.raises(BadInput, match="no FakeLayerNorm any more"):
        remover.fold()


def test_a_training_goes_on_where_it_stopped(tmp_path):
    def trained(steps, folder, resume=False):
        model = gpt2()
        remover = LayerNormRemover(model, SHORT)
        fit(
            model, Tokens(), torch.optim.SGD(model.parameters(), 1e-2), steps=steps, hooks=[remover], quiet=True, out=folder,
            save_every=4, resume=resume,
        )  # fmt: skip
        return model.state_dict(), remover

    want, _ = trained(10, tmp_path / "whole")
    trained(10, tmp_path / "parts")
    (found, remover) = trained(10, tmp_path / "parts", resume=True)
    assert remover.taken == 10 and remover.done
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_averages_do_not_move_in_evaluation_mode():
    norm = FakeLayerNorm(8, 6).eval()
    before = copy.deepcopy(norm.state_dict())
    norm(torch.randn(2, 5, 8))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_an_average_of_micro_batches():
    one, two = FakeLayerNorm(8, 6), FakeLayerNorm(8, 6, grad_acc_steps=2)
    x = torch.randn(2, 5, 8)
    one(x)
    two(x)
    two(x)
    torch.testing.assert_close(one.real_average_std, two.real_average_std)


def test_a_single_position_and_half_precision():
    norm = FakeLayerNorm(8, 6)
    norm(torch.randn(2, 1, 8))
    assert norm.real_average_std == 1.0 and norm.real_bos_std != 1.0
    half = FakeLayerNorm(64, 6, dtype=torch.float16).make_fake()
    x = (1000 + torch.randn(2, 5, 64)).half()
    assert half(x).isfinite().all() and half.real_average_std < 2


def test_constant_features_give_the_bias():
    norm = FakeLayerNorm(8, 6)
    assert not norm(torch.full((2, 5, 8), 3.0)).abs().max() > 1e-5
    norm.make_fake()
    assert not norm(torch.full((2, 5, 8), 3.0)).any()


def test_gradient_of_the_auxiliary_loss_pulls_deviations_together():
    hidden = (torch.randn(2, 6, 8) * torch.linspace(0.5, 3, 6)[:, None]).requires_grad_()
    before = std_loss(hidden)
    before.backward()
    assert std_loss(hidden - 10 * hidden.grad) < before
    with pytest.raises(ValueError, match="neither first nor end-of-text"):
        std_loss(torch.randn(2, 1, 8))


def test_refusals():
    model, _ = make("bert")
    with pytest.raises(
        BadInput, match=r"BertModel cannot be removed: encoder.layer.0.attention.output.LayerNorm: it holds"
    ):
        LayerNormRemover(model)
    model, _ = make("llama")
    with pytest.raises(BadInput, match="no layer norm was found"):
        LayerNormRemover(model)
    with pytest.raises(BadInput, match='bos is "exempt"|it is "exempt" or "same"'):
        LayerNormRemover(gpt2(), bos="other")
    with pytest.raises(BadInput, match="a number of steps is not negative"):
        RemovalSchedule(start=-1)
    with pytest.raises(BadInput, match="Linear brings no example"):
        LayerNormRemover(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="momentum is 2"):
        FakeLayerNorm(4, 4, momentum=2)
    with pytest.raises(ValueError, match="n_ctx=0"):
        FakeLayerNorm(4, 0)
    with pytest.raises(ValueError, match="std_type is 'eot'"):
        FakeLayerNorm(4, 4)(torch.zeros(1, 2, 4), "eot")
