"""Running compressions in tests: in this process, through the command line, and in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = ("model.safetensors", "config.json", "recipe.yaml")  # a function of model, data, recipe and seed


def save(name: str, folder: Path) -> Path:
    """A zoo model as a Hugging Face folder."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    ZOO[name].build().save_pretrained(folder)
    return folder


def token_file(path: Path, rows: int = 60, length: int = 16, seed: int = 0) -> Path:
    """An NPZ file of token ids for the language models of the zoo."""
    ids = np.random.default_rng(seed).integers(3, 100, (rows, length))
    np.savez(path, input_ids=ids)
    return path


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that equal runs must give alike."""
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ALWAYS if (folder / n).exists()}


def process(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m laconic ARGS` in a process of its own."""
    return subprocess.run(
        command(*args), env=environ(**environment), capture_output=True, text=True, timeout=240, preexec_fn=_hear_ctrl_c
    )


def _hear_ctrl_c() -> None:
    """A test run started in the background of a shell ignores SIGINT, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "laconic", *map(str, args)]


def environ(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def run_cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr."""
    from laconic import cli

    before = sys.argv
    sys.argv = ["laconic", *map(str, args)]
    capsys.readouterr()
    try:
        cli.main()
        code: Any = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return code, said.out, said.err


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Length of the header with its length field, and what it says, from the bytes themselves."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


class Classifier(nn.Module):
    """A small MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(24, 64)
        self.middle = nn.Linear(64, 64)
        self.leave = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 24) -> (batch, 4)."""
        return self.leave(torch.relu(self.middle(torch.relu(self.enter(x)))))


def trained_classifier(folder: Path, n: int = 600) -> tuple[nn.Module, Path]:
    """A classifier that is right nearly always, and its data as NPZ (`x`, `label`)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        centers = torch.randn(4, 24)
        label = torch.arange(n) % 4
        x = centers[label] + 0.6 * torch.randn(n, 24)
        model = Classifier()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), label).backward()
            optimizer.step()
    np.savez(folder / "data.npz", x=x.numpy(), label=label.numpy())
    return model.requires_grad_(False).requires_grad_(True).eval(), folder / "data.npz"
