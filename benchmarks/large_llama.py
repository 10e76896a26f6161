"""Write a synthetic Llama folder of about 1.5 billion parameters (bfloat16, random), piece by piece.

    python benchmarks/large_llama.py FOLDER [LAYERS]
    (ulimit -v 3145728; laconic compress FOLDER --budget size=4x --max-ram 2GB --out OUT)

The second line compresses it under a bound of 2 GB of resident and 3 GB of virtual memory; the peak is in OUT/report.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from laconic.pipeline.tensorfile import TensorWriter

CHUNK = 1 << 22


def main(folder: Path, layers: int) -> None:
    """Write config.json and model.safetensors."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    specs = [(name, torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    with TensorWriter(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, dtype, shape in specs:
            if len(shape) == 1:
                writer.write(name, torch.ones(shape, dtype=dtype))
                continue
            step = max(1, CHUNK // shape[1])
            for begin in range(0, shape[0], step):
                rows = min(step, shape[0] - begin)
                noise = torch.randn((rows, shape[1]), generator=generator).mul_(0.02)
                writer.write_rows(name, begin, noise.to(dtype))
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 27)
