"""`laconic normalize`: exact without data, trained on with data, artifacts that load, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.pipeline.load import load
from laconic.pipeline.normalize import normalize
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


@pytest.mark.parametrize(("name", "to"), [("gpt2", "rmsnorm"), ("gpt2", "crmsnorm"), ("vit", "rmsnorm"), ("llama", "rmsnorm")])
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
