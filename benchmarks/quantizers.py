"""Seconds and peak memory of quantizing a language model with laconic and with other programs, and what came out of each.

    python benchmarks/quantizers.py smollm-moby --python llm-compressor=PATH --python gptqmodel=PATH ...
                                    [--only NAME ...] [--work FOLDER] [--out benchmarks/records/quantizers.json]

Run it with laconic's Python. A peer takes part when `--python NAME=PATH` names an interpreter that has it (several may be the
same); their names are those of `PROGRAMS` below. Each setting is a process of its own under that interpreter: it loads the
float model and the same windows of tokens, starts the clock, quantizes, stops the clock, and reads the peak of its memory
(`ru_maxrss`, the loaded model and the program included; "loaded" is the peak before it began). Then it writes the values that
its numbers stand for. One evaluator puts these values into the same transformers model and takes the perplexity of windows
that nobody calibrated with, so that no kernel of anybody's is part of the quality.

4 bits in groups of 64 along the input with a zero point, every linear layer but the head, nothing else touched: 128, the usual
length, does not divide the 576 inputs of SmolLM2. All else is at the program's defaults. What a program cannot do is in its
row: optimum-quanto and torchao only round, torchao symmetrically; NNCF rounds without data by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from peer_llm_compressor import modifier, perplexity

HERE = Path(__file__).resolve().parent
MARK = "RESULT "  # before the line of JSON that a setting's process prints
BITS = 4
Weights = dict[str, torch.Tensor]


class Clock:
    """What the part between `with` costs: seconds on the wall and of all cores, and bytes at most so far."""

    def __enter__(self) -> Clock:
        self.loaded = peak()
        self._start, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.found = {
            "seconds": time.perf_counter() - self._start, "cpu_seconds": time.process_time() - self._cpu,
            "peak_rss_bytes": peak(), "peak_rss_loaded_bytes": self.loaded,
        }  # fmt: skip


def peak() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def float_model(folder: Path) -> Any:
    """As transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path -> every linear layer but the head."""
    return {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in p}


# --- one function a program: quantize under the clock, and give back the values ----------------------------------------


def laconic(folder: Path, ids: torch.Tensor, group: int, clock: Clock, task: str, method: str) -> Weights:
    """As `gptq_against_rtn.py`: the solver of `laconic compress` at a decision that is given."""
    from laconic.core.structure import Structure
    from laconic.core.units import find_units
    from laconic.numerics import Int, Scale, Scheme
    from laconic.pipeline.run import BATCH_TOKENS
    from laconic.pipeline.solve import Solving, solve
    from laconic.pipeline.source import resolve
    from laconic.pipeline.workspace import Workspace
    from laconic.tasks import load_task

    source = resolve(str(folder))
    held = load_task(task, source)
    model = source.load()
    structure = Structure.build(model, source.example())
    units = find_units(model, structure)
    linear = [u for u in units if u.op == "linear" and u.options and len(u.names) == 1 and "lm_head" not in u.name]
    parts = ids.split(max(1, BATCH_TOKENS // ids.shape[1]))  # as `compress` deals them
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in parts]
    scheme = Scheme(Int(BITS), Scale("group", group=group, dtype="float16"), zero="int")
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch) / "out")
        workspace.open()
        decision: dict[str, Any] = {u.name: scheme for u in linear}
        digests = {u.name: u.name for u in units}
        with clock:
            solve(Solving(model, held, batches, units, decision, structure, workspace, "", digests, method))
    return {u.name: model.get_submodule(u.name.removesuffix(".weight")).weight for u in linear}


def llm_compressor(folder: Path, ids: torch.Tensor, group: int, clock: Clock, task: str, method: str) -> Weights:
    """oneshot of GPTQModifier or QuantizationModifier, layer by layer."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot

    model, rows = float_model(folder), ids.tolist()
    given = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    with clock:
        oneshot(
            model=model, recipe=modifier(method, BITS, group), dataset=given, num_calibration_samples=len(rows),
            max_seq_length=ids.shape[1], shuffle_calibration_samples=False, pipeline="sequential",
        )  # fmt: skip
    return {
        f"{path}.weight": fake_quantize(
            x=m.weight, scale=m.weight_scale, zero_point=m.weight_zero_point, args=m.quantization_scheme.weights
        )
        for path, m in linear_layers(model).items()
    }


def gptqmodel(folder: Path, ids: torch.Tensor, group: int, clock: Clock, task: str, method: str) -> Weights:
    """Its own quantizer on the CPU; symmetric, which is its default."""
    # With two cores or fewer it takes one worker, and then refuses to start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(folder), QuantizeConfig(bits=BITS, group_size=group), device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    with clock:
        model.quantize(rows, batch_size=1)
    with tempfile.TemporaryDirectory() as saved:
        model.save(saved)
        return gptq_weights(Path(saved))


