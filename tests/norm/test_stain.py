"""`stain`: Macenko's and Reinhard's normalization on images whose stains are known, and the probe for collapse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laconic.errors import BadInput
from laconic.norm import MacenkoNormalizer, ReinhardNormalizer, from_lab, group_collapse, to_lab
from laconic.testing import Case, Example

LIGHT = 240.0
STAINS = torch.tensor([[0.65, 0.30], [0.70, 0.85], [0.29, 0.43]], dtype=torch.float64)
ELSEWHERE = torch.tensor([[0.50, 0.25], [0.75, 0.85], [0.43, 0.46]], dtype=torch.float64)


def amounts(seed: int = 0, pixels: int = 40 * 40) -> Tensor:
    """Concentrations (2, pixels), high enough to count as tissue; some pixels have only one of the stains."""
    drawn = 0.8 + torch.rand(2, pixels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[0, : pixels // 8] = 0.0
    drawn[1, -pixels // 8 :] = 0.0
    return drawn


def slide(stains: Tensor = STAINS, of: Tensor | None = None, side: int = 40) -> Tensor:
    """The image that Beer and Lambert's law gives."""
    unit = stains / stains.norm(dim=0)
    light = LIGHT * torch.exp(-(unit @ (amounts() if of is None else of)))
    return (light - 1).clamp(0, 255).round().to(torch.uint8).T.reshape(side, side, 3)


def target() -> Tensor:
    return slide(ELSEWHERE, 1.3 * amounts(1))


EXAMPLES = [
    Example(
        lambda: MacenkoNormalizer().fit(target()),
        kind="Data",
        traits=("transform",),
        inputs=lambda g: [slide()],
        stated={"fixed": True, "range": (0, 255)},
    ),
    Example(
        lambda: ReinhardNormalizer().fit(target()),
        kind="Data",
        traits=("transform",),
        inputs=lambda g: [slide()],
        stated={"fixed": True, "range": (0, 255)},
    ),
    Example(
        lambda: ReinhardNormalizer("modified").fit(target()),
        kind="Data",
        traits=("transform",),
        inputs=lambda g: [slide()],
        stated={"fixed": True, "range": (0, 255)},
    ),
]


def run_vector(case: Case) -> dict[str, Tensor | list[Tensor]]:
    """The normalized image, or the stains that were fitted."""
    args, image = case.args, case.array("input")
    if "Io" not in args:
        normalizer = ReinhardNormalizer(args["method"], least_stretch=args.get("q_floor", 0.05))
        return {"output": normalizer.fit(case.array("target"))(image)}
    assert args["percentile"] == "linear interpolation" and args["covariance"] == "n-1", args
    macenko = MacenkoNormalizer(
        args.get("reference_HE"),
        args.get("reference_maxC"),
        light=args["Io"],
        alpha=args["alpha"],
        beta=args["beta"],
        percentile=args["max_percentile"],
    )
    if "stain_matrix" in case:
        macenko.fit(image)
        return {"stain_matrix": macenko.stain_matrix, "max_concentration": macenko.max_concentration}
    if "target" in case:
        macenko.fit(case.array("target"))
    found = macenko.separate(image)
    shown = {"output": found.image, "hematoxylin": found.hematoxylin, "eosin": found.eosin}
    return {role: value for role, value in shown.items() if role in case}


def test_the_stains_of_a_slide_are_found():
    found = MacenkoNormalizer(light=LIGHT, alpha=0.1).fit(slide())
    torch.testing.assert_close(found.stain_matrix, STAINS / STAINS.norm(dim=0), rtol=0, atol=0.03)


def test_one_scene_in_two_stains_comes_out_alike():
    here, there = slide(STAINS), slide(ELSEWHERE, 0.8 * amounts())
    normalizer = MacenkoNormalizer(light=LIGHT).fit(target())
    before = (here.double() - there.double()).abs().mean()
    after = (normalizer(here).double() - normalizer(there).double()).abs().mean()
    assert after < before / 5


def test_an_image_normalized_to_itself_stays():
    image = slide()
    # Rounding to whole grey levels, and the one that optical density counts from.
    assert (MacenkoNormalizer(light=LIGHT).fit(image)(image).int() - image.int()).abs().max() <= 2
    assert (ReinhardNormalizer().fit(image)(image).int() - image.int()).abs().max() <= 1


