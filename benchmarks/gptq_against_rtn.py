"""Perplexity of GPTQ against round-to-nearest at 4, 3 and 2 bits, all linear layers in groups of 64, the rest float.

    python benchmarks/gptq_against_rtn.py TASK [--bits 4 3 2] [--methods rtn gptq] [--tokens 16384] [--out FILE]

TASK is `tiny-lm` or `smollm-moby`. Prints a table and writes a JSON record with the machine and every figure. The setting
is that of the usual comparison (group 64, asymmetric, embedding and head untouched), so it is not what `compress` would
decide: that allocates widths.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from laconic.core.structure import Structure
from laconic.numerics import Int, Scale, Scheme
from laconic.pipeline.compress import load_task_model, positions
from laconic.pipeline.measure import machine, peak_rss, versions
from laconic.pipeline.solve import Solving, solve
from laconic.pipeline.source import resolve
from laconic.pipeline.units import find_units
from laconic.pipeline.workspace import Workspace
from laconic.tasks import compare, load_task


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("tiny-lm", "smollm-moby"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    source = resolve(load_task_model(options.task))
    task = load_task(options.task, source)
    model = source.load()
    structure = Structure.build(model, source.example())
    units = find_units(model, structure)
    linear = [u for u in units if u.op == "linear" and u.options and len(u.names) == 1 and "lm_head" not in u.name]
    original = {u.name: model.get_parameter(u.name).detach().clone() for u in linear}
    batches, seen = [], 0
    for batch in task.batches("calibrate", batch=8):
        if seen < options.tokens:
            batches.append(batch)
            seen += positions(batch)
    before = task.evaluate(model, "verify")
    rows = []
    print(f"{options.task}: {sum(u.numel for u in linear):,} weights in {len(linear)} linear layers, {seen} tokens")
    print(f"{'float':>12}  perplexity {before.value:9.2f}")
    for bits in options.bits:
        scheme = Scheme(Int(bits), Scale("group", group=options.group, dtype="float16"), zero="int")
        for method in options.methods:
            for name, value in original.items():
                model.get_parameter(name).data.copy_(value)
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                workspace = Workspace(Path(folder) / "out")
                workspace.open()
                decision: dict[str, Scheme | None] = {u.name: scheme for u in linear}
                digests = {u.name: u.name for u in units}
                solve(Solving(model, task, batches, units, decision, structure, workspace, "", digests, method))
            seconds = time.perf_counter() - start
            after = task.evaluate(model, "verify")
            found = compare(before, after, task.metric)
            rows.append(
                {
                    "bits": bits, "method": method, "perplexity": after.value, "seconds": seconds,
                    "drop_percent": found.drop, "low": found.low, "high": found.high, "peak_rss_bytes": peak_rss(),
                }
            )  # fmt: skip
            print(
                f"{bits} bits {method:>5}  perplexity {after.value:9.2f}  {seconds:6.1f} s  peak {peak_rss() / 1e9:.2f} GB",
                flush=True,
            )
    record = {
        "command": " ".join(["python", *sys.argv]), "task": options.task, "tokens": seen, "group": options.group,
        "float": before.value, "rows": rows, "machine": machine(), "versions": versions(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
