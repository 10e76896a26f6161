"""Perplexity of GPTQ against round-to-nearest at 4, 3 and 2 bits, all linear layers in groups of 64, the rest float.

    python benchmarks/gptq_against_rtn.py TASK [--bits 4 3 2] [--methods rtn gptq] [--tokens 16384] [--split verify]
                                          [--model FOLDER] [--out benchmarks/records/TASK.json]

TASK is `tiny-lm` or `smollm-moby`. Prints a table and writes a JSON record with the machine, its load at the start of
every setting, and every figure. Each setting runs in a process of its own, so that its peak memory, taken before
perplexity is measured, is its own. The setting is that of the usual comparison (group 64, asymmetric, embedding and
head untouched), so it is not what `compress` would decide: that allocates widths. `--split select` is for choosing a
method's options.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laconic.core.structure import Structure
from laconic.core.units import find_units
from laconic.numerics import Int, Scale, Scheme
from laconic.pipeline.measure import machine, peak_rss, versions
from laconic.pipeline.observe import positions
from laconic.pipeline.solve import Solving, solve
from laconic.pipeline.source import resolve
from laconic.pipeline.workspace import Workspace
from laconic.tasks import compare, load_task, own_model
from laconic.tasks.metrics import PERPLEXITY, Evaluation

MARK = "RESULT "  # before the line of JSON that a setting's process prints


def run_one(options: argparse.Namespace, method: str, bits: int, scores: Path) -> dict[str, Any]:
    """Round and measure in this process; `method` "float" only measures. Loss by example goes to `scores`."""
    source = resolve(options.model or own_model(options.task))
    task = load_task(options.task, source)
    model = source.load()
    structure = Structure.build(model, source.example())
    units = find_units(model, structure)
    linear = [u for u in units if u.op == "linear" and u.options and len(u.names) == 1 and "lm_head" not in u.name]
    batches, seen = [], 0
    for batch in task.batches("calibrate", batch=8):
        if seen < options.tokens:
            batches.append(batch)
            seen += positions(batch)
    loaded = peak_rss()
    start, cpu = time.perf_counter(), time.process_time()
    if method != "float":
        scheme = Scheme(Int(bits), Scale("group", group=options.group, dtype="float16"), zero="int")
        with tempfile.TemporaryDirectory() as folder:
            workspace = Workspace(Path(folder) / "out")
            workspace.open()
            decision: dict[str, Scheme | None] = {u.name: scheme for u in linear}
            digests = {u.name: u.name for u in units}
            solve(Solving(model, task, batches, units, decision, structure, workspace, "", digests, method))
    seconds, cpu_seconds, peak = time.perf_counter() - start, time.process_time() - cpu, peak_rss()
    found = task.evaluate(model, options.split)
    np.save(scores, found.per_example)
    return {
        "bits": bits, "method": method, "perplexity": found.value, "seconds": seconds, "cpu_seconds": cpu_seconds,
        "peak_rss_bytes": peak, "peak_rss_loaded_bytes": loaded, "tokens": seen, "layers": len(linear),
        "weights": sum(u.numel for u in linear),
    }  # fmt: skip


def in_own_process(options: argparse.Namespace, method: str, bits: int) -> tuple[dict[str, Any], Evaluation]:
    """One setting, in a new process of this script."""
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.npy"
        command = [
            sys.executable, __file__, options.task, "--one", str(scores), "--methods", method, "--bits", str(bits),
            "--tokens", str(options.tokens), "--group", str(options.group), "--split", options.split,
            *(["--model", options.model] if options.model else []),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not lines:
            sys.exit(f"{method} at {bits} bits failed with exit code {done.returncode}")
        row = {**json.loads(lines[-1].removeprefix(MARK)), "load_at_start": load}
        return row, Evaluation(row["perplexity"], np.load(scores), {}, [], [])


def main() -> None:
    """Run every setting and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("tiny-lm", "smollm-moby"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"], choices=("rtn", "gptq", "float"))
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--split", default="verify", choices=("select", "verify"))
    parser.add_argument("--model", help="folder of the task's model, if not the one that is fetched for it")
    parser.add_argument("--one", type=Path, metavar="SCORES", help="a single setting, in this process")
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args()
    if options.one:
        print(MARK + json.dumps(run_one(options, options.methods[0], options.bits[0], options.one)))
        return
    before, reference = in_own_process(options, "float", 32)
    print(
        f"{options.task}: {before['weights']:,} weights in {before['layers']} linear layers, {before['tokens']} tokens"
    )
    print(f"{'float':>12}  perplexity {before['perplexity']:9.2f}", flush=True)
    rows = []
    for bits, method in ((b, m) for b in options.bits for m in options.methods):
        row, evaluation = in_own_process(options, method, bits)
        found = compare(reference, evaluation, PERPLEXITY)
        rows.append({**row, "drop_percent": found.drop, "low": found.low, "high": found.high})
        print(
            f"{bits} bits {method:>5}  perplexity {row['perplexity']:9.2f}  {row['seconds']:6.1f} s  "
            f"peak {row['peak_rss_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    record = {
        "command": " ".join(["python", *sys.argv]), "task": options.task, "split": options.split,
        "group": options.group, "tokens": before["tokens"], "float": before["perplexity"],
        "load_at_start": before["load_at_start"], "rows": rows, "machine": machine(), "versions": versions(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