def gptq_weights(folder: Path) -> Weights:
    """Values of a folder of GPTQ's form, 4 bits: s[g_idx] (q - z - 1), without the 1 in version 2."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    plus = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    shifts, found = torch.arange(0, 32, BITS, dtype=torch.int32), {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for path in (n.removesuffix(".qweight") for n in tensors.keys() if n.endswith(".qweight")):  # noqa: SIM118
                words, zeros, scales, index = (
                    tensors.get_tensor(f"{path}.{name}") for name in ("qweight", "qzeros", "scales", "g_idx")
                )
                q = (words[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, words.shape[1])
                z = (zeros[:, :, None] >> shifts & 15).reshape(zeros.shape[0], -1)
                index = index.long()
                found[f"{path}.weight"] = (scales.float()[index] * (q - z[index] - plus)).t()
    return found


def quanto(folder: Path, ids: torch.Tensor, group: int, clock: Clock, task: str, method: str) -> Weights:
    """quantize and freeze; the length of its groups is its own choice."""
    from optimum.quanto import freeze, qint4, quantize

    model = float_model(folder)
    with clock:
        quantize(model, weights=qint4, exclude="lm_head")
        freeze(model)
    return {f"{path}.weight": m.weight.dequantize() for path, m in linear_layers(model).items()}


def nncf(folder: Path, ids: torch.Tensor, group: int, clock: Clock, task: str, method: str) -> Weights:
    """compress_weights in int4 with a zero point, every layer; with scale estimation it looks at data."""
    import nncf
    from nncf.torch.function_hook.wrapper import get_hook_storage

    model = float_model(folder)
    model.config.use_cache = False
    names = [name for name, _ in model.named_parameters()]
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    with clock:
        model = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=group, ratio=1.0, all_layers=False,
            ignored_scope=nncf.IgnoredScope(patterns=[".*lm_head.*", ".*embed_tokens.*"], validate=False),
            dataset=nncf.Dataset(data), scale_estimation=method == "scales",
        )  # fmt: skip
    packed, found = dict(model.named_parameters()), {}
    for key, hook in get_hook_storage(model).named_hooks():
        name = next((n for n in names if n.replace(".", ":") in key or n in key), None)
        if name is not None and hasattr(hook, "_scale"):
            found[name] = hook(packed[name])
    return found


def torchao(folder: Path, ids: torch.Tensor, group: int, clock: Clock, task: str, method: str) -> Weights:
    """quantize_ with 4-bit integers, the form of its that needs no GPU."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = float_model(folder)
    layers = linear_layers(model)
    with clock:
        quantize_(
            model,
            IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)),
            filter_fn=lambda module, path: path in layers,
        )
    return {f"{path}.weight": m.weight.dequantize() for path, m in linear_layers(model).items()}


# Name -> the function, the methods that it knows, and the packages whose versions are noted.
PROGRAMS: dict[str, tuple[Callable[..., Weights], tuple[str, ...], tuple[str, ...]]] = {
    "laconic": (laconic, ("rtn", "gptq"), ("laconic",)),
    "llm-compressor": (llm_compressor, ("rtn", "gptq"), ("llmcompressor", "compressed-tensors")),
    "gptqmodel": (gptqmodel, ("gptq",), ("gptqmodel",)),
    "optimum-quanto": (quanto, ("rtn",), ("optimum-quanto",)),
    "nncf": (nncf, ("rtn", "scales"), ("nncf",)),
    "torchao": (torchao, ("rtn",), ("torchao",)),
}


