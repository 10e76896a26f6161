"""Exact conversions of norms on real weights: the relative error of the output, and latency before and after.

    python benchmarks/norm_surgery.py [MODEL ...] [--latency] [--out RECORD.json]

MODEL is `minilm`, `smollm` (both fetched: `laconic fetch minilm smollm`), `gpt2` or `vit` (of these shapes, with drawn
weights); all by default. Every conversion that applies is made on a copy, in float32, folded in float64:

- `rmsnorm`, `crmsnorm`: layer norms that read a stream of their own (in MiniLM, whose norms stand behind the sums, that is
  the one of the embeddings alone; the others are left, and counted);
- `gains`: gains of norms go into the layers that read them.

The error is the largest difference of the output over its largest value; the script ends with 1 where one is above 1e-5.
With `--latency` both models are timed in turns, in one process, with torch's number of threads: take that on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.errors import BadInput
from laconic.norm import fold_gains, to_pre_crmsnorm, to_pre_rmsnorm
from laconic.pipeline.measure import latency_ms, machine, versions
from laconic.pipeline.source import resolve
from laconic.tasks.base import main_output

BOUND = 1e-5
TOKENS = 128
CONVERSIONS: dict[str, Callable[..., Any]] = {
    "rmsnorm": to_pre_rmsnorm,
    "crmsnorm": to_pre_crmsnorm,
    "gains": fold_gains,
}
Made = tuple[nn.Module, dict[str, torch.Tensor]]


def fetched(name: str) -> Made:
    """A fetched model in float32, and a window of tokens."""
    model = resolve(name).load().float().eval()
    generator = torch.Generator().manual_seed(0)
    return model, {"input_ids": torch.randint(1000, 20_000, (1, TOKENS), generator=generator)}


def gpt2() -> Made:
    """A GPT-2 of six layers of width 512."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=6, n_head=8)).eval()
    return drawn(model), {"input_ids": torch.randint(50_000, (1, TOKENS), generator=torch.Generator().manual_seed(0))}


def vit() -> Made:
    """A ViT of six layers of width 384."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, num_labels=100
    )
    pictures = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return drawn(ViTForImageClassification(config).eval()), {"pixel_values": pictures}


def drawn(model: nn.Module) -> nn.Module:
    """Gains, biases and means that are not one and zero, as in a trained model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.2 if parameter.ndim == 1 else 0.02) * noise + 0.01)
    return model


MODELS: dict[str, Callable[[], Made]] = {
    "minilm": lambda: fetched("minilm"), "smollm": lambda: fetched("smollm"), "gpt2": gpt2, "vit": vit,
}  # fmt: skip


def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return main_output(model(**inputs))


def rows_of(name: str, latency: bool) -> list[dict[str, Any]]:
    """A row for each conversion of a model."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    want = output(model, inputs)
    found = []
    for title, convert in CONVERSIONS.items():
        other = copy.deepcopy(model)
        row: dict[str, Any] = {"model": name, "conversion": title}
        found.append(row)
        try:
            done = convert(other, ((), inputs))
        except BadInput as error:
            row["refused"] = str(error)
            continue
        error = float((output(other, inputs) - want).abs().max() / want.abs().max())
        row |= {"changed": len(done.norms), "left": len(done.left), "untied": list(done.untied), "error": error}
        if latency:
            pair = latency_ms(
                {"before": lambda: output(model, inputs), "after": lambda other=other: output(other, inputs)}
            )
            row |= {"before_ms": pair["before"], "after_ms": pair["after"], "ratio": pair["before"] / pair["after"]}
    return found


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{row['model']:8} {row['conversion']:9}"
    if "refused" in row:
        return f"{head} refused: {row['refused'][:150]}"
    if not row["changed"]:
        return f"{head} changes nothing: {row['left']} norms are read by more than linear layers"
    text = f"{head} {row['changed']:3} norms, {row['left']:3} left, error {row['error']:.1e}"
    if "ratio" in row:
        text += f", {row['before_ms']:.2f} ms -> {row['after_ms']:.2f} ms, {row['ratio']:.3f} times as fast"
    return text


def main() -> None:
    """Convert, compare, print, and write the record if one is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], metavar="MODEL")
    parser.add_argument("--latency", action="store_true", help="time both models, on a machine that does nothing else")
    parser.add_argument("--out", type=Path, help="record in JSON")
    options = parser.parse_args()
    rows = []
    for name in options.models or MODELS:
        for row in rows_of(name, options.latency):
            rows.append(row)
            print(line(row), flush=True)
    if options.out:
        record = {"bound": BOUND, "tokens": TOKENS, "rows": rows, "machine": machine(), "versions": versions()}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if any(row.get("error", 0.0) > BOUND for row in rows):
        sys.exit(f"an error is above {BOUND:g}")


if __name__ == "__main__":
    main()
