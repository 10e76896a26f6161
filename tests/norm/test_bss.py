"""`bss`: the transform by hand, what of a picture stays, one style to a batch, jitter, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from laconic.norm import BatchStyleStandardization, low_frequencies, standardize_style
from laconic.testing import Example

EXAMPLES = [
    Example(
        lambda options=options: BatchStyleStandardization((0.05, 0.5), **options),
        kind="Data",
        traits=("transform",),
        inputs=lambda g: [torch.rand(5, 3, 8, 6, generator=g)],
        stated={"range": (0.0, 1.0)},
    )
    for options in ({}, {"per_image": True}, {"jitter": 0.4})
]


def pictures(count=4, height=9, width=8):
    return torch.rand(count, 2, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 1.0])
def test_the_equation(ratio):
    """With numpy, on the shifted plane, as the paper draws it."""
    x = pictures()
    got = standardize_style(x, torch.tensor([2, 2, 2, 2]), ratio, (-100.0, 100.0))
    height, width = x.shape[2:]
    reach = [min(int(np.sqrt(ratio) * size / 2), (size - 1) // 2) for size in (height, width)]
    rows = slice(height // 2 - reach[0], height // 2 + reach[0] + 1)
    columns = slice(width // 2 - reach[1], width // 2 + reach[1] + 1)
    for n in range(4):
        for c in range(2):
            own, other = (np.fft.fftshift(np.fft.fft2(x[k, c].numpy())) for k in (n, 2))
            amplitude = np.abs(own)
            amplitude[rows, columns] = np.abs(other)[rows, columns]
            back = np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * np.angle(own))))
            assert np.abs(back.imag).max() < 1e-12
            np.testing.assert_allclose(got[n, c].numpy(), back.real, atol=1e-12)


def test_the_reference_stays_as_it_is():
    x = pictures()
    torch.testing.assert_close(standardize_style(x, torch.full((4,), 1), 0.3)[1], x[1])


def test_all_pictures_get_one_mean_colour_and_keep_their_phases():
    x = pictures(6, 16, 16)
    y = BatchStyleStandardization((0.02, 0.02), valid=(-9.0, 9.0))(x, generator=torch.Generator().manual_seed(3))
    means = y.mean((2, 3))
    torch.testing.assert_close(means, means[:1].expand(6, 2))
    before, after = torch.fft.fft2(x), torch.fft.fft2(y)
    torch.testing.assert_close(torch.polar(after.abs(), before.angle()), after)


def test_fourier_augmentation_gives_several_styles():
    x = pictures(8, 16, 16)
    y = BatchStyleStandardization((0.02, 0.02), per_image=True)(x, generator=torch.Generator().manual_seed(0))
    assert len(y.mean((2, 3))[:, 0].round(decimals=6).unique()) > 2


def test_jitter_is_one_for_the_batch():
    x = 0.4 + 0.2 * pictures(3)
    plain, changed = (
        BatchStyleStandardization(jitter=j)(x, generator=torch.Generator().manual_seed(1)) for j in (0.0, 0.1)
    )
    slope = (changed - changed[0, 0, 0, 0]) / (plain - plain[0, 0, 0, 0])
    kept = slope[slope.isfinite()]
    torch.testing.assert_close(kept, kept[:1].expand_as(kept))


def test_the_square_is_symmetric():
    for height, width in ((8, 8), (7, 6), (1, 5)):
        low = low_frequencies(height, width, 0.5)
        turned = low.flip(0, 1).roll((1, 1), (0, 1))  # frequency u to -u
        assert torch.equal(low, turned) and low[0, 0]


def test_no_pictures_one_picture_and_half_precision():
    style = BatchStyleStandardization()
    assert style(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    x = pictures(1).float()
    torch.testing.assert_close(style(x), x)
    assert style(x.half()).dtype == torch.float16


def test_refusals():
    with pytest.raises(ValueError, match=r"ratio is \(0.2, 0.1\)"):
        BatchStyleStandardization((0.2, 0.1))
    with pytest.raises(ValueError, match="is empty"):
        BatchStyleStandardization(valid=(1.0, 1.0))
    with pytest.raises(ValueError, match="jitter is -1"):
        BatchStyleStandardization(jitter=-1)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\)"):
        BatchStyleStandardization()(torch.zeros(3, 4, 4))