# --- the processes -------------------------------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize here, write the values, and say what it cost."""
    from safetensors.torch import save_file

    name, method = options.child
    run, _, packages = PROGRAMS[name]
    with np.load(options.work / "windows.npz") as arrays:
        ids = torch.from_numpy(arrays["calibrate"])[: options.samples]
    clock = Clock()
    weights = run(options.work / "model", ids, options.group, clock, options.task, method)
    values = {name: value.detach().to(torch.float32).contiguous() for name, value in weights.items()}
    save_file(values, options.work / "values.safetensors")
    used = (*packages, "torch", "transformers")
    return {
        **clock.found, "layers": len(values), "weights": sum(v.numel() for v in values.values()),
        "tokens": ids.numel(), "versions": {n: found for n in used if (found := _version(n))},
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the float model with the values that are there, if any, in place of its own."""
    from safetensors.torch import load_file

    model = float_model(options.work / "model")
    with np.load(options.work / "windows.npz") as arrays:
        ids = torch.from_numpy(arrays["verify"])[: options.verify]
    file, error = options.work / "values.safetensors", 0.0
    if file.exists():
        own, values = dict(model.named_parameters()), load_file(file)
        with torch.no_grad():
            square = sum(float((own[n] - v).square().sum()) for n, v in values.items())
            whole = sum(float(own[n].square().sum()) for n in values)
            error = (square / whole) ** 0.5
            for name, value in values.items():
                own[name].copy_(value)
    return {"perplexity": perplexity(model, ids), "weight_error": error, "verify_tokens": ids.numel()}


def in_own_process(python: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What a new process of this script under an interpreter says; {"failed": why} if it says nothing."""
    command = [
        python, str(HERE / "quantizers.py"), options.task, "--work", str(options.work.resolve()),
        "--group", str(options.group), "--samples", str(options.samples), "--verify", str(options.verify),
        "--threads", str(options.threads), *more,
    ]  # fmt: skip
    before = os.getloadavg()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit, cwd=options.work)
    except subprocess.TimeoutExpired:
        return {"failed": f"it took more than {options.limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": said[-1].strip() if said else f"exit code {done.returncode}"}
    return {**json.loads(lines[-1].removeprefix(MARK)), "load_before": before}


def prepare(options: argparse.Namespace) -> None:
    """Windows and float weights, once."""
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "model" / "config.json").exists() or not (options.work / "windows.npz").exists():
        script = [sys.executable, str(HERE / "export_windows.py"), options.task, str(options.work / "windows.npz")]
        subprocess.run([*script, "--model", str(options.work / "model")], check=True, stdout=subprocess.DEVNULL)


def interpreters(given: list[str]) -> dict[str, str]:
    """Program -> interpreter, laconic's own included."""
    found = {"laconic": sys.executable}
    for text in given:
        name, _, path = text.partition("=")
        if name not in PROGRAMS or not path:
            sys.exit(f"--python {text}: NAME=PATH, where NAME is one of {', '.join(PROGRAMS)}")
        found[name] = os.path.abspath(path)
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['program']:>15} {row['method']:>6}  "
    if "failed" in row:
        return f"{head}failed: {row['failed']}"
    return (
        f"{head}{row['seconds']:8.1f} s  {row['cpu_seconds']:8.1f} s of CPU  peak {row['peak_rss_bytes'] / 1e9:5.2f} GB "
        f"(loaded {row['peak_rss_loaded_bytes'] / 1e9:.2f})  perplexity {row['perplexity']:8.3f}  "
        f"weights off by {row['weight_error']:.4f}  {row['layers']} layers"
    )


def main() -> None:
    """Run every program, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("tiny-lm", "smollm-moby"))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="a peer's interpreter")
    parser.add_argument("--only", nargs="+", choices=tuple(PROGRAMS), help="of those that could take part")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration")
    parser.add_argument("--verify", type=int, default=16, help="windows of evaluation")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=900, help="seconds for a process")
    parser.add_argument("--work", type=Path, default=Path("quantizers-work"), help="folder for the weights and windows")
    parser.add_argument("--out", type=Path, help="JSON record")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child or options.evaluate:
        print("\n" + MARK + json.dumps(child(options) if options.child else evaluate(options)))
        return
    prepare(options)
    values = options.work / "values.safetensors"
    values.unlink(missing_ok=True)
    before = in_own_process(sys.executable, options, "--evaluate")
    print(f"{options.task}, float: perplexity {before.get('perplexity', before.get('failed'))}", flush=True)
    rows = []
    pythons = interpreters(options.python)
    for name in options.only or pythons:
        for method in PROGRAMS[name][1]:
            values.unlink(missing_ok=True)
            row = {"program": name, "method": method}
            if name not in pythons:
                row["failed"] = f"no --python {name}=PATH"
            else:
                row |= in_own_process(pythons[name], options, "--child", name, method)
            if "failed" not in row:
                row |= {
                    k: v for k, v in in_own_process(sys.executable, options, "--evaluate").items() if k != "load_before"
                }
            rows.append(row)
            print(line(row), flush=True)
            if options.out:  # after each setting: they take minutes, and one that fails must not cost the others
                write(options, before, rows)
    values.unlink(missing_ok=True)


def write(options: argparse.Namespace, before: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The record of what was measured so far."""
    peers = [f"--python {text.partition('=')[0]}=PATH" for text in options.python]
    said = [f"--{name} {getattr(options, name)}" for name in ("group", "samples", "verify", "threads")]
    record = {
        "command": " ".join(["python", "benchmarks/quantizers.py", options.task, *said, *peers]), "task": options.task, "bits": BITS,
        "group": options.group, "samples": options.samples, "threads": options.threads, "float": before, "rows": rows,
        "cores": os.cpu_count(), "os": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
