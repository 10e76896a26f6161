"""`kd_toolbox`: the equations written out naively, what is left out, what is refused, and the recorded vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from laconic.distill import AttentionMapKD, AttentionTransfer, FeatureMSE, HardLabelKD, KDLoss, RelationKD, regressor
from laconic.testing import Example, Ints
from laconic.testing.vectors import Case


def maps(g: torch.Generator, heads: int = 2) -> Tensor:
    """Attention maps (3, heads, 4, 4)."""
    return torch.randn(3, heads, 4, 4, generator=g).softmax(-1)


def adapter() -> nn.Module:
    """From 3 to 5 channels, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return regressor(3, 5, 2)


EXAMPLES = [
    Example(lambda reduction="mean": KDLoss(reduction=reduction), kind="Loss", inputs=[(4, 3), (4, 3), Ints((4,), 3)]),
    Example(
        lambda reduction="mean": HardLabelKD(reduction=reduction), kind="Loss", inputs=[(4, 3), (4, 3), Ints((4,), 3)]
    ),
    Example(
        lambda reduction="mean": FeatureMSE(adapter(), reduction=reduction),
        kind="Loss",
        inputs=[(4, 3, 2, 2), (4, 5, 2, 2)],
    ),
    Example(
        lambda reduction="mean": AttentionTransfer(beta=1.0, reduction=reduction),
        kind="Loss",
        inputs=[(4, 3, 6, 6), (4, 5, 3, 3)],
    ),
    Example(
        lambda reduction="mean": AttentionMapKD("kl", reduction=reduction),
        kind="Loss",
        inputs=lambda g: [maps(g), maps(g)],
    ),
    Example(
        lambda reduction="mean": RelationKD(reduction=reduction),
        kind="Loss",
        traits=("pairwise",),
        inputs=[(5, 3), (5, 4)],
    ),
]

CONVENTION = {"batchmean": "batchmean", "sum/numel": "numel"}


def run_vector(case: Case) -> dict[str, Tensor]:
    """Loss and gradient of one recorded call."""
    args = dict(case.args)
    student, teacher = case.array("student").requires_grad_(), case.array("teacher")
    for name in ("T", "alpha"):
        if name in case:
            args[name] = float(case.array(name))
    if case.name.startswith("rkd"):
        loss = RelationKD(
            args["distance_weight"], args["angle_weight"], delta=args["huber_delta"], eps=args["distance_eps"]
        )
        loss(student, teacher).backward()
        assert student.grad is not None
        distance, angle = loss.parts(student, teacher)
        return {"distance": distance.mean(), "angle": angle.mean(), "grad_student": student.grad}
    if case.name.startswith("attention"):
        distance = "mean_square" if args["reduction"].startswith("mean of squared") else "norm"
        value = AttentionTransfer(args["p"], args["beta"], distance=distance)(student, teacher)
    elif case.name.startswith("hard"):
        value = HardLabelKD(args["alpha"])(student, teacher, case.array("target"))
    else:
        task = args.get("task_loss", True)
        convention = "soft_cross_entropy" if "soft_ce" in case.name else CONVENTION[args["reduction"]]
        loss = KDLoss(
            args["T"], args["alpha"] if task else 1.0, convention=convention, t_squared=args["t_squared"]
        )
        value = loss(student, teacher, case.array("target") if task else None)
    value.backward()
    assert student.grad is not None
    return {"loss": value, "grad_student": student.grad}


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, -2.0]])
TAUGHT = torch.tensor([[1.0, 0.0, 3.0], [-1.0, 2.0, 0.0]])
LABELS = torch.tensor([2, 1])


def softened(row: Tensor, T: float) -> list[float]:
    powers = [math.exp(float(x) / T) for x in row]
    return [x / sum(powers) for x in powers]


