"""`robustness_probe`: every corruption is seeded per image and grows with severity; the means are those of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from laconic.errors import BadInput
from laconic.norm import CORRUPTIONS, Corruption, RobustnessProbe, robustness_report
from laconic.norm import _corruptions as drawn
from laconic.testing import Example


def picture(n: int = 2, channels: int = 3, side: int = 32) -> torch.Tensor:
    """Smooth pictures with an edge, in [0.1, 0.9]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    base = 0.5 + 0.3 * torch.sin(9 * x + 3 * y) * torch.cos(7 * y)
    image = torch.stack([base, base.flip(0), (x > 0.5) * 0.6 + 0.2][:channels])
    return torch.stack([image.roll(3 * i, 2) for i in range(n)])


def scorer() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 3))


EXAMPLES = [
    *(
        Example(
            lambda name=name: Corruption(name, 4),
            kind="Data",
            traits=("transform",),
            inputs=[picture()],
            stated={"range": (0.0, 1.0), "fixed": name in ("defocus_blur", "zoom_blur", "brightness", "contrast",
                                                           "pixelate", "jpeg_compression")},
        )
        for name in ("shot_noise", "defocus_blur", "motion_blur", "snow", "frost", "elastic_transform")
    ),
    Example(
        lambda: Corruption("jpeg_compression", 5, value_range=(0, 255)),
        kind="Data",
        traits=("transform",),
        inputs=[255 * picture()[0]],
        stated={"range": (0, 255), "fixed": True},
    ),
    Example(
        lambda: RobustnessProbe(("gaussian_noise", "contrast", "fog"), (1, 5), batch_size=3),
        kind="Probe",
        inputs=lambda g: [scorer(), (picture(4), torch.tensor([0, 1, 2, 0])), {"mirrored": (picture(2), torch.ones(2))}],
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_corruption(name, channels):
    images = picture(3, channels, 24)
    for severity in range(1, 6):
        got = drawn.corrupt(images, name, severity, [1, 2, 3])
        assert got.shape == images.shape and got.dtype == images.dtype
        assert torch.isfinite(got).all() and got.min() >= 0 and got.max() <= 1
        assert not torch.equal(got, images)
    # an image depends on its own seed alone: not on its batch, nor on its place in it
    alone = drawn.corrupt(images[1:2], name, 5, [2])
    torch.testing.assert_close(alone[0], got[1], rtol=0, atol=2e-6)
    assert torch.equal(drawn.corrupt(images, name, 0, [1, 2, 3]), images)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic_transform", "glass_blur", "frost", "pixelate"}))
@pytest.mark.parametrize("side", [32, 96])
def test_the_worst_severity_is_worse_than_the_first(name, side):
    """Not so where the published parameters change in kind (elastic, glass, frost), or pixels merely move (pixelate)."""
    images = picture(3, 3, side)
    first, last = ((drawn.corrupt(images, name, s, [1, 2, 3]) - images).square().mean() for s in (1, 5))
    assert last > 1.2 * first


def test_noise_has_the_stated_strength():
    grey = torch.full((1, 3, 64, 64), 0.5)
    noisy = drawn.corrupt(grey, "gaussian_noise", 1, [0], "small") - grey
    assert noisy.std().item() == pytest.approx(0.04, rel=0.05)
    shot = drawn.corrupt(grey, "shot_noise", 5, [0], "small") - grey
    assert shot.std().item() == pytest.approx((0.5 / 50) ** 0.5, rel=0.05)
    hit = drawn.corrupt(grey, "impulse_noise", 5, [0], "small") != grey
    assert hit.double().mean().item() == pytest.approx(0.07, abs=0.01)


def test_brightness_keeps_the_hue():
    image = torch.tensor([0.2, 0.4, 0.1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    got = drawn.corrupt(image, "brightness", 2, [0], "small")[0, :, 0, 0]
    torch.testing.assert_close(got, torch.tensor([0.25, 0.5, 0.125]))


def test_contrast_is_about_the_mean_of_each_channel():
    images = picture(1)
    got = drawn.corrupt(images, "contrast", 2, [0], "small")
    torch.testing.assert_close(got.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(got.std((2, 3)), 0.5 * images.std((2, 3)))


def test_glass_moves_pixels_and_makes_none():
    image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    got = drawn.glass_blur(image.numpy(), [np.random.default_rng(0)], 0.0, 1, 2)
    assert not np.array_equal(got, image.numpy())
    np.testing.assert_array_equal(np.sort(got.ravel()), np.sort(image.numpy().ravel()))


def test_jpeg_agrees_with_pillow():
    """The lossy part alone, in shades of grey: how a decoder fills in half-sized colour is its own affair."""
    import io

    from PIL import Image

    picture_ = (255 * picture(1, 1, 32)[0]).round().expand(3, -1, -1)
    stored = io.BytesIO()
    Image.fromarray(picture_.permute(1, 2, 0).byte().numpy()).save(stored, "JPEG", quality=40)
    want = torch.from_numpy(np.asarray(Image.open(stored)).copy()).permute(2, 0, 1) / 255
    got = drawn.corrupt(picture_[None] / 255, "jpeg_compression", 5, [0], "small")[0]
    before, off = (picture_ / 255 - want).abs().mean(), (got - want).abs().mean()
    assert off < 0.5 * before and off < 0.01


def test_pixelate_keeps_the_mean():
    images = picture(1, 3, 20)
    got = drawn.corrupt(images, "pixelate", 1, [0], "large")  # 20 -> 12 -> 20
    assert got.mean().item() == pytest.approx(images.mean().item(), abs=0.02)
    assert len(got[0, 0, 10].unique()) <= 12


def test_the_scale_follows_the_side():
    assert torch.equal(
        drawn.corrupt(picture(1, 3, 64), "contrast", 1, [0]),
        drawn.corrupt(picture(1, 3, 64), "contrast", 1, [0], "small"),
    )
    assert torch.equal(
        drawn.corrupt(picture(1, 3, 65), "contrast", 1, [0]),
        drawn.corrupt(picture(1, 3, 65), "contrast", 1, [0], "large"),
    )


def test_the_means_are_those_of_the_table():
    model = scorer().eval()
    images, labels = picture(6), torch.tensor([0, 1, 2, 0, 1, 2])
    found = robustness_report(
        model, (images, labels), {"upside down": (images.flip(2), labels)}, corruptions=("shot_noise", "fog", "snow"),
        severities=(2, 4),
    )  # fmt: skip
    scores = {(row["corruption"], row["severity"]): row["score"] for row in found.table if row["severity"]}
    assert len(scores) == 6 and found.mpc == pytest.approx(sum(scores.values()) / 6)
    weather = [score for (name, _), score in scores.items() if name != "shot_noise"]
    assert found.groups["weather"][0] == pytest.approx(sum(weather) / 4)
    assert found.clean == pytest.approx((model(images).argmax(1) == labels).double().mean().item())
    assert found.domains["upside down"] == pytest.approx(
        (model(images.flip(2)).argmax(1) == labels).double().mean().item()
    )
    if found.clean:
        assert found.rpc == pytest.approx(found.mpc / found.clean)


def test_the_batch_size_changes_nothing():
    data = (picture(5), torch.tensor([0, 1, 2, 0, 1]))
    tables = [RobustnessProbe(("impulse_noise", "snow"), (3,), batch_size=b)(scorer(), data).table for b in (2, 5)]
    assert tables[0] == tables[1]


def test_a_dense_metric_and_scores_of_ones_own():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    images = picture(2)
    found = RobustnessProbe(("contrast",), (1,))(model, (images, torch.zeros(2, 32, 32, dtype=torch.int64)))
    assert found.clean == pytest.approx((model(images).argmax(1) == 0).double().mean().item())
    own = RobustnessProbe(("contrast",), (1,), lambda outputs, labels: outputs.flatten(1).sum(1))
    assert own(model, (images, labels := torch.zeros(2))).clean == pytest.approx(
        model(images).flatten(1).sum(1).mean().item(), rel=1e-5
    ), labels


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Corruption("rain"), "no corruption 'rain': there are gaussian_noise"),
        (lambda: Corruption("fog", 6), "the severity is 1 to 5"),
        (lambda: Corruption("fog", value_range=(1, 1)), "black must be less than white"),
        (lambda: Corruption("fog", scale="huge"), "auto, small or large"),
        (lambda: Corruption("fog")(torch.zeros(2, 4, 8, 8)), r"\(2, 4, 8, 8\)"),
        (lambda: RobustnessProbe(()), "at least one corruption"),
        (lambda: RobustnessProbe(severities=(0,)), "clean images are always shown"),
        (lambda: RobustnessProbe()(scorer(), (picture(0 + 1)[:0], torch.zeros(0))), "no image to look at"),
        (lambda: RobustnessProbe(("fog",), (1,))(scorer(), (picture(2), torch.zeros(2, 1))), "logits"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(BadInput, match=message):
        make()
