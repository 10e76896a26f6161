"""What `torchrun` runs in test_distill_hook: python distributed_script.py OUT. Each process leaves what it trained."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.distill.test_distill_hook import adapted


def main(out: Path) -> None:
    tensors = adapted()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(tensors, str(out / f"{rank}.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
