"""`depth`: which modules of a model are its residual blocks, what is seen of them, and the refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.core.depth import IGNORED, Batch, Moments, blocks_of, losses, rows, watched
from laconic.core.modes import evaluating
from laconic.errors import BadInput
from laconic.zoo import LlamaLM, LlamaLMConfig, ResNetCifar, ResNetCifarConfig
from tests.core.test_placing import MODELS


class Branch(nn.Module):
    """x + W x, or the other way round, or in place, or a norm of it."""

    def __init__(self, how: str, width: int = 4):
        super().__init__()
        self.how, self.inner, self.norm = how, nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        h = self.inner(x)
        if self.how == "in place":
            h += x
            return h
        made = {"left": lambda: x + h, "right": lambda: h + x, "post": lambda: self.norm(x + h), "none": lambda: h}
        return made[self.how]() if self.how in made else 0.5 * x + h


def chain(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(*blocks)).eval()


@pytest.mark.parametrize("how", ["left", "right", "in place", "post", "scaled"])
def test_a_block_that_adds_to_its_input_is_found_and_its_sides_told_apart(how):
    model, x = chain(Branch(how), Branch(how)), torch.randn(8, 4)
    assert [block.path for block in blocks_of(model, Batch((x,)))] == ["1.0", "1.1"]
    seen = {}
    with torch.no_grad(), watched(model, ["1.0"], lambda visit: seen.update({visit.path: visit})):
        model(x)
    stream = model[0](x).detach()
    factor = 0.5 if how == "scaled" else 1.0
    [(of_stream, of_branch)] = seen["1.0"].sums
    assert of_stream == pytest.approx(float((factor * stream).square().mean()), rel=1e-5)
    assert of_branch == pytest.approx(float(model[1][0].inner(stream).detach().square().mean()), rel=1e-5)


def make(name: str):
    torch.manual_seed(0)
    if name in MODELS:
        model, inputs = MODELS[name]()
        return model.eval(), Batch((), inputs)
    if name == "zoo llama":
        model = LlamaLM(LlamaLMConfig(vocabulary=23, width=16, layers=3))
        return model.eval(), Batch((torch.randint(23, (2, 7)),))
    if name == "zoo resnet":
        return ResNetCifar(ResNetCifarConfig(depth=8)).eval(), Batch((torch.randn(2, 3, 16, 16),))
    if name == "torch":
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        return nn.TransformerEncoder(layer, 3).eval(), Batch((torch.randn(2, 5, 16),))
    from transformers import ResNetConfig, ResNetForImageClassification, T5Config, T5Model

    if name == "t5":
        config = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        tokens = {"input_ids": torch.randint(20, (2, 5)), "decoder_input_ids": torch.randint(20, (2, 4))}
        return T5Model(config).eval(), Batch((), {**tokens, "use_cache": False})
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    return ResNetForImageClassification(config).eval(), Batch((torch.randn(2, 3, 16, 16),))


FOUND = {
    "llama": ("model.layers", 4, 2), "gpt2": ("transformer.h", 4, 2), "bert": ("encoder.layer", 4, 2),
    "vit": ("layers", 4, 2), "zoo llama": ("layers", 3, 2), "torch": ("layers", 3, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_the_layers_of_transformers_are_found(name):
    model, batch = make(name)
    where, count, sums = FOUND[name]
    blocks = blocks_of(model, batch)
    assert [block.path for block in blocks] == [f"{where}.{i}" for i in range(count)]
    assert all(block.keeps and block.channels == -1 for block in blocks)
    seen = []
    with torch.no_grad(), watched(model, [b.path for b in blocks], seen.append):
        model(*batch.args, **batch.kwargs)
    assert [len(visit.sums) for visit in seen] == [sums] * count


def test_stages_of_a_resnet_are_looked_into():
    model, batch = make("resnet")
    blocks = blocks_of(model, batch)
    paths = [f"resnet.encoder.stages.{stage}.layers.{layer}" for stage in range(2) for layer in range(2)]
    assert [block.path for block in blocks] == paths
    assert [block.keeps for block in blocks] == [True, True, False, True]
    assert all(block.channels == 1 for block in blocks)
    model, batch = make("zoo resnet")
    assert [block.keeps for block in blocks_of(model, batch)] == [True, False, False]


def test_layers_made_of_residual_sublayers_are_taken_whole():
    model, batch = make("t5")
    paths = [f"{half}.block.{i}" for half in ("encoder", "decoder") for i in range(2)]
    assert [block.path for block in blocks_of(model, batch)] == paths
    inner = blocks_of(model, batch, "decoder.block.*.layer.*")
    assert len(inner) == 6 and inner[0].path == "decoder.block.0.layer.0"


@pytest.mark.parametrize("name", [*FOUND, "resnet", "t5"])
def test_a_block_is_left_out_by_what_a_visit_returns(name):
    """The hooks do what taking the module away does, and nothing stays behind."""
    model, batch = make(name)
    block = next(block for block in blocks_of(model, batch) if block.keeps)
    with torch.no_grad():
        before = model(*batch.args, **batch.kwargs)
        with watched(model, [block.path], lambda visit: visit.before):
            without = model(*batch.args, **batch.kwargs)
        after = model(*batch.args, **batch.kwargs)
        module = model.get_submodule(block.path)
        whole = module.forward

        def identity(*args, **kwargs):
            given = whole(*args, **kwargs)
            x = args[0] if args else kwargs["hidden_states"]
            return (x, *given[1:]) if isinstance(given, tuple) else x

        module.forward = identity
        # torch's fused encoder layer never calls a module's forward: grad mode sends it down the plain road
        with torch.enable_grad():
            truth = model(*batch.args, **batch.kwargs)
    first = lambda output: (output if isinstance(output, torch.Tensor) else output[0]).detach()  # noqa: E731
    assert torch.equal(first(before), first(after))
    torch.testing.assert_close(first(without), first(truth))
    assert not torch.allclose(first(before), first(without))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("blocks", "pattern", "message"),
    [
        ([Branch("none"), Branch("none")], None, "none of the 2 modules in its lists adds to what it reads; name its"),
        ([nn.ReLU()], None, "none of the 0 modules"),
        ([Branch("left")], "2.*", "blocks='2.*' is the path of no module of Sequential"),
        ([Branch("left")], "1.0.norm", "1.0.norm of Sequential, which blocks='1.0.norm' names, is not called"),
    ],
)
def test_refusals(blocks, pattern, message):
    with pytest.raises(BadInput, match=message.replace("*", r"\*")):
        blocks_of(chain(*blocks), Batch((torch.randn(2, 4),)), pattern)


def test_a_block_that_runs_twice_is_refused():
    block = Branch("left")
    with pytest.raises(BadInput, match=r"1\.0 of Sequential is called 2 times"):
        blocks_of(chain(block, block), Batch((torch.randn(2, 4),)))


def test_moments_over_batches_are_those_of_all_at_once():
    x = 1e4 + torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Moments()
    for part in x.split([20, 1, 0, 29]):
        found.add(part)
    assert found.variance == pytest.approx(float(x.var(0, correction=0).mean()), rel=1e-9)
    assert found.squared_mean == pytest.approx(float(x.mean(0).square().mean()), rel=1e-12)


def test_padding_does_not_count():
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(rows(x, -1, mask), torch.cat([x[0, :2], x[1, :1]]).double())
    assert rows(torch.randn(2, 5, 3, 3), 1, mask).shape == (18, 5)


def test_losses_of_classes_and_of_next_tokens():
    logits, target = torch.randn(2, 3, 5), torch.tensor([[1, 4, IGNORED], [0, IGNORED, IGNORED]])
    log_p = logits.log_softmax(-1)
    want = torch.stack([-(log_p[0, 0, 1] + log_p[0, 1, 4]) / 2, -log_p[1, 0, 0]])
    torch.testing.assert_close(losses(logits, target), want)
    torch.testing.assert_close(losses(logits[:, 0], target[:, 0]), -log_p[:, 0].gather(1, target[:, :1]).squeeze(1))
    with pytest.raises(BadInput, match="has no loss on targets"):
        losses(logits, torch.tensor([[5, 0, 0], [0, 0, 0]]))
    with pytest.raises(BadInput, match="has no loss on targets"):
        losses(logits, torch.zeros(2, 4, dtype=torch.long))


def test_modes_come_back():
    model = chain(Branch("left"))
    model[0].train()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.children()] == [True, False]
