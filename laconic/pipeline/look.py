"""`look`: what calibration data shows before the model runs on it: too few, twice, of other lengths, without its marks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from laconic.core.units import Unit
from laconic.errors import BadInput
from laconic.tasks import Task
from laconic.tasks.view import ModelView

from .observe import positions

__all__ = ["SEEN", "Seen", "look", "tokenizer_of"]

SEEN = 16384  # positions that calibration sees; more helps little and costs time in proportion
UNLIKE = 1.5  # times longer or shorter than what the verdict is taken on
ALL = 1 << 40


@dataclass(frozen=True)
class Seen:
    """One thing that was looked at.

    Attributes:
        check: its name.
        state: "fine", "warning", or "skipped" where it does not apply.
        sentence: what was found, with its figure, and what to do.
    """

    check: str
    state: Literal["fine", "warning", "skipped"]
    sentence: str


def look(task: Task, units: Sequence[Unit], tokenizer: Callable[[], Any], seq: int | None = None) -> list[Seen]:
    """What can be seen without running the model.

    Args:
        task: with a calibrate split.
        units: of the model that can be packed.
        tokenizer: gives the one that lies with the model, or None; asked for where inputs are texts.
        seq: tokens of an example, as in `compress`.
    """
    rows = {split: _columns(task.batches(split, batch=ALL, seq=seq)) for split in task.splits}
    reader = tokenizer() if "input_ids" in rows["calibrate"] else None
    return [
        _enough(rows["calibrate"], units),
        _twice(rows),
        _lengths(rows),
        _beginning(rows["calibrate"], reader),
        _chat(rows["calibrate"], reader),
    ]


def tokenizer_of(source: Any) -> Any:
    """The tokenizer that lies with a model; None where there is none."""
    try:
        return ModelView.of(source, None).get_tokenizer(_Named(source.name))
    except (BadInput, OSError, ValueError, AttributeError):
        return None


@dataclass(frozen=True)
class _Named:
    name: str


def _columns(batches: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors of a split by name, from its only batch."""
    rows = batches[0] if batches else {}
    return dict(rows) if isinstance(rows, Mapping) else {str(i): value for i, value in enumerate(rows)}


def _real(rows: Mapping[str, Tensor]) -> Tensor | None:
    """Tokens of each row that are no padding; None where the inputs are no texts."""
    if "input_ids" not in rows:
        return None
    mask = rows.get("attention_mask")
    return torch.full((len(rows["input_ids"]),), rows["input_ids"].shape[1]) if mask is None else (mask != 0).sum(1)


def _enough(rows: Mapping[str, Tensor], units: Sequence[Unit]) -> Seen:
    widest = max((u for u in units if u.op == "linear"), key=lambda u: u.spec(u.options[0]).matrix[1], default=None)
    if widest is None:
        return Seen("enough", "skipped", "no linear layer reads these inputs")
    real, k = _real(rows), widest.spec(widest.options[0]).matrix[1]
    count = min(int(real.sum()) if real is not None else positions(tuple(rows.values())), SEEN)
    said = f"calibration sees {count:,} positions, and the widest layer ({widest.name}) reads {k:,} inputs"
    if count >= k:
        return Seen("enough", "fine", said)
    return Seen(
        "enough", "warning", f"{said}: from fewer positions than inputs second moments have gaps; give more examples"
    )


def _twice(rows: Mapping[str, Mapping[str, Tensor]]) -> Seen:
    hashes = {split: [_hash(columns, i) for i in range(_length(columns))] for split, columns in rows.items()}
    own = Counter(hashes["calibrate"])
    again = sum(count - 1 for count in own.values())
    judged = {split: len(set(own) & set(found)) for split, found in hashes.items() if split != "calibrate"}
    share = again / max(1, len(hashes["calibrate"]))
    shared = [f"{count} lie in the {split} split too" for split, count in judged.items() if count]
    said = f"{again} of {len(hashes['calibrate'])} examples come twice"
    if shared:
        return Seen("twice", "warning", f"{said}; {' and '.join(shared)}, whose figures then flatter: take them out")
    if share > 0.05:
        return Seen("twice", "warning", f"{said}: they count twice and show nothing new; take them out")
    return Seen("twice", "fine", said)


def _length(columns: Mapping[str, Tensor]) -> int:
    return len(next(iter(columns.values()), ()))


def _hash(columns: Mapping[str, Tensor], row: int) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for value in columns.values():
        found.update(np.ascontiguousarray(value[row].numpy()).tobytes())
    return found.digest()


def _lengths(rows: Mapping[str, Mapping[str, Tensor]]) -> Seen:
    other = "verify" if "verify" in rows else "select" if "select" in rows else ""
    own, theirs = _real(rows["calibrate"]), _real(rows[other]) if other else None
    if own is None or theirs is None or not len(own) or not len(theirs):
        return Seen("lengths", "skipped", "the inputs are no texts")
    a, b = float(own.float().mean()), float(theirs.float().mean())
    said = f"examples have {a:.0f} tokens, those of the {other} split {b:.0f}"
    if max(a, b) > UNLIKE * max(1.0, min(a, b)):
        return Seen(
            "lengths", "warning", f"{said}: layers meet other positions and fewer tokens than in use; draw alike ones"
        )
    return Seen("lengths", "fine", said)


def _beginning(rows: Mapping[str, Tensor], tokenizer: Any) -> Seen:
    begin = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is None or begin is None or "input_ids" not in rows or tokenizer("a")["input_ids"][:1] != [begin]:
        return Seen("beginning", "skipped", "no tokenizer that puts a token before every text")
    ids, mask = rows["input_ids"], rows.get("attention_mask")
    first = torch.zeros(len(ids), dtype=torch.long) if mask is None else (mask != 0).int().argmax(1)
    share = float((ids.gather(1, first.unsqueeze(1)) == begin).float().mean())
    said = f"{100 * share:.0f} % of the examples begin with {tokenizer.bos_token}"
    if share < 0.5:
        return Seen("beginning", "warning", f"{said}, which this tokenizer puts before every text: tokenize with it")
    return Seen("beginning", "fine", said)


def _chat(rows: Mapping[str, Tensor], tokenizer: Any) -> Seen:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None) or "input_ids" not in rows:
        return Seen("chat", "skipped", "no tokenizer with a chat template")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    marks = {i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i in set(tokenizer.all_special_ids)}
    if not marks:
        return Seen("chat", "skipped", "the chat template has no tokens of its own")
    found = torch.isin(rows["input_ids"], torch.tensor(sorted(marks))).any(1)
    said = f"{int(found.sum())} of {len(found)} examples hold a token of the chat template"
    if not bool(found.any()):
        return Seen(
            "chat", "warning", f"{said}: where the model answers in chats, calibrate on chats put into its template"
        )
    return Seen("chat", "fine", said)
