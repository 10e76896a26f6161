"""The page in a real browser: its script runs, it logs nothing, nothing is refused by its own policy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from laconic.report import write_report

from .sample import make_record

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--log-level=0",
)

USE = """
const head = document.querySelector("table[data-sortable] th.n");
const cells = () => [...document.querySelectorAll("#ledger-rows td.n")];
const sizes = () => cells().map((cell) => Number(cell.dataset.value));
const found = {};
head.firstElementChild.click();
found.down = sizes();
head.firstElementChild.click();
found.up = sizes();
found.sort = head.getAttribute("aria-sort");
const input = document.querySelector("input[data-filter='ledger-rows']");
input.value = "QUERY layer.3.";
input.dispatchEvent(new Event("input"));
found.shown = [...document.getElementById("ledger-rows").rows].filter((row) => !row.hidden).length;
document.querySelector("#units g .hit").dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
found.tip = document.getElementById("tip").hidden ? "" : document.getElementById("tip").textContent;
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page is not rendered")


def browse(page, folder, *flags: str) -> subprocess.CompletedProcess:
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_record(40), tmp_path_factory.mktemp("page with spaces") / "report.html")


def test_it_logs_nothing_and_its_script_has_run(page, tmp_path):
    done = browse(page, tmp_path, "--dump-dom")
    assert not complaints(done.stderr)
    assert re.search(r"<th[^>]*><button type=\"button\">Name</button>", done.stdout)


def test_a_complaint_would_be_seen(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace('"use strict";', "missing();", 1))
    assert complaints(browse(broken, tmp_path, "--dump-dom").stderr)


def test_the_ledger_sorts_and_filters_and_a_unit_can_be_pointed_at(page, tmp_path):
    used = tmp_path / "used.html"
    used.write_text(page.read_text().replace("</body>", f"<script>{USE}</script></body>"))
    done = browse(used, tmp_path, "--dump-dom")
    assert not complaints(done.stderr)
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout).group(1))
    sizes = sorted((row["bytes"] for row in make_record(40)["ledger"]), reverse=True)
    assert found["down"] == sizes
    assert found["up"] == sizes[::-1]
    assert found["sort"] == "ascending"
    names = [row["name"] for row in make_record(40)["ledger"]]
    assert found["shown"] == sum("layer.3." in name and "query" in name for name in names) > 0
    assert found["tip"].startswith("embeddings.word_embeddings.weight\n")


def test_it_renders(page, tmp_path):
    picture = tmp_path / "page.png"
    browse(page, tmp_path, f"--screenshot={picture}", "--window-size=1280,2000")
    pixels = pytest.importorskip("PIL.Image").open(picture).convert("RGB")
    assert pixels.size == (1280, 2000)
    assert len(pixels.resize((320, 500)).getcolors(320 * 500)) > 200
    assert os.path.getsize(picture) > 50_000
