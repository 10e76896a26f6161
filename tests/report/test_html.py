"""The page: all sections, everything escaped, nothing fetched, figures as recorded, gaps survived."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from laconic.report import render_report, text, write_report
from laconic.report.charts import pareto

from .sample import HOSTILE, INT8, make_record

SECTIONS = {
    "before-after", "notes", "tried", "units", "histograms", "changed", "ledger", "left-alone", "again",
}  # fmt: skip
VOID = {"meta", "link", "input", "br", "wbr"}
URLS = {"src", "href", "srcset", "xlink:href", "poster", "action", "data"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, links, text and the tables' rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.urls: list[str] = []
        self.scripts = 0
        self.words: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self.scripts += tag == "script"
        if "id" in found:
            self.ids.append(found["id"])
        self.urls += [value for key, value in attrs if key in URLS]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()
        if tag in ("td", "th"):
            self.words.append(" ")

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(scope="module")
def record() -> dict:
    return make_record(40)


@pytest.fixture(scope="module")
def page(record) -> Page:
    return Page(render_report(record))


def test_it_is_well_formed_and_has_every_section(page):
    assert not page.open
    assert set(page.ids) >= SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert {url[1:] for url in page.urls if url.startswith("#")} <= set(page.ids)
    (html,) = [attrs for tag, attrs in page.tags if tag == "html"]
    assert html["lang"] == "en"


def test_the_title_is_model_and_verdict(page, record):
    assert page.text.strip().startswith(f"minilm: {record['verdict']['sentence']}")


def test_nothing_is_fetched(page, record):
    assert all(url.startswith(("#", "data:")) for url in page.urls), page.urls
    source = render_report(record)
    assert not re.search(r"https?://|@import|url\(", source)
    assert "default-src 'none'" in source


def test_text_from_outside_is_escaped(record):
    hostile = dict(record, command=HOSTILE, out=HOSTILE, also={HOSTILE: [1.0, 2.0]})
    hostile["model"] = {"name": HOSTILE, "class": HOSTILE}
    hostile["verdict"] = dict(record["verdict"], sentence=HOSTILE)
    hostile["machine"] = {HOSTILE: HOSTILE}
    hostile["tried"] = [dict(record["tried"][0], name=f'"><b>{HOSTILE}')]
    hostile["units"] = [dict(record["units"][0], name=HOSTILE, scheme=HOSTILE, op=f'"{HOSTILE}')]
    hostile["ledger"] = [dict(record["ledger"][0], name=HOSTILE, scheme=f'"{HOSTILE}', reason=HOSTILE)]
    html = render_report(hostile)
    assert HOSTILE not in html
    assert Page(html).scripts == 1
    assert HOSTILE in Page(html).text


def test_before_and_after_say_what_was_measured(page):
    for words in (
        "91.2 MB",
        "20.5 MB",
        "95.71 %",
        "95.61 %",
        "drop 0.1 points (95 %: -0.2 to 0.5)",
        "1.16x slower",
    ):
        assert words in page.text
    assert "This model is smaller, not faster: 1.16x the time" in page.text
    assert "Compressing took 2 min 44 s and at most 1.41 GB of resident memory." in page.text
    assert "27 answers changed among the 1,725 examples" in page.text


def test_a_list_of_changed_answers_that_is_cut_says_so(page, record):
    assert "The first" not in page.text
    cut = dict(record, flips=1234)
    assert f"Answers that changed The first {len(record['changed'])} of 1,234." in Page(render_report(cut)).text


def test_the_ledger_adds_up_to_the_file(page, record):
    whole = sum(row["bytes"] for row in record["ledger"]) + record["ledger_header"] + record["ledger_padding"]
    assert whole == record["after"]["size"]
    assert f"sum {whole:,} equals the file's size of {whole:,} bytes" in page.text
    assert all(row["name"] in page.text for row in record["ledger"])
    assert INT8 in page.text


def test_a_ledger_that_does_not_add_up_says_so(record):
    text = Page(render_report(dict(record, ledger_padding=record["ledger_padding"] + 7))).text
    assert "does not equal the file's size: 7 bytes more than" in text


def test_what_was_left_alone_is_grouped_by_reason(page):
    assert "one dimension: too small to be worth a scheme 39 tensors" in page.text
    assert "not floating point 1 tensor," in page.text


def test_every_unit_can_be_pointed_at(page, record):
    tips = [attrs["data-tip"] for _, attrs in page.tags if attrs.get("data-tip")]
    for unit in record["units"]:
        (tip,) = [tip for tip in tips if tip.startswith(unit["name"] + "\n")]
        assert (unit["scheme"] or f"left alone: {unit['reason']}") in tip


def test_far_tries_do_not_flatten_the_others(page):
    labels = [attrs.get("aria-label", "") for tag, attrs in page.tags if tag == "circle"]
    assert sum("int2\n" in label for label in labels) == 2  # the wide and the narrow drawing
    paths = [attrs for tag, attrs in page.tags if tag == "path" and attrs.get("class") == "p-tried"]
    assert len(paths) == 4  # int3 and int2 as arrows at the edge, in both


@pytest.mark.parametrize(
    ("sizes", "labels"),
    [
        ([22.5e6, 22.6e6, 22.7e6], ["22.5 MB", "22.6 MB", "22.7 MB"]),
        ([0, 5e6, 1e7], ["0 B", "5 MB", "10 MB"]),
        ([22.61e6, 22.62e6, 22.63e6], ["22.61 MB", "22.62 MB", "22.63 MB"]),
        ([123.4e6, 123.402e6], ["123.400 MB", "123.402 MB"]),
        ([999.9e3, 1.0e6, 1.0001e6], ["0.9999 MB", "1.0000 MB", "1.0001 MB"]),
        ([7.0], ["7 B"]),
        ([0.0, 0.2, 0.4], ["0.0 B", "0.2 B", "0.4 B"]),
        ([22610000.2, 22610000.4], ["22.6100002 MB", "22.6100004 MB"]),
    ],
)
def test_ticks_of_sizes_that_lie_close_differ(sizes, labels):
    assert text.size_ticks(sizes) == labels


def test_the_size_axis_of_candidates_that_lie_close_has_different_labels():
    record = make_record(40)
    for number, one in enumerate(record["tried"]):
        one["size"] = 22_600_000 + 3_000 * number
    record["budget"]["size"]["bytes"] = 22_640_000
    for drawn in str(pareto(record)).split("<svg")[1:]:
        labels = re.findall(r">([\d.]+ MB)</text>", drawn)
        assert len(labels) > 2 and len(set(labels)) == len(labels)


def test_plans_on_the_frontier_say_what_they_are():
    record = make_record(5)
    record["tried"][0] |= {"name": "gptq, uniform, 12.91x", "recipe": "plans/300680.yaml", "size": 300_680, "drop": 1.4}
    record["tried"][1] |= {"name": "by hand", "recipe": "plans/1.yaml"}
    text = Page(render_report(record)).text
    assert "plans/300680.yaml: 301 kB, drop 1.4 points, gptq, uniform" in text
    assert re.search(r"plans/1.yaml: [^,]+, drop [^,]+, by hand", text)


@pytest.mark.parametrize("gone", ["task", "units", "ledger", "tried", "latency", "seconds", "machine", "before"])
def test_a_part_that_was_not_measured_is_no_error(record, gone):
    for absent in (dict(record, **{gone: None}), {k: v for k, v in record.items() if k != gone}):
        html = Page(render_report(absent))
        assert not html.open
        assert set(html.ids) >= SECTIONS


def test_an_empty_record_and_one_of_nothing_but_gaps():
    assert "No data was given, so no quality was measured" in Page(render_report({})).text

    def hollow(x):
        if isinstance(x, dict):
            return {key: hollow(value) for key, value in x.items()}
        if isinstance(x, list):
            return [hollow(value) for value in x[:3]]
        return float("nan") if isinstance(x, float) else None

    text = Page(render_report(hollow(make_record(5)))).text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_write_report_replaces_the_file_and_stays_small(tmp_path):
    path = tmp_path / "a folder" / "report.html"
    path.parent.mkdir()
    path.write_text("old")
    assert write_report(make_record(220), str(path)) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert 100_000 < path.stat().st_size < 1_500_000


def test_small_things_left_alone_are_counted_and_not_drawn(record):
    bias = dict(record["units"][-1], name="a.bias", bytes_before=64, bytes_after=64, bits=32)
    page = Page(render_report(dict(record, units=record["units"] + [bias] * 3)))
    assert "40 units in the model's order, 3 small ones left alone not drawn" in page.text
    assert not any((attrs.get("data-tip") or "").startswith("a.bias") for _, attrs in page.tags)