def divergence(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("convention", ["batchmean", "numel"])
def test_the_equation_of_kd(direction: str, convention: str) -> None:
    T, alpha = 3.0, 0.7
    got = KDLoss(T, alpha, convention=convention, direction=direction, reduction="none")(LOGITS, TAUGHT, LABELS)
    for i in range(2):
        p, q = softened(TAUGHT[i], T), softened(LOGITS[i], T)
        middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        js = (divergence(p, middle) + divergence(q, middle)) / 2
        soft = {"forward": divergence(p, q), "reverse": divergence(q, p), "js": js}[direction]
        hard = -math.log(softened(LOGITS[i], 1.0)[int(LABELS[i])])
        weight = T**2 / (3 if convention == "numel" else 1)
        assert float(got[i]) == pytest.approx((1 - alpha) * hard + alpha * weight * soft, rel=1e-5)


def test_a_large_temperature_keeps_the_size_of_the_gradient() -> None:
    norms = []
    for T in (20.0, 40.0):
        student = LOGITS.clone().requires_grad_()
        KDLoss(T, 1.0)(student, TAUGHT).backward()
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_classes_masked_by_minus_infinity_count_for_nothing() -> None:
    wide = torch.cat([LOGITS, torch.full((2, 1), -torch.inf)], 1).requires_grad_()
    taught = torch.cat([TAUGHT, torch.full((2, 1), -torch.inf)], 1)
    for direction in ("forward", "reverse"):
        wide.grad = None
        value = KDLoss(2.0, 1.0, direction=direction)(wide, taught)
        value.backward()
        assert value.item() == pytest.approx(float(KDLoss(2.0, 1.0, direction=direction)(LOGITS, TAUGHT)), rel=1e-6)
        assert torch.isfinite(wide.grad).all()


def test_tokens_that_do_not_count_are_left_out() -> None:
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    target = torch.randint(3, (2, 5))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()
    loss = KDLoss(reduction="mean")
    expected = loss(student[mask], teacher[mask], target[mask])
    assert torch.allclose(loss(student, teacher, target, mask), expected)
    assert torch.allclose(loss(student, teacher, target.masked_fill(~mask, -100)), expected)
    with pytest.raises(ValueError, match="nothing to compare"):
        loss(student, teacher, target, torch.zeros(2, 5))


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = TAUGHT.clone().requires_grad_()
    student = LOGITS.clone().requires_grad_()
    total = KDLoss()(student, teacher, LABELS) + RelationKD()(student, teacher) + FeatureMSE()(student, teacher)
    total.backward()
    assert teacher.grad is None and student.grad is not None


def test_the_equation_of_relations() -> None:
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def huber(a: float, b: float) -> float:
        gap = abs(a - b)
        return gap**2 / 2 if gap <= 1 else gap - 0.5

    def far(z: Tensor) -> list[list[float]]:
        d = [[float((a - b).norm()) for b in z] for a in z]
        mean = sum(map(sum, d)) / 12
        return [[value / mean for value in row] for row in d]

    def bent(z: Tensor, i: int, j: int, k: int) -> float:
        a, b = z[j] - z[i], z[k] - z[i]
        length = float(a.norm() * b.norm())
        return float(a @ b) / length if length else 0.0

    distance, angle = RelationKD().parts(x, y)
    for i in range(4):
        assert float(distance[i]) == pytest.approx(sum(huber(far(x)[i][j], far(y)[i][j]) for j in range(4)) / 4)
        total = sum(huber(bent(x, i, j, k), bent(y, i, j, k)) for j in range(4) for k in range(4))
        assert float(angle[i]) == pytest.approx(total / 16)


def test_relations_do_not_depend_on_scale_and_rotation() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    turned = 3 * x @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert float(RelationKD()(turned, x)) == pytest.approx(0, abs=1e-12)


def test_attention_is_the_energy_by_place() -> None:
    student = torch.zeros(1, 2, 1, 2)
    student[0, :, 0, 0] = 3.0
    teacher = torch.zeros(1, 5, 1, 2)
    teacher[0, 0, 0, 1] = 0.5
    assert float(AttentionTransfer(beta=1.0)(student, teacher)) == pytest.approx(1.0)  # (1, 0) and (0, 1)
    assert float(AttentionTransfer(beta=1.0, distance="norm")(student, teacher)) == pytest.approx(2**0.5)
    assert float(AttentionTransfer()(student, 7 * student)) == pytest.approx(0.0, abs=1e-9)


def test_padding_is_left_out_of_attention_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = maps(generator), maps(generator)
    mask = torch.tensor([[1, 1, 1, 0]] * 3)
    inner = (s[:, :, :3, :3] - t[:, :, :3, :3]).square().mean()
    assert torch.allclose(AttentionMapKD()(s, t, mask), inner)
    causal = t.tril() / t.tril().sum(-1, keepdim=True)
    assert float(AttentionMapKD("kl")(causal, causal)) == pytest.approx(0.0, abs=1e-6)
    seen = causal != 0
    assert torch.allclose(AttentionMapKD()(s, causal), ((s - causal) ** 2)[seen].view(3, -1).mean())


def test_other_numbers_of_heads_are_compared_by_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = maps(generator, 2), maps(generator, 4)
    assert torch.allclose(AttentionMapKD()(s, t), (s.mean(1) - t.mean(1)).square().mean())


def test_directions_of_features() -> None:
    x = torch.randn(3, 4, 2, 2)
    assert float(FeatureMSE(normalize=True)(5 * x, x)) == pytest.approx(0, abs=1e-12)
    assert float(FeatureMSE()(5 * x, x)) == pytest.approx(float((4 * x).square().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KDLoss(T=0), "T=0 must be positive"),
        (lambda: KDLoss(alpha=1.5), "alpha=1.5"),
        (lambda: KDLoss(convention="mean"), "convention='mean' is not known; it is one of batchmean, numel"),
        (lambda: KDLoss(convention="soft_cross_entropy", direction="js"), "'forward' alone"),
        (lambda: KDLoss()(LOGITS, TAUGHT), "alpha=0.9 needs labels"),
        (lambda: KDLoss()(LOGITS, TAUGHT[:, :2], LABELS), r"logits of shapes \(2, 3\) and \(2, 2\)"),
        (lambda: KDLoss()(LOGITS, TAUGHT, LABELS[:1]), r"labels of shape \(1,\)"),
        (lambda: FeatureMSE()(LOGITS, TAUGHT[:, :2]), "give an adapter"),
        (lambda: AttentionTransfer()(LOGITS, TAUGHT), "both must be"),
        (lambda: RelationKD()(LOGITS[:1], TAUGHT[:1]), "at least 2"),
    ],
)
def test_refusals(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_the_convention_is_printed() -> None:
    assert "convention='numel'" in repr(nn.Sequential(KDLoss(convention="numel")))
