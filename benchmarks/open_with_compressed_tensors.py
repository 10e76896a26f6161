"""Open an artifact of laconic with compressed-tensors, in an environment without laconic, and compare every value.

    pip install compressed-tensors transformers          (in an environment of its own)
    python benchmarks/open_with_compressed_tensors.py ARTIFACT [--status] [--out FILE]

The truth is the artifact's own `read.py`, which needs numpy alone. Two readers are held to it:

- *tensors*: compressed-tensors' decompressor on each layer that `quantization_config` describes, one by one. It computes in
  the type of the scale, so the truth is rounded to that type first.
- *model*: `AutoModelForCausalLM.from_pretrained` with `quant_method` set to compressed-tensors in a copy of config.json
  (as written it is `laconic`, which transformers does not know here: it warns, and the weights are random). `--status` also
  adds `quantization_status: compressed` where it is missing.

Exit code 1: a value, a name or a shape differs, or the loader fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

PACKAGES = ("compressed-tensors", "transformers", "torch", "safetensors")
SHOWN = 5  # of a list of names


def own_reader(folder: Path) -> Any:
    """The `Artifact` of the folder's `read.py`."""
    spec = importlib.util.spec_from_file_location("read_artifact", folder / "read.py")
    if spec is None or spec.loader is None or not (folder / "read.py").is_file():
        sys.exit(f"{folder} has no read.py: it is not an artifact of laconic")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Artifact(folder)


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def check_tensors(folder: Path, config: dict[str, Any], truth: Any) -> dict[str, Any]:
    """Decompress each described layer: how many there are, which differ, and what is packed and not described."""
    found: dict[str, Any] = {"described": 0, "equal": 0, "differ": {}, "schemes": []}
    described = set()
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        for group in config["config_groups"].values():
            scheme = QuantizationScheme(**group)
            found["schemes"].append({**group["weights"], "layers": len(group["targets"])})
            for path in group["targets"]:
                described.add(f"{path}.weight")
                names = PackedQuantizationCompressor.compression_param_names(scheme)
                lacking = [n for n in names if f"{path}.{n}" not in stored]
                if lacking:
                    found["differ"][path] = f"not in the file: {', '.join(lacking)}"
                    continue
                parts = {n: file.get_tensor(f"{path}.{n}") for n in names}
                found["described"] += 1
                try:
                    weight = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
                except (RuntimeError, ValueError, AssertionError) as error:
                    found["differ"][path] = f"{type(error).__name__}: {error}"
                    continue
                ours = tensor(truth.weight(f"{path}.weight")).to(weight.dtype)
                if weight.shape != ours.shape or not torch.equal(weight, ours):
                    found["differ"][path] = difference(weight, ours)
                else:
                    found["equal"] += 1
    found["packed_and_not_described"] = sorted(set(truth.packed) - described)
    return found


def difference(theirs: torch.Tensor, ours: torch.Tensor) -> str:
    """Where two weights part, in words."""
    if theirs.shape != ours.shape:
        return f"shape {tuple(theirs.shape)}, and {tuple(ours.shape)} was stored"
    gap = (theirs.float() - ours.float()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} values, by {float(gap.max()):.3g} at most"


def check_model(folder: Path, config: dict[str, Any], truth: Any, status: bool) -> dict[str, Any]:
    """Load through transformers under compressed-tensors' name, run one forward, and compare every parameter."""
    quantization = {**config["quantization_config"], "quant_method": "compressed-tensors"}
    if status:
        quantization.setdefault("quantization_status", "compressed")
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        (Path(copy) / "model.safetensors").symlink_to((folder / "model.safetensors").resolve())
        try:
            model, info = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
            with torch.no_grad():  # packed layers are decompressed at their first forward
                model(torch.arange(8)[None])
        except Exception as error:  # noqa: BLE001 - whatever a foreign loader raises is the finding
            return {"fails": f"{type(error).__name__}: {error}"}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    differ, equal = {}, 0
    for name in truth.names():
        if name.startswith("__pad_"):
            continue
        ours, theirs = tensor(truth.weight(name)), parameters.get(name)
        if theirs is None:
            differ[name] = "the model has no such parameter"
        elif theirs.shape != ours.shape or not torch.equal(theirs.detach(), ours.to(theirs.dtype)):
            differ[name] = difference(theirs.detach(), ours.to(theirs.dtype))
        else:
            equal += 1
    missing, unexpected = (sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    return {"equal": equal, "differ": differ, "missing": missing, "unexpected": unexpected}


def report(name: str, found: dict[str, Any]) -> None:
    """A line for each figure, lists cut short."""
    for key, value in found.items():
        if key == "differ":
            shown = [f"{n}: {what}" for n, what in list(value.items())[:SHOWN]]
        else:
            shown = value[:SHOWN] if isinstance(value, list) else value
        count = f"{len(value)} " if isinstance(value, (list, dict)) else ""
        print(f"{name:>8}  {key}: {count}{'' if shown == [] else shown}")


def main() -> int:
    """Check both readers, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--status", action="store_true", help="add quantization_status: compressed")
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    truth = own_reader(options.artifact)
    config = json.loads((options.artifact / "config.json").read_text())
    tensors = check_tensors(options.artifact, config["quantization_config"], truth)
    model = check_model(options.artifact, config, truth, options.status)
    report("tensors", tensors)
    report("model", model)
    if options.out:
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        written = {
            "command": " ".join(["python", *sys.argv]), "versions": versions, "tensors": tensors, "model": model,
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    alike = not tensors["differ"] and not model.get("differ") and "fails" not in model
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
