"""What the site is made of: the check of docstrings, Markdown from docstrings, the pages that are generated."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from docs import commands, methods, reference
from docs.coverage import Sources, breaches
from docs.markdown import cell, examples, prose, without_examples
from laconic.catalog import read
from laconic.claims.record import fingerprint
from laconic.core.card import KINDS
from laconic.errors import BadInput
from tests.catalog.trees import method, tree

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "pages").rglob("*.md"))

# --- docstrings -------------------------------------------------------------------------------------------------------


def package(root: Path, **files: str) -> Path:
    """A package with these files, by path; `.py` may be left out."""
    folder = root / "laconic"
    for name, text in {"__init__": '"""A package."""\n', **files}.items():
        path = folder / (name if name.endswith(".pyi") else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def silent(root: Path, **files: str) -> list[str]:
    return [f"{one.path}:{one.line} {one.name}" for one in breaches(package(root, **files))]


def test_nothing_public_is_silent():
    found = [str(one) for one in breaches()]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""M."""\ndef f():\n    pass\n', ["laconic/m.py:2 laconic.m.f"]),
        ('"""M."""\ndef f():\n    """F."""\n', []),
        ('"""M."""\n__all__ = ["g"]\ndef f():\n    pass\ndef g():\n    """G."""\n', []),
        ('"""M."""\n__all__ = ["f", "N"]\nN = 3\nif N:\n    def f():\n        pass\n', ["laconic/m.py:5 laconic.m.f"]),
        ('"""M."""\ndef _f():\n    pass\n', []),
        ("N = 1\n", ["laconic/m.py:1 laconic.m"]),
        ('"""M."""\nclass C:\n    """C."""\n    def f(self):\n        pass\n', ["laconic/m.py:4 laconic.m.C.f"]),
        ('"""M."""\nclass C:\n    """C."""\n    def _f(self):\n        pass\n    def __len__(self):\n        return 0\n', []),
        ('"""M."""\nclass C:\n    """C."""\n    @property\n    def f(self):\n        pass\n', ["laconic/m.py:5 laconic.m.C.f"]),
        # torch documents `forward`, and nobody else does
        ('"""M."""\nclass C(nn.Module):\n    """C."""\n    def forward(self, x):\n        pass\n', []),
        ('"""M."""\nclass C:\n    """C."""\n    def forward(self, x):\n        pass\n', ["laconic/m.py:4 laconic.m.C.forward"]),
    ],
)  # fmt: skip
def test_what_needs_a_docstring(tmp_path, source, found):
    assert silent(tmp_path, m=source) == found


def test_a_method_may_inherit_its_docstring(tmp_path):
    base = '"""B."""\nclass Base:\n    """B."""\n    def f(self):\n        """F."""\n    def g(self):\n        pass\n'
    heir = (
        '"""M."""\nfrom ._base import Base as Root\nclass C(Root[int]):\n    """C."""\n'
        "    def f(self):\n        pass\n    def g(self):\n        pass\n"
    )
    assert silent(tmp_path, _base=base, m=heir) == ["laconic/m.py:7 laconic.m.C.g"]


def test_stubs_are_public_and_followed(tmp_path):
    files = {
        "norm/__init__": '"""Norms."""\n',
        "norm/__init__.pyi": "from ._a import A as A\nfrom ._a import f as f\n",
        "norm/_a": '"""A."""\nfrom laconic.norm._b import f\nclass A:\n    pass\n',
        "norm/_b": '"""B."""\ndef f():\n    pass\n',
        "__init__.pyi": "from . import norm as norm\nfrom .norm._a import A as A\n",
    }
    found = silent(tmp_path, **files)
    assert [one.split()[0] for one in found] == ["laconic/norm/_a.py:3", "laconic/norm/_b.py:2"]
    assert found[1] == "laconic/norm/_b.py:2 laconic.norm.f"


def test_a_public_name_that_is_defined_nowhere(tmp_path):
    with pytest.raises(BadInput, match=r"laconic\.m\.lost is public and defined nowhere"):
        breaches(package(tmp_path, m='"""M."""\n__all__ = ["lost"]\n'))
    with pytest.raises(BadInput, match=r"laconic\.norm\.lost"):
        breaches(
            package(tmp_path / "b", **{"norm/__init__": '"""N."""\n', "norm/__init__.pyi": "from ._a import lost\n"})
        )


# --- Markdown ---------------------------------------------------------------------------------------------------------

DOCSTRING = """`m`: a < b, and `x < y`.

    y = x < 2

Example:
    >>> 1 + 1
    2
    >>> "a"
    'a'

After it.
"""


