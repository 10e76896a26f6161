"""The README's Python examples run as they stand, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 1
    script = tmp_path / "example.py"
    script.write_text(blocks[0])
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "times smaller" in done.stdout and "torch.Size([4, 10])" in done.stdout


def test_every_command_named_exists() -> None:
    from typer.main import get_command

    from laconic.cli import app

    known = set(get_command(app).commands)
    named = set(
        re.findall(
            r"laconic (compress|plan|inspect|compare|doctor|fetch|[a-z]+)\b(?= --| [A-Za-z-]+ --|`| MODEL| A B)", README
        )
    )
    assert {"compress", "plan", "inspect", "compare", "doctor"} <= named | known
    assert named <= known | {"load"}, named - known


def test_options_named_exist() -> None:
    from typer.main import get_command

    from laconic.cli import app

    options = {o for command in get_command(app).commands.values() for p in command.params for o in p.opts}
    assert set(re.findall(r"(?<!\w)--[a-z][a-z-]+", README)) - options - {"--help"} == set()
