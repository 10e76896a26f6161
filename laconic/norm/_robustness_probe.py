"""`robustness_probe`: how much of what a model can do is left under fifteen corruptions of its images.

With P the metric on clean images and P_{c,s} on the **same** images under corruption c at severity s = 1 .. 5:

    mPC = mean_c mean_s P_{c,s},    rPC = mPC / P,    and both within each group: noise, blur, weather, digital

What a model does on data from elsewhere is another thing than what it does on corrupted ones: `domains` are shown
beside, and never averaged in.

The noise that an image gets depends on (seed, corruption, severity, image), not on the batch, so two models see the
same. The model runs in evaluation mode, unless it adapts at test time: then attach first and give the batches of the
stream. Compressed models: run the probe on both, for compression moves P and rPC alike. What each corruption does, and
from where the severities come, stands in `laconic.norm._corruptions`.

Source: "Benchmarking the Robustness of Instance Segmentation Models", Dalva, Pehlivan, Altındiş, Dundar, 2021,
arXiv 2109.01123; no code was found. The corruptions are those of arXiv 1903.12261.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from laconic.norm import Corruption, RobustnessProbe
    >>> images = torch.rand(4, 3, 32, 32)
    >>> Corruption("fog", severity=3)(images, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 32, 32])
    >>> probe = RobustnessProbe(corruptions=("contrast", "pixelate"), severities=(5,))
    >>> found = probe(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), (images, torch.tensor([0, 1, 0, 1])))
    >>> [row["corruption"] for row in found.table]
    ['clean', 'contrast', 'pixelate', 'mean', 'mean of digital']
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core._random import derived_seed
from laconic.core.card import Card
from laconic.core.figure import cells
from laconic.core.modes import evaluating, modes_restored
from laconic.errors import BadInput

from ._corruptions import CORRUPTIONS, GROUP_OF, GROUPS, check, corrupt

Metric = Callable[[Any, Tensor], Tensor]


class Corruption:
    """One corruption as a transform of images.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5; 0 changes nothing.
        value_range: what black and white are in the images.
        scale: "small" or "large", the set of published parameters; "auto" takes the small one up to 64 pixels.

    Raises:
        BadInput: a name, severity, range or scale that cannot be.
    """

    def __init__(
        self, name: str, severity: int = 3, *, value_range: tuple[float, float] = (0.0, 1.0), scale: str = "auto"
    ):
        check(name, severity, scale)
        self.low, self.high = _limits(value_range)
        self.name, self.severity, self.scale = name, severity, scale

    def __call__(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The corrupted images, (c, h, w) or (n, c, h, w), c being 1 or 3; each draws from a seed of its own."""
        batch = images[None] if images.ndim == 3 else images
        seeds = torch.randint(2**62, (len(batch),), generator=generator).tolist()
        found = self.from_seeds(batch, seeds)
        return found[0] if images.ndim == 3 else found

    def from_seeds(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Corrupted images (n, c, h, w) from n seeds: the same image and seed give the same in any batch."""
        unit = ((images.float() - self.low) / (self.high - self.low)).clamp(0, 1)
        found = corrupt(unit, self.name, self.severity, seeds, self.scale)
        return (found * (self.high - self.low) + self.low).to(images.dtype)

    def __repr__(self) -> str:
        return f"Corruption({self.name!r}, severity={self.severity}, value_range=({self.low}, {self.high}))"


@dataclass(frozen=True)
class RobustnessFinding:
    """What was found.

    Attributes:
        table: rows of corruption, group, severity, score, relative (to clean): clean, then every corruption and
            severity, the mean (mPC and rPC), that of every group, and other domains.
        clean: P.
        mpc, rpc: as above.
        groups: group -> its (mPC, rPC).
        domains: name -> the metric there.
        cost: forward passes, images, seconds.
    """

    table: Sequence[Mapping[str, Any]]
    clean: float
    mpc: float
    rpc: float
    groups: Mapping[str, tuple[float, float]]
    domains: Mapping[str, float]
    cost: Mapping[str, float]

    def plot(self) -> str:
        """A cell for each corruption and severity, in SVG."""
        severities = sorted({row["severity"] for row in self.table if row["severity"]})
        scores = {(row["corruption"], row["severity"]): row["score"] for row in self.table}
        names = list(dict.fromkeys(row["corruption"] for row in self.table if row["severity"]))
        rows = {name: [scores.get((name, s), math.nan) for s in severities] for name in names}
        title = f"clean {self.clean:.3g}, mean under corruption {self.mpc:.3g}, relative {self.rpc:.3g}"
        return cells(rows, [f"severity {s}" for s in severities], title)


def right(outputs: Any, labels: Tensor) -> Tensor:
    """1 where the largest logit, along the second dimension, is the label's; (n,), a mean over places if there are any."""
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    if logits.ndim != labels.ndim + 1 or len(logits) != len(labels):
        raise BadInput(
            f"robustness_probe: outputs {tuple(logits.shape)} and labels {tuple(labels.shape)}: logits (n, k, ...) and "
            "classes (n, ...) are needed, or a metric of your own"
        )
    hits = (logits.argmax(1) == labels).double()
    return hits.flatten(1).mean(1) if hits.ndim > 1 else hits


class RobustnessProbe:
    """The probe: a metric on images, clean and corrupted.

    Args:
        corruptions: names, all fifteen by default.
        severities: of 1 to 5.
        metric: (outputs, labels) -> a score for each example (n,), higher being better; accuracy by default.
        value_range: what black and white are in the images; by default the model's `input_range`, else 0 and 1.
        scale: see `Corruption`.
        seed: of all that is drawn.
        batch_size: examples to a forward pass, where data come as whole tensors.
        adapting: leave the model's mode and let it keep state between batches; the caller resets it.

    Raises:
        BadInput: a corruption, severity or range that cannot be.
    """

    reads = "labelled"

    def __init__(
        self,
        corruptions: Sequence[str] = CORRUPTIONS,
        severities: Iterable[int] = range(1, 6),
        metric: Metric = right,
        *,
        value_range: tuple[float, float] | None = None,
        scale: str = "auto",
        seed: int = 0,
        batch_size: int = 256,
        adapting: bool = False,
    ):
        self.corruptions, self.severities = tuple(corruptions), tuple(severities)
        if not self.corruptions or not self.severities:
            raise BadInput("robustness_probe: at least one corruption and one severity are needed")
        for name in self.corruptions:
            for severity in self.severities:
                check(name, severity, scale)
                if severity == 0:
                    raise BadInput("robustness_probe: severities are 1 to 5; the clean images are always shown")
        if value_range is not None:
            _limits(value_range)
        self.metric, self.value_range, self.scale, self.seed = metric, value_range, scale, seed
        self.batch_size, self.adapting = batch_size, adapting

    def __call__(self, model: nn.Module, data: Any, domains: Mapping[str, Any] | None = None) -> RobustnessFinding:
        """What it finds.

        Args:
            model: images -> what the metric reads.
            data: (images, labels) as two tensors, or batches of such pairs.
            domains: name -> data from elsewhere, which are not corrupted.

        Raises:
            BadInput: there is no example, or outputs and labels do not fit.
        """
        began = time.perf_counter()
        self._passes = self._images = 0
        with modes_restored(model) if self.adapting else evaluating(model):
            batches = list(self._batches(data))
            clean = self._score(model, batches, None)
            scores = {
                (name, severity): self._score(model, batches, (name, severity))
                for name in self.corruptions
                for severity in self.severities
            }
            elsewhere = {
                name: self._score(model, list(self._batches(other)), None) for name, other in (domains or {}).items()
            }
        cost = {
            "forward passes": self._passes, "images": self._images, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        return _finding(clean, scores, elsewhere, cost)

    @torch.no_grad()
    def _score(self, model: nn.Module, batches: list, condition: tuple[str, int] | None) -> float:
        held = next(iter(model.parameters()), torch.empty(0))
        limits = self.value_range or getattr(model, "input_range", (0.0, 1.0))
        parts, at = [], 0
        for images, labels in batches:
            if condition is not None:
                name, severity = condition
                change = Corruption(name, severity, value_range=limits, scale=self.scale)
                number = CORRUPTIONS.index(name)
                seeds = [derived_seed(self.seed, number, severity, at + i) for i in range(len(images))]
                images = change.from_seeds(images, seeds)
            parts.append(self.metric(model(images.to(held.device)), labels.to(held.device)).double().cpu())
            at += len(images)
            self._passes += 1
        self._images += at
        return float(torch.cat(parts).mean())

    def _batches(self, data: Any) -> Iterable[tuple[Tensor, Tensor]]:
        if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            images, labels = data
            data = list(zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True))
        pairs = [(images, labels) for images, labels in data if len(images)]
        if not pairs:
            raise BadInput("robustness_probe: there is no image to look at")
        return pairs


def robustness_report(model: nn.Module, data: Any, domains: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """The finding of a `RobustnessProbe` with these options."""
    return RobustnessProbe(**options)(model, data, domains)


def _finding(
    clean: float,
    scores: Mapping[tuple[str, int], float],
    domains: Mapping[str, float],
    cost: Mapping[str, float],
) -> RobustnessFinding:
    def relative(score: float) -> float:
        return score / clean if clean else math.nan

    def row(name: str, group: str, severity: int, score: float) -> dict[str, Any]:
        return {
            "corruption": name, "group": group, "severity": severity, "score": score, "relative": relative(score),
        }  # fmt: skip

    table = [row("clean", "", 0, clean)]
    table += [row(name, GROUP_OF[name], severity, score) for (name, severity), score in scores.items()]
    mpc = sum(scores.values()) / len(scores)  # the same severities for all: the mean of means is the mean
    table.append(row("mean", "", 0, mpc))
    groups = {}
    for group, names in GROUPS.items():
        mine = [score for (name, _), score in scores.items() if name in names]
        if mine:
            mean = sum(mine) / len(mine)
            groups[group] = (mean, relative(mean))
            table.append(row(f"mean of {group}", group, 0, mean))
    table += [row(name, "other data", 0, score) for name, score in domains.items()]
    return RobustnessFinding(table, clean, mpc, relative(mpc), groups, dict(domains), cost)


def _limits(value_range: tuple[float, float]) -> tuple[float, float]:
    low, high = value_range
    if not low < high:
        raise BadInput(f"Corruption: value_range={value_range}: black must be less than white")
    return float(low), float(high)


CARD = Card(
    id="robustness_probe",
    title="Benchmarking the Robustness of Instance Segmentation Models",
    authors="Dalva, Pehlivan, Altındiş, Dundar",
    year=2021,
    source="arXiv 2109.01123",
    family="norm",
    summary="A model's metric under fifteen corruptions at five severities, absolute and relative to clean images.",
    objects={"Corruption": "Data", "RobustnessProbe": "Probe"},
    traits={"Corruption": ("transform",)},
    use="Before a vision model meets weather, other cameras or compression, and before and after compressing it.",
    avoid="As a measure of how it does on other data: give those as domains.",
    composes=("alpha_bn", "unmix_tns", "calibration"),
    code="none found; the corruptions of github.com/hendrycks/robustness, Apache-2.0",
    claim={
        "text": "Group normalization keeps more of a network's accuracy under noise than batch normalization, by more "
        "than three hundredths of it.",
        "metric": "accuracy under noise over clean accuracy",
        "direction": "higher",
        "margin": 0.03,
        "arms": ("batchnorm", "groupnorm"),
        "seeds": 5,
        "minutes": 4,
        "task": "mnist-cnn",
    },
)