def test_prose_keeps_code_and_fences_examples():
    text = prose(DOCSTRING)
    assert text.startswith("`m`: a &lt; b, and `x < y`.\n\n    y = x < 2\n")
    assert "**Example**\n\n```pycon\n>>> 1 + 1\n2\n>>> \"a\"\n'a'\n```\n" in text
    assert text.endswith("After it.")


def test_prose_inside_a_section_keeps_its_indentation():
    text = prose("F.\n\nArgs:\n    a: first, as\n\n        >>> 1\n        1\n\n    b: second.\n")
    assert "        ```pycon\n        >>> 1\n        1\n        ```\n\n    b: second." in text


def test_examples_are_taken_out():
    assert examples(DOCSTRING) == [">>> 1 + 1\n2\n>>> \"a\"\n'a'"]
    rest = without_examples(DOCSTRING)
    assert ">>>" not in rest and "Example" not in rest and rest.endswith("y = x < 2\n\nAfter it.")
    assert examples("No prompt: a >> b") == []


def test_a_cell_stays_in_its_row():
    assert cell("a | b\n <c> `<d>`") == "a \\| b &lt;c> `<d>`"


# --- generated pages --------------------------------------------------------------------------------------------------

CLAIM = """    claim={"text": "Halving is better.", "metric": "accuracy", "direction": "lower", "margin": 0.5,
           "arms": ("plain", "halved"), "seeds": 5, "minutes": 1, "task": "digits"},
    composes=("third", "absent"),
"""


def landed(root: Path, *, record: bool) -> methods.Landed:
    """A tree with two methods, the first of which claims something."""
    about = "halves.\n\nExample:\n    >>> 4 / 2\n    2.0"
    files = {
        "norm/_halve.py": method("halve", about=about, more=CLAIM),
        "norm/_third.py": method("third", title="On Thirds", summary="Takes a | third."),
    }
    where = tree(root, files)
    (root / "experiments" / "norm").mkdir(parents=True)
    experiment = root / "experiments" / "norm" / "halve.py"
    experiment.write_text('"""The claim."""\n')
    (where / "norm" / "__init__.py").write_text('"""Norms.\n\nMore on them."""\n')
    if record:
        runs = [
            {"arm": arm, "seed": s, "value": v + s} for arm, v in (("plain", 3.0), ("halved", 1.5)) for s in range(5)
        ]
        halve = read(where).get("halve")
        said = {
            "id": "halve", "verdict": "confirmed", "sentence": "confirmed: better by 1.5, 95 % within 1.4 to 1.6",
            "effect": 1.5, "interval": [1.4, 1.6], "claim": dict(halve.card.claim), "runs": runs, "seconds": 12.0,
            "command": "laconic reproduce halve", "commit": "0123456789abcdef", "modified": False,
            "machine": {"cpu": "A CPU", "cores": 2}, "versions": {"torch": "2.0"}, "sources": fingerprint(halve, experiment),
        }  # fmt: skip
        (root / "experiments" / "records").mkdir()
        (root / "experiments" / "records" / "halve.json").write_text(json.dumps(said))
        (root / "experiments" / "records" / "halve.svg").write_text("<svg/>")
    return methods.Landed.read(read(where), Sources(where))


def test_the_page_of_a_method(tmp_path):
    found = landed(tmp_path, record=True)
    page = methods.method_page(found, found.catalog.get("halve"))
    assert "    y = (x - mean) / sqrt(var + eps)        x (N, C)" in page
    assert "## Example\n\n```pycon\n>>> 4 / 2\n2.0\n```" in page and page.count(">>>") == 1
    assert '!!! success "Confirmed"\n\n    better by 1.5, 95 % within 1.4 to 1.6' in page
    assert "![confirmed: better by 1.5, 95 % within 1.4 to 1.6](halve.svg)" in page
    assert "| 3 | 6 | 4.5 | 1.5 |" in page  # lower is better: the difference is turned round
    assert "[`third`](third.md)" in page and "`absent` (not landed)" in page
    assert "at commit `0123456789` on A CPU, 2 cores" in page
    assert "::: laconic.norm.Halve" in page and "a [Layer](../kinds.md#layer)" in page
    assert "older than" not in page