def test_reinhard_gives_the_mean_and_deviation_of_the_target():
    wanted, found = to_lab(target()), to_lab(ReinhardNormalizer().fit(target())(slide()))
    torch.testing.assert_close(found.mean((0, 1)), wanted.mean((0, 1)), rtol=0, atol=2.0)
    torch.testing.assert_close(found.std((0, 1)), wanted.std((0, 1)), rtol=0.1, atol=1.0)


def test_lab_of_known_colours_and_back():
    colours = torch.tensor([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]], dtype=torch.uint8)
    published = [[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    lab = (to_lab(colours) - torch.tensor([0, 128, 128])) / torch.tensor([2.55, 1, 1])
    torch.testing.assert_close(lab[0], torch.tensor(published, dtype=torch.float64), rtol=0, atol=0.05)
    everything = torch.randint(0, 256, (50, 50, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert (from_lab(to_lab(everything)).int() - everything.int()).abs().max() <= 1


def test_the_sign_of_eigenvectors_does_not_matter(monkeypatch):
    want = MacenkoNormalizer(light=LIGHT).fit(slide()).stain_matrix
    eigh = torch.linalg.eigh
    for signs in ([1, -1, 1], [1, 1, -1], [1, -1, -1]):

        def flipped(matrix, signs=signs):
            values, vectors = eigh(matrix)
            return torch.return_types.linalg_eigh((values, vectors * torch.tensor(signs, dtype=vectors.dtype)))

        monkeypatch.setattr(torch.linalg, "eigh", flipped)
        found = MacenkoNormalizer(light=LIGHT).fit(slide()).stain_matrix
        torch.testing.assert_close(found, want, rtol=0, atol=1e-9)


def test_too_little_tissue_is_left_alone_and_told():
    empty = torch.full((20, 20, 3), 239, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="fewer than 50 pixels"):
        assert torch.equal(MacenkoNormalizer()(empty), empty)
    with pytest.raises(BadInput, match="of the target are tissue"):
        MacenkoNormalizer().fit(empty)


def test_an_image_of_one_colour_stays_finite():
    grey = torch.full((20, 20, 3), 100, dtype=torch.uint8)
    for normalizer in (ReinhardNormalizer().fit(target()), ReinhardNormalizer("modified").fit(target())):
        assert normalizer(grey).unique(dim=0).shape[0] == 1
    once = slide(of=torch.stack([amounts()[0], torch.zeros(1600, dtype=torch.float64)]))
    assert MacenkoNormalizer(light=LIGHT)(once).shape == once.shape


@pytest.mark.parametrize("wrong", [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, 3)])
def test_other_images_are_refused(wrong):
    for normalizer in (MacenkoNormalizer(), ReinhardNormalizer().fit(slide())):
        with pytest.raises(BadInput, match=r"a \(h, w, 3\) image of uint8"):
            normalizer(wrong)


def test_impossible_options_are_refused():
    with pytest.raises(BadInput, match="alpha=60"):
        MacenkoNormalizer(alpha=60)
    with pytest.raises(BadInput, match=r"\(2, 3\)"):
        MacenkoNormalizer(torch.ones(2, 3))
    with pytest.raises(BadInput, match="method is 'vahadane'"):
        ReinhardNormalizer("vahadane")
    with pytest.raises(BadInput, match="no target"):
        ReinhardNormalizer()(slide())


def test_collapse_of_separate_and_of_mixed_groups():
    noise = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(60) % 3
    mixed, apart = group_collapse(noise, groups), group_collapse(noise + 100 * groups[:, None], groups)
    assert mixed.explained < 0.15 and abs(mixed.silhouette) < 0.1 and mixed.retrieved < 0.6
    assert apart.explained > 0.99 and apart.silhouette > 0.9 and apart.retrieved == 1.0
    # One-way ANOVA by hand: group means 1 and 4 around 2.5, each example 1 from its group's mean.
    by_hand = group_collapse(torch.tensor([[0.0], [2.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
    assert by_hand.explained == pytest.approx(4 * 1.5**2 / (4 * 1.5**2 + 4))
    silhouettes = [(4 - 2) / 4, (2 - 2) / 2, (2 - 2) / 2, (4 - 2) / 4]
    assert by_hand.silhouette == pytest.approx(sum(silhouettes) / 4)
    with pytest.raises(BadInput, match="two groups of two"):
        group_collapse(noise, torch.zeros(60))
