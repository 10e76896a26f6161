"""PEFT's adapters over packed layers: training, files, merging, and fused blocks that step aside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import laconic
from laconic.core.record import apply_records
from laconic.errors import BadInput
from laconic.kernels import native
from laconic.nn import is_packed
from laconic.nn.blocks import FusedBlock, fuse
from laconic.nn.rotated import rotate_inputs
from laconic.numerics import Scheme
from laconic.pipeline.source import resolve
from laconic.quant import qlora_
from tests.interop.models import drawn, logits, rounded_to
from tests.pipeline.artifacts import round_records

peft = pytest.importorskip("peft", reason="peft, whose adapters are trained, is not installed")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
IDS = [3, 17, 5, 90, 9, 9, 44]
INT4, NF4 = "v1/int4/group32/float16/minmax/zint/nearest", "v1/levelsnf4/group32/float32/minmax/znone/nearest"


def trained(model, steps: int = 6) -> list[float]:
    """The losses of a few steps on one drawn batch; the model is in evaluation mode afterwards."""
    ids = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name, p in model.named_parameters() if "lora_" in name
        }
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def two_layers() -> nn.Module:
    """Two packed linear layers with a ReLU between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    apply_records(model, round_records(resolve(model), Scheme.parse(INT4)))
    return model


def generated(model) -> list[int]:
    return model.generate(torch.tensor([IDS]), max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].tolist()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", [INT4, NF4], ids=["int4", "nf4"])
def test_adapters_train_are_saved_and_merge(tmp_path, scheme, tied):
    artifact = rounded_to(drawn(tied=tied, **SMALL), tmp_path / "artifact", scheme)
    base = laconic.load(artifact)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    losses = trained(model)
    assert losses[-1] < 0.7 * losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items()), "packed weights stay what they are"

    model.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(laconic.load(artifact), tmp_path / "adapter")
    said = logits(fresh, IDS)
    assert torch.equal(said, logits(model, IDS)) and not torch.equal(said, logits(laconic.load(artifact), IDS))
    tokens = generated(fresh)
    merged = fresh.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(merged, IDS), said, rtol=1e-4, atol=1e-4)
    assert generated(merged) == tokens and merged.config.tie_word_embeddings is tied
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, IDS), logits(merged, IDS))
    assert bool(getattr(again, "is_quantized", False)) is not tied, "untied, the embedding is packed still"


def test_merging_into_some_layers_leaves_the_others_packed(tmp_path):
    artifact = rounded_to(drawn(**SMALL), tmp_path / "artifact", INT4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(laconic.load(artifact), config)
    said = logits(model, IDS)
    merged = model.merge_and_unload()
    layer = merged.model.layers[0]
    assert not is_packed(layer.self_attn.q_proj) and is_packed(layer.self_attn.k_proj)
    torch.testing.assert_close(logits(merged, IDS), said, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, IDS), logits(merged, IDS)) and is_packed(again.model.layers[0].mlp.up_proj)
    described = again.config.quantization_config.to_dict()["config_groups"]["group_0"]["targets"]
    assert "model.layers.0.self_attn.q_proj" not in described and "model.layers.0.mlp.up_proj" in described


def test_other_adapters_merge_too():
    model = two_layers()
    x = torch.randn(3, 64)
    config = peft.LoHaConfig(r=2, target_modules=["0", "2"], init_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    said = adapted(x)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), said, rtol=1e-4, atol=1e-4)
    adapted.unmerge_adapter()
    adapted.merge_adapter()
    torch.testing.assert_close(adapted.unload()(x), said, rtol=1e-4, atol=1e-4)


def test_nested_scales_of_qlora_merge():
    torch.manual_seed(0)
    model = drawn(**SMALL)
    qlora_(model, rank=2)
    for path, layer in [(p, m) for p, m in model.named_modules() if type(m).__name__ == "LoRALinear"]:
        model.set_submodule(path, layer.base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    said = logits(adapted, IDS)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), IDS), said, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.load() is None, reason="no compiled kernels, so no fused blocks")
def test_fused_blocks_step_aside_where_a_layer_was_replaced(tmp_path, monkeypatch):
    from laconic.kernels import ops

    monkeypatch.setattr(ops, "_by_reference", False)
    artifact = rounded_to(drawn(**SMALL), tmp_path / "artifact", INT4)
    base = laconic.load(artifact)
    assert set(fuse(base).values()) == {""}
    logits(base, IDS)  # the addresses are taken now
    slow = laconic.load(artifact)
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], layers_to_transform=[1], init_lora_weights=False)
    torch.manual_seed(1)
    fast = peft.get_peft_model(base, copy.deepcopy(config)).eval()
    torch.manual_seed(1)
    slow = peft.get_peft_model(slow, copy.deepcopy(config)).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(fast, IDS), logits(slow, IDS), rtol=1e-3, atol=1e-4)
    ran = [bool(block._prepared) for block in base.model.layers if isinstance(block, FusedBlock)]
    assert ran == [True, False], "the block without adapters still runs as compiled code"


def test_a_layer_that_rotates_its_inputs_is_not_merged():
    model = two_layers()
    rotate_inputs(model[2], 32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["2"]))
    with pytest.raises(BadInput, match="^2 rotates its inputs or outputs"):
        adapted.merge_and_unload()
    assert is_packed(model[2].get_base_layer())
