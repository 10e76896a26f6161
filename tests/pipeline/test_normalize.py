"""`laconic normalize`: exact without data, trained on with data, artifacts that load, and what is refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from laconic.core.affine import rounding_bound
from laconic.errors import BadInput
from laconic.nn.stream_norm import ChannelAffine
from laconic.norm import fading, to_prepbn
from laconic.pipeline.load import load
from laconic.pipeline.normalize import folded, normalize
from tests.core.test_placing import MODELS
from tests.norm.test_ln_removal import gpt2
from tests.pipeline.runs import run_cli


def saved(name, folder):
    torch.manual_seed(0)
    model = gpt2() if name == "gpt2" else MODELS[name]()[0]
    if name in ("bert", "vit"):  # with the pooler, which transformers' own loading wants
        model = type(model)(model.config)
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.npz"
    np.savez(path, input_ids=np.random.default_rng(0).integers(3, 23, (60, 10)))
    return path


IDS = torch.arange(10).remainder(23)[None]


@pytest.mark.parametrize(
    ("name", "to"), [("gpt2", "rmsnorm"), ("gpt2", "crmsnorm"), ("vit", "rmsnorm"), ("llama", "rmsnorm")]
)
def test_exact_conversions_need_no_data_and_load_again(name, to, tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM

    folder = saved(name, tmp_path / "model")
    found = normalize(folder, to, out=tmp_path / "out")
    assert found["exact"] and found["training"] is None and found["relative_error"] < 1e-5
    assert found["before"]["latency_ms"] > 0 and found["metric"] is None and not found["left"]
    opened = load(tmp_path / "out", verify=True)
    before = (AutoModel if name == "vit" else AutoModelForCausalLM).from_pretrained(folder).eval()
    given = (torch.randn(1, 3, 8, 8),) if name == "vit" else (IDS,)
    with torch.no_grad():
        want, got = before(*given)[0], opened(*given)[0]
    assert (got - want).abs().max() / want.abs().max() < 1e-5
    assert not any(isinstance(module, nn.LayerNorm) for module in opened.modules())


@pytest.mark.parametrize("to", ["rmsnorm", "crmsnorm"])
def test_transformers_opens_it_with_and_without_the_head(to, tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM

    folder = saved("gpt2", tmp_path / "model")
    normalize(folder, to, out=tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(folder).eval()
    whole, base = (kind.from_pretrained(tmp_path / "out").eval() for kind in (AutoModelForCausalLM, AutoModel))
    whole.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        want = before(IDS).logits
        for model in (whole, again):
            torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=1e-5 * float(want.abs().max()))
        assert torch.equal(base(IDS).last_hidden_state, whole.transformer(IDS).last_hidden_state)


@pytest.mark.parametrize(("name", "to"), [("bert", "rmsnorm"), ("gpt2", "repbn"), ("gpt2", "none")])
def test_inexact_conversions_are_trained_on_and_load_again(name, to, tmp_path, tokens):
    folder = saved(name, tmp_path / "model")
    found = normalize(folder, to, tokens, out=tmp_path / "out", steps=30, lr=1e-3, batch=4)
    assert not found["exact"] and found["training"]["steps"] == 30 and not found["left"]
    assert found["training"]["loss_last"] == found["training"]["loss_last"]
    opened = load(tmp_path / "out", verify=True)
    assert not any(isinstance(module, nn.LayerNorm) for module in opened.modules())
    assert opened(IDS)[0].isfinite().all()
    if to == "none":
        assert not any("Norm" in type(module).__name__ for module in opened.modules())


def test_batch_norms_are_folded_where_they_can_be(tmp_path, tokens, capsys):
    """GPT-2: every norm but the last, which the tied head reads."""
    folder = saved("gpt2", tmp_path / "model")
    args = ("--to", "repbn", "--data", tokens, "--steps", "30", "--lr", "1e-3", "--batch", "4")
    code, printed, said = run_cli(capsys, "normalize", folder, *args, "--out", tmp_path / "out", "--json")
    assert code == 0, said
    found = json.loads(printed)
    norms = {f"transformer.h.{i}.ln_{j}" for i in range(2) for j in (1, 2)}
    folding = found["folding"]
    assert set(folding["folded"]) == norms and set(folding["unfolded"]) == {"transformer.ln_f"}
    assert folding["folded"]["transformer.h.0.ln_1"] == ["transformer.h.0.attn.c_attn"]
    assert "transformer.wte.weight" in folding["unfolded"]["transformer.ln_f"]
    assert 0 < folding["bound"] < 1e-4 and folding["relative_error"] < 1e-5
    opened = load(tmp_path / "out", verify=True)
    assert all(type(opened.get_submodule(path)) is nn.Identity for path in norms)
    assert type(opened.get_submodule("transformer.ln_f")) is ChannelAffine
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, opened(IDS).logits)
    code, printed, _ = run_cli(capsys, "normalize", folder, *args, "--out", tmp_path / "again")
    assert code == 0 and "4 norms: folded into the layers around (RepBN)" in printed
    assert "transformer.ln_f is not folded: " in printed and "folding moved the output by" in printed


@pytest.mark.parametrize(("name", "count", "kept"), [("gpt2", 4, 1), ("vit", 8, 1), ("bert", 0, 9)])
def test_the_folded_model_agrees_with_the_unfolded_one_within_the_bound(name, count, kept):
    """Layer by layer, and the output of the whole."""
    torch.manual_seed(0)
    model, inputs = (gpt2(), {"input_ids": IDS}) if name == "gpt2" else MODELS[name]()
    model = model.eval()
    to_prepbn(model, 1, 0, alpha=0.5)
    norms = fading(model)
    with torch.no_grad():
        for norm in norms.values():
            norm.advance()
            for _, value in [*norm.new.named_parameters(), *norm.new.named_buffers()]:
                if value.ndim == 1:
                    value.uniform_(0.5, 2.0)
    unfolded = copy.deepcopy(model).double()
    records, folding = folded(model, tuple(norms), ((), inputs))
    assert (len(folding["folded"]), len(folding["unfolded"])) == (count, kept)
    assert folding["relative_error"] < 1e-5 and all(folding["unfolded"].values())
    for record in records:
        norm = unfolded.get_submodule(record.path)
        for said in record.data["layers"]:
            layer, exact = (net.get_submodule(said["path"]) for net in (model, unfolded))
            weight = layer.weight.mT if said["turned"] else layer.weight
            x = torch.randn(7, weight.shape[1])
            with torch.no_grad():
                error = (layer(x).double() - exact(norm(x.double()))).abs()
            assert (error <= rounding_bound(weight, layer.bias, x)).all()
            assert 0 < said["bound"] <= folding["bound"]


def test_what_is_refused(tmp_path):
    bert, gpt, llama = (saved(name, tmp_path / name) for name in ("bert", "gpt2", "llama"))
    out = tmp_path / "out"
    for model, to, message in (
        (gpt, "batchnorm", "norms cannot become 'batchnorm'; there are rmsnorm, crmsnorm, repbn, none"),
        (gpt, "none", r"none changes what .* computes, and the model must be trained on: name --data"),
        (gpt, "repbn", "name --data or --task"),
        (llama, "crmsnorm", r"LlamaForCausalLM has no layer norm that could become crmsnorm: --to rmsnorm folds"),
        (tmp_path / "absent", "rmsnorm", "check the path"),
    ):
        with pytest.raises(BadInput, match=message):
            normalize(model, to, out=out)
    assert not out.exists() and not out.with_name("out.partial").exists()
    partly = normalize(bert, "rmsnorm", out=out)
    assert list(partly["norms"]) == ["embeddings.LayerNorm"] and "with --data they are exchanged" in partly["notes"][-1]
    with pytest.raises(BadInput, match="exists; name another folder"):
        normalize(gpt, "rmsnorm", out=out)


def test_too_few_steps_for_a_schedule_are_said(tmp_path, tokens):
    with pytest.raises(BadInput, match=r"5 norms cannot go one by one in 5 steps: give --steps 11 or more"):
        normalize(saved("gpt2", tmp_path / "model"), "none", tokens, out=tmp_path / "out", steps=5)


def test_the_command(tmp_path, capsys):
    folder = saved("gpt2", tmp_path / "model")
    code, printed, said = run_cli(capsys, "normalize", folder, "--to", "rmsnorm", "--out", tmp_path / "a", "--json")
    record = json.loads(printed)
    assert code == 0 and record["exact"] and set(record["norms"].values()) == {"rms"}, said
    code, printed, said = run_cli(capsys, "normalize", folder, "--to", "crmsnorm", "--out", tmp_path / "b")
    assert code == 0 and "5 norms: crms" in printed and "lm_head.weight is a parameter of its own" in printed, said
    code, _, said = run_cli(capsys, "normalize", folder, "--to", "none", "--out", tmp_path / "c")
    assert code == 2 and said.strip().count("\n") == 0 and "name --data" in said