def test_the_page_says_where_a_claim_was_not_run_or_is_out_of_date(tmp_path):
    found = landed(tmp_path / "a", record=False)
    page = methods.method_page(found, found.catalog.get("halve"))
    assert '!!! note "Not run"' in page and ".svg" not in page

    found = landed(tmp_path / "b", record=True)
    experiment = tmp_path / "b" / "experiments" / "norm" / "halve.py"
    experiment.write_text('"""Another."""\n')
    found = methods.Landed.read(found.catalog, found.sources)
    assert "Changed since: experiment." in methods.method_page(found, found.catalog.get("halve"))
    assert "**confirmed** \\*" in methods.claim_table(found, "methods/claims.md")


def test_a_method_without_claim_has_no_such_section(tmp_path):
    found = landed(tmp_path, record=False)
    page = methods.method_page(found, found.catalog.get("third"))
    assert "## Claim" not in page and "::: laconic.norm.Third" in page


def test_tables_name_every_method(tmp_path):
    found = landed(tmp_path, record=True)
    for made in (methods.method_tables(found, "methods/index.md"), methods.family_page(found, "norm")):
        assert "`halve`" in made and "confirmed |" in made and "Takes a \\| third." in made
    assert "[`halve`](norm/halve.md)" in methods.method_tables(found, "methods/index.md")
    assert "[`halve`](halve.md)" in methods.family_page(found, "norm")
    assert "| Halving is better. | 1.5 (1.4 to 1.6) | 0.5 |" in methods.claim_table(found, "methods/claims.md")


