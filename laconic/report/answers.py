"""What `laconic run` shows in a terminal: speeds, similarities, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import text

__all__ = ["MOST_SIMILARITIES", "labels_table", "similarity_table", "speed_line"]

MOST_SIMILARITIES = 12  # texts whose similarities still fit a terminal


def speed_line(record: Mapping) -> str:
    """One line on what answering took: a record of `laconic run`."""
    if record["verb"] == "generate":
        parts = [f"prompt {_tokens(record['prompt_tokens'])} at {_rate(record['prefill_tokens_per_second'])}"]
        if record["decode_tokens_per_second"] is not None:
            parts.append(f"answer {_tokens(record['new_tokens'])} at {_rate(record['decode_tokens_per_second'])}")
    else:
        n = record["texts"] if record["verb"] == "embed" else record["inputs"]
        parts = [f"{text.count(n)} {'text' if record['verb'] == 'embed' else 'input'}{'' if n == 1 else 's'} "
                 f"in {text.seconds(record['seconds'])}"]  # fmt: skip
    imports = record["import_seconds"]
    parts.append(
        f"loaded in {text.seconds(record['load_seconds'])}"
        + (f" after {text.seconds(imports)} of imports" if imports >= 0.1 else "")
    )
    parts.append(f"at most {text.bytes_(record['peak_rss_bytes'])} of memory")
    if record.get("peak_device_bytes"):
        parts.append(f"and {text.bytes_(record['peak_device_bytes'])} on the device")
    return ", ".join(parts)


def _tokens(n: int) -> str:
    return f"{n} token{'' if n == 1 else 's'}"


def _rate(x: float) -> str:
    return f"{text.amount(x)} a second"


def similarity_table(texts: Sequence[str], vectors: Sequence[Sequence[float]]) -> RenderableType:
    """Cosines between the first texts, whose vectors have length 1."""
    shown = min(len(texts), MOST_SIMILARITIES)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", overflow="ellipsis", no_wrap=True, max_width=50)
    for number in range(1, shown + 1):
        table.add_column(str(number), justify="right")
    for number, (one, x) in enumerate(zip(texts[:shown], vectors[:shown], strict=True), 1):
        cosines = [sum(a * b for a, b in zip(x, y, strict=True)) for y in vectors[:shown]]
        table.add_row(Text(f"{number} {' '.join(one.split())}"), *(f"{c:.2f}" for c in cosines))
    rows: list[RenderableType] = [table]
    if shown < len(texts):
        rows.append(Text(f"and {len(texts) - shown} more", style="dim"))
    return Group(*rows)


def labels_table(answers: Sequence[Mapping]) -> RenderableType:
    """The labels of each input, the most probable first; outputs that are none of labels by their size."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("Input", overflow="ellipsis", no_wrap=True, max_width=50)
    table.add_column("Label", overflow="fold")
    table.add_column("Probability", justify="right")
    for answer in answers:
        name = Text(" ".join(str(answer["input"]).split()))
        for i, found in enumerate(answer.get("labels", ())):
            table.add_row(name if i == 0 else "", Text(found["label"], style="bold" if i == 0 else ""),
                          f"{found['probability']:.3f}")  # fmt: skip
        if "output" in answer:
            table.add_row(name, Text(_output(answer["output"])), text.MISSING)
    return table


def _output(value: float | Sequence) -> str:
    """A number, some numbers, or the shape of more."""
    if isinstance(value, (int, float)):
        return text.amount(value, 5)
    if len(value) <= 8 and all(isinstance(one, (int, float)) for one in value):
        return " ".join(text.amount(one, 5) for one in value)
    shape, inner = [], value
    while not isinstance(inner, (int, float)):
        shape.append(len(inner))
        if not inner:
            break
        inner = inner[0]
    return f"a tensor of {' x '.join(map(str, shape))}"
