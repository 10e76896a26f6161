"""`mambaquant`: transformers' mixer and its gradients, every place exact, equal variances, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic.core.passes import Context, run
from laconic.core.structure import Structure
from laconic.errors import BadInput
from laconic.nn.mamba import MambaBlock, MambaMixer
from laconic.quant import MambaQuant, calibrate_mamba
from laconic.quant._mambaquant import smoothing
from laconic.testing import Example
from laconic.testing.vectors import Case

IDS = torch.tensor([[1, 5, 2, 7, 3], [0, 4, 4, 6, 8]])


class Model(nn.Module):
    """A small Mamba language model."""

    def __init__(self, width: int = 12, blocks: int = 2, **options) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(9, width), nn.RMSNorm(width, eps=1e-5), nn.Linear(width, 9)
        self.blocks = nn.ModuleList(MambaBlock(width, d_state=3, dt_rank=4, **options) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mamba(generator: torch.Generator | None = None, **options) -> Model:
    generator = generator or torch.Generator().manual_seed(0)
    model = Model(**options).eval()
    for name, p in model.named_parameters():
        if "A_log" not in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.4 + ("norm" in name)
    return model


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.mixer = nn.Embedding(9, 8), nn.RMSNorm(8), MambaMixer(8, d_state=2, dt_rank=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        return x + self.mixer(x)


EXAMPLES = [
    Example(
        lambda: MambaQuant(calibrate_mamba(mamba(blocks=1), [IDS])), kind="Pass",
        inputs=lambda g: [mamba(blocks=1), IDS[:, :3]],
        stated={"refused": lambda: (PostNorm().eval(), [IDS[:, :3]], "norm")},
    )
]  # fmt: skip


def run_vector(case: Case) -> dict[str, Tensor]:
    """Output and gradients of a mixer."""
    args = case.args
    assert args["activation"] == "silu" and not args["residual_and_norm"]
    assert args["in_proj_order"] == ["u", "z"] and args["x_proj_order"] == ["dt", "B", "C"]
    mixer = MambaMixer(
        args["d_model"], args["d_state"], args["d_conv"], args["expand"], args["dt_rank"], conv_bias=args["conv_bias"],
        bias=args["proj_bias"], inner=args["d_inner"],
    )  # fmt: skip
    names = {name: name.replace(".", "_") for name, _ in mixer.named_parameters()}
    mixer.load_state_dict({name: case.array(role) for name, role in names.items()}, strict=False)
    x = case.array("input").requires_grad_()
    y = mixer(x)
    y.backward(case.array("grad_output"))
    grads = {f"grad_{role}": mixer.get_parameter(name).grad for name, role in names.items()}
    return {"output": y, "grad_input": x.grad, **grads}


@pytest.mark.parametrize("klt", [True, False])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_stays(klt: bool, smooth: bool, bias: bool) -> None:
    model = mamba(bias=bias).double()
    want = model(IDS)
    structure = Structure.build(model, ((IDS,), {}), how="hooks")
    one = MambaQuant(calibrate_mamba(model, [IDS]), klt=klt, smooth=smooth)
    records, skipped = run(one, Context(model, structure, seed=1))
    assert not skipped and [r.path for r in records] == ["blocks.0.norm", "blocks.0.mixer", "blocks.1.mixer"]
    torch.testing.assert_close(model(IDS), want, rtol=1e-9, atol=1e-11)
    assert bool((model.blocks[0].mixer.gate_scale != 1).any()) == smooth


def test_variances_become_equal() -> None:
    model = mamba().double()
    ids = torch.randint(0, 9, (40, 6), generator=torch.Generator().manual_seed(3))

    def spread(m: Model) -> tuple[float, float]:
        found = calibrate_mamba(m, [ids])
        return tuple(
            float(c.diagonal().max() / c.diagonal().min())
            for c in (found.stream["blocks.0.mixer"], found.step["blocks.1.mixer"])
        )

    turned = {}
    for klt in (False, True):
        other = copy.deepcopy(model)
        structure = Structure.build(other, ((ids,), {}), how="hooks")
        run(MambaQuant(calibrate_mamba(other, [ids]), klt=klt), Context(other, structure))
        turned[klt] = spread(other)
    assert turned[True] == pytest.approx((1, 1), rel=1e-6) and min(turned[False]) > 1.05


def test_the_gate_and_the_states_alone() -> None:
    z, s = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64) + 0.5
    torch.testing.assert_close((z / s) * torch.sigmoid(s * (z / s)), nn.functional.silu(z) / s)
    mixer = MambaMixer(4, d_state=3, dt_rank=2).double()
    u, step = torch.randn(2, 5, 8).double(), torch.rand(2, 5, 8).double()
    b, c, scale = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double(), torch.rand(3).double() + 0.5
    torch.testing.assert_close(mixer.scan(u, step, b / scale, c * scale), mixer.scan(u, step, b, c))
    assert smoothing(torch.tensor([4.0, 0.0, 1e-6]), torch.tensor([1.0, 1.0, 9.0])).tolist() == [2.0, 1.0, 0.01]


def test_the_scan_written_out() -> None:
    mixer = MambaMixer(4, d_state=2, dt_rank=1).double()
    x = torch.randn(1, 3, 4).double()
    u, z = mixer.in_proj(x).chunk(2, -1)
    padded = nn.functional.pad(u.mT, (3, 0))
    conv = torch.stack([(padded[..., i : i + 4] * mixer.conv1d.weight[:, 0]).sum(-1) for i in range(3)], 1)
    u = nn.functional.silu(conv + mixer.conv1d.bias)
    h, out = torch.zeros(8, 2).double(), []
    for i in range(3):
        t, b, c = mixer.x_proj(u[0, i]).split([1, 2, 2])
        dt = nn.functional.softplus(mixer.dt_proj(t))
        h = torch.exp(dt[:, None] * -mixer.A_log.exp()) * h + torch.outer(dt * u[0, i], b)
        out.append(mixer.out_proj((h @ c + mixer.D * u[0, i]) * nn.functional.silu(z[0, i])))
    torch.testing.assert_close(mixer(x)[0], torch.stack(out))


def test_refusals() -> None:
    with pytest.raises(BadInput, match="alpha=2"):
        MambaQuant(alpha=2)
    with pytest.raises(BadInput, match="Linear has no laconic.nn.mamba.MambaMixer"):
        calibrate_mamba(nn.Linear(2, 2), [torch.ones(1, 2)])
    with pytest.raises(BadInput, match="no calibration data"):
        calibrate_mamba(mamba(), [])
    with pytest.raises(BadInput, match="saw 1 tokens"):
        calibrate_mamba(mamba(), [IDS[:1, :1]])
    broken = mamba()
    broken.table.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="blocks.0.mixer sees"):
        calibrate_mamba(broken, [IDS])
