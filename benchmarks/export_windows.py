"""Write what a peer needs to be measured on our own windows: the tokens of a task, and the float model.

    python benchmarks/export_windows.py TASK WINDOWS.npz [--model FOLDER] [--tokens 16384]

TASK is `tiny-lm` or `smollm-moby`. The file holds int64 arrays of windows (n, length): `calibrate` (the first ones, up to
`--tokens` tokens: what `gptq_against_rtn.py` and `compress` calibrate with), `select` and `verify`, and the name of the task.
The folder is for transformers: config.json and model.safetensors as float32, and the tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from laconic.pipeline.observe import positions
from laconic.pipeline.source import resolve
from laconic.tasks import load_task, own_model

BATCH = 8  # calibration takes whole batches of this many windows, as `compress` does


def main() -> None:
    """Write the file, and the folder if it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("tiny-lm", "smollm-moby"))
    parser.add_argument("windows", type=Path)
    parser.add_argument("--model", type=Path, help="folder for the float weights")
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    source = resolve(own_model(options.task))
    task = load_task(options.task, source)
    calibrate, seen = [], 0
    for batch in task.batches("calibrate", batch=BATCH):
        if seen < options.tokens:
            calibrate.append(batch["input_ids"].numpy())
            seen += positions(batch)
    rows = {split: task.rows(split)["input_ids"].numpy() for split in ("select", "verify")}
    options.windows.parent.mkdir(parents=True, exist_ok=True)
    np.savez(options.windows, task=options.task, calibrate=np.concatenate(calibrate), **rows)
    print(f"{options.windows}: calibrate {seen} tokens, select {rows['select'].shape}, verify {rows['verify'].shape}")
    if options.model:
        model = source.load().float()
        model.save_pretrained(options.model)
        source.save_extras(options.model)
        print(f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