def test_every_kind_is_explained():
    text = methods.kind_list(methods.Landed.read(read(), Sources()), "methods/kinds.md")
    for kind in KINDS:
        section = re.search(rf"^## {kind}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
        assert section and section[1].count("\n    - ") >= 4, kind


def test_every_command_and_option_is_listed():
    from typer.main import get_command

    from laconic.cli import app

    text = commands.command_list()
    for name, command in get_command(app).commands.items():
        section = re.search(rf"^## laconic {name}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
        assert section, name
        assert all(option in section[1] for one in command.params for option in one.opts if option.startswith("-")), (
            name
        )
    assert "laconic compress [MODEL] --out OUT [OPTIONS]" in text


def test_every_public_module_has_a_page_that_names_its_names():
    sources = Sources()
    modules = reference.modules(sources)
    assert {"laconic.errors", "laconic.core.fit", "laconic.testing"} <= {one.dotted for one in modules}
    for module in modules:
        page = reference.module_page(sources, module)
        assert [name for name in module.public if not re.search(rf"\b{name}\b", page)] == [], module.dotted


# --- pages by hand ----------------------------------------------------------------------------------------------------


def run_python_of(page: Path, folder: Path) -> None:
    """Run the Python on a page, block by block, in a folder."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M):
        command = [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "artifact"], ids=lambda page: page.stem)
def test_python_on_a_page_runs(page, tmp_path):
    run_python_of(page, tmp_path)


def test_the_page_on_the_artifact(tmp_path):
    """Its example runs, and what that writes is what the page lists: files, keys, actions, tensors."""
    page = ROOT / "docs" / "pages" / "reference" / "artifact.md"
    text = page.read_text(encoding="utf-8")
    run_python_of(page, tmp_path)
    out = tmp_path / "small"
    written = {path.name for path in out.iterdir() if path.is_file()}
    listed = set(re.findall(r"`([a-z_]+\.(?:safetensors|json|yaml|py|html))`", text))
    assert written <= listed and listed - written == {"config.json"}  # which models of Hugging Face have

    manifest = json.loads((out / "laconic.json").read_text())
    assert set(manifest) == _keys(text)
    packed = [row["path"] for row in manifest["records"] if row["action"] == "pack"]
    assert packed
    assert {row["action"] for row in manifest["records"]} <= set(re.findall(r"^- `(\w+)`: ", text, flags=re.M))
    with safe_open(out / "model.safetensors", "pt") as file:
        stored = list(file.keys())  # noqa: SIM118 - it is no dict
    parts = {name.removeprefix(f"{path}_") for path in packed for name in stored if name.startswith(f"{path}_")}
    assert parts and parts <= set(re.findall(r"^\| `P_(\w+)` \|", text, flags=re.M))


def _section(text: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert found, title
    return found[1]


def _keys(text: str) -> set[str]:
    """What stands in the first column of the table on laconic.json."""
    rows = re.findall(r"^\| (`.*?) \|", _section(text, "laconic.json"), flags=re.M)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


# --- mkdocs -----------------------------------------------------------------------------------------------------------


def test_what_mkdocs_calls():
    pytest.importorskip("mkdocs", reason="the site's tools are not installed: make docs installs them")
    from mkdocs.exceptions import PluginError

    from docs import hooks

    nav = [{"Home": "index.md"}, {"Reference": ["a.md", {"Python": ["b.md"]}]}]
    assert hooks._section(nav, "Python") == ["b.md"]
    with pytest.raises(PluginError, match="no section 'Methods'"):
        hooks._section(nav, "Methods")

    text = "[a](CONTRIBUTING.md) [b](LICENSE) [c](https://example.org) [d](README.md#x) [e](docs/pages/index.md)"
    assert hooks._without_dead_links(text) == (
        "[a](CONTRIBUTING.md) b (`LICENSE`) [c](https://example.org) [d](start.md#x) [e](index.md)"
    )
    local, foreign = '<script src="a.js"></script>', '<script defer src="//cdn.example.org/a.js">'
    assert hooks.ELSEWHERE.findall(f'<a href="https://example.org">{local}') == []
    assert hooks.ELSEWHERE.findall(foreign) == [foreign]
    used = {match[1].split()[0] for page in PAGES for match in hooks.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert used == set(hooks.BLOCKS)


def test_the_table_of_test_time_norms_is_that_of_its_record():
    record = json.loads((ROOT / "benchmarks/records/test-time-cifar.json").read_text())
    want = [
        f"| {row['method']} | {row['batch']} | {row['order']} | {100 * row['accuracy']['clean']:.1f} | {100 * row['mean']:.1f} |"
        for row in record["rows"]
    ]
    page = (ROOT / "docs/pages/guides/norms.md").read_text().splitlines()
    assert want and [line for line in page if line.startswith(tuple(f"| {row['method']} |" for row in record["rows"]))] == want


def test_the_table_of_strategies_is_that_of_its_record():
    plans = json.loads((ROOT / "benchmarks/records/weight-methods-chars.json").read_text())["plans"]
    rows = table_after("## What they lose")
    assert {"rtn", "gptq", "mixed"} < {name for name, *_ in rows}
    for name, *shown in rows:
        assert shown == [f"{plans[f'{name}/{bits}']['drop']:.2f}" for bits in (4, 3, 2)], name


def test_the_table_of_caches_is_that_of_its_record():
    record = json.loads((ROOT / "benchmarks/records/long-context.json").read_text())
    page = (ROOT / "docs/pages/guides/run-a-model.md").read_text()
    rows = {row["arm"]: row for row in record["rows"] if row["tokens"] == 4096}
    begin = page.index("| cache | perplexity |")
    shown = [line.strip("| ").split(" | ") for line in page[begin:].partition("\n\n")[0].splitlines()[2:]]
    assert {"floats", "4 bits", "2 bits, rotatekv"} < {name for name, *_ in shown}
    for name, *cells in shown:
        row = rows[name]
        assert cells == [f"{row['worse_percent']:+.1f} %", f"{row['bytes'] / 2**20:.1f}", f"{row['ratio']:.2f}x"], name


def test_the_table_of_mixed_plans_is_that_of_its_records():
    rows = table_after("## Where bits go")
    assert len(rows) >= 5
    for name, unit, *shown in rows:
        record = json.loads((ROOT / f"benchmarks/records/weight-methods-{name}.json").read_text())
        plans = [record["plans"].get(f"mixed/{bits}") for bits in (4, 3, 2)]
        pairs = [(p["against_drop"], p["drop"]) if p else ("-", "-") for p in plans]
        want = [f"{one:.2f}" if isinstance(one, float) else one for pair in pairs for one in pair]
        assert (unit, shown) == (record["unit"], want), name


def table_after(heading: str) -> list[list[str]]:
    """Rows of the first table under a heading of the guide of strategies."""
    page = (ROOT / "docs/pages/guides/strategies.md").read_text().partition(heading)[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page if line.startswith("| ")][1:]


def test_the_table_of_quantizers_is_that_of_its_record():
    record = json.loads((ROOT / "benchmarks/records/quantizers-smollm-moby.json").read_text())
    want = [
        f"| {row['program']} | {row['method']} | {row['cpu_seconds']:.1f} | {row['peak_rss_bytes'] / 1e9:.2f} "
        f"| {row['perplexity']:.2f} |"
        for row in record["rows"]
    ]
    page = (ROOT / "benchmarks/README.md").read_text()
    begin = page.index("| program | method |")
    assert page[begin:].partition("\n\n")[0].splitlines()[2:] == want
    assert f"{record['float']['perplexity']:.2f}" in page[:begin]
    looking = {row["program"]: row for row in record["rows"] if row["method"] != "rtn"}
    ours = looking.pop("laconic")
    assert all(ours[name] < row[name] for row in looking.values() for name in ("cpu_seconds", "perplexity"))
