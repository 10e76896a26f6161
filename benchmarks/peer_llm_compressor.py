"""GPTQ and round-to-nearest of llm-compressor on our windows: perplexity, seconds, peak memory.

    python benchmarks/export_windows.py smollm-moby windows.npz --model smollm-float     (with laconic's Python)
    pip install llmcompressor                                                            (in an environment of its own)
    python benchmarks/peer_llm_compressor.py smollm-float windows.npz [--bits 4 3 2] [--methods gptq rtn] [--out FILE]

The setting is that of `gptq_against_rtn.py`: integers with an integer zero point in groups of 64 along the input, every linear
layer but the head, nothing else touched, activations float; the same calibration tokens; options of the method at the peer's
own defaults. Perplexity is exp(sum nll / sum tokens) over the verify windows, each starting afresh, as in
`laconic/tasks/language.py`. Each setting runs in a process of its own, so that its peak memory is its own. Nothing of laconic
is imported. The peer quantizes in memory and its model then rounds its weights on the fly: what is compared is quality and
the cost of getting there, not the speed of the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")
BATCH = 2  # windows a forward, in evaluation
MARK = "RESULT "  # before the line of JSON that a setting's process prints


def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean loss of the tokens of windows (n, L), each predicted from those before it in its window."""
    total = 0.0
    with torch.no_grad():
        for ids in windows.split(BATCH):
            logits = model(input_ids=ids, use_cache=False).logits
            for row, target in zip(logits[:, :-1].float(), ids[:, 1:], strict=True):
                total += float(F.cross_entropy(row, target, reduction="none").sum().double())
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if math.isfinite(mean) else math.inf


def modifier(method: str, bits: int, group: int) -> Any:
    """The peer's recipe of one step."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = {
        "num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group, "dynamic": False,
    }  # fmt: skip
    make = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[method]
    return make(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])


def run_one(folder: Path, file: Path, method: str, bits: int, group: int) -> dict[str, Any]:
    """Quantize and measure in this process; `method` "float" only measures."""
    from transformers import AutoModelForCausalLM

    with np.load(file) as arrays:
        calibrate, verify = (torch.from_numpy(arrays[split]) for split in ("calibrate", "verify"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seconds = cpu_seconds = 0.0
    if method != "float":
        from datasets import Dataset
        from llmcompressor import oneshot

        ids = calibrate.tolist()
        given = {"dataset": Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})}
        start, cpu = time.perf_counter(), time.process_time()
        oneshot(
            model=model, recipe=modifier(method, bits, group), num_calibration_samples=len(ids),
            max_seq_length=calibrate.shape[1], shuffle_calibration_samples=False, pipeline="sequential", **given,
        )  # fmt: skip
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    layers = [m for m in model.modules() if getattr(m, "quantization_scheme", None) is not None]
    return {
        "bits": bits, "method": method, "perplexity": perplexity(model, verify), "seconds": seconds,
        "cpu_seconds": cpu_seconds, "peak_rss_bytes": peak, "layers": len(layers),
        "weights": sum(m.weight.numel() for m in layers),
    }  # fmt: skip


def in_own_process(options: argparse.Namespace, method: str, bits: int) -> dict[str, Any]:
    """One setting, in a new process of this script."""
    command = [
        sys.executable, __file__, str(options.model), str(options.windows), "--one", "--methods", method,
        "--bits", str(bits), "--group", str(options.group), "--threads", str(options.threads),
    ]  # fmt: skip
    load = os.getloadavg()[0]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        sys.exit(f"{method} at {bits} bits failed with exit code {done.returncode}")
    return {**json.loads(lines[-1].removeprefix(MARK)), "load_before": load}


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The record of the settings measured so far; the first is the float model."""
    with np.load(options.windows) as arrays:
        task, tokens = str(arrays["task"]), int(arrays["calibrate"].size)
    written = {
        "command": " ".join(["python", *sys.argv]), "task": task, "group": options.group, "tokens": tokens,
        "float": rows[0]["perplexity"], "rows": rows[1:], "threads": options.threads, "load_average": os.getloadavg(),
        "cores": os.cpu_count(), "os": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")


def main() -> None:
    """Run every setting and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the float model")
    parser.add_argument("windows", type=Path, help="from export_windows.py")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=["gptq"], choices=("gptq", "rtn", "float"))
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", action="store_true", help="a single setting, in this process")
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        found = run_one(options.model, options.windows, options.methods[0], options.bits[0], options.group)
        print(MARK + json.dumps(found))
        return
    rows = []
    for method, bits in [("float", 32), *((m, b) for b in options.bits for m in options.methods)]:
        rows.append(in_own_process(options, method, bits))
        one = rows[-1]
        print(
            f"{bits:>2} bits {method:>5}  perplexity {one['perplexity']:9.2f}  {one['seconds']:6.1f} s  "
            f"peak {one['peak_rss_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        if options.out:  # after each setting: they take minutes, and one that fails must not cost the others
            write(options, rows)


if __name__ == "__main__":
    main()
