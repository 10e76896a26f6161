"""Small task `spam`: e-mails of the SpamAssassin corpus, wanted (0) or not (1), by subject and text alone.

The other headers are left out: they tell on which machine and when the corpus was collected, and a network
that reads them learns that. E-mails with the same words are kept once.
"""

from __future__ import annotations

import email
import email.policy
import os
import re
from pathlib import Path

import numpy as np

from laconic.errors import BadInput

from .base import Baseline, ClassTask
from .sources import locate
from .texts import text_task

__all__ = ["load", "read_mail"]

FOLDERS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
LENGTH, VOCABULARY = 64, 4000
MOST_BYTES = 20_000  # of an e-mail; only its first words are read
BASELINE = Baseline(epochs=3, lr=3e-3, value=0.945, spread=0.035)
_TAG = re.compile(r"<[^>]{0,500}>")


def read_mail(raw: bytes) -> str:
    """Subject and text of an e-mail, without HTML tags; attachments are left out."""
    mail = email.message_from_bytes(raw[:MOST_BYTES], policy=email.policy.compat32)
    parts = [str(mail.get("Subject", ""))]
    for part in mail.walk():
        if part.get_content_maintype() == "text" and not part.get_filename():
            content = part.get_payload(decode=True)
            if isinstance(content, bytes):
                parts.append(content.decode("latin-1"))
    return _TAG.sub(" ", "\n".join(parts))


def load(
    name: str = "spam", *, seed: int = 0, size: int | None = None, cache: str | os.PathLike[str] | None = None
) -> ClassTask:
    """The task: the first 64 words of an e-mail as ids; trains on 60 % of all by default."""
    texts, labels = _read(locate("spam-assassin", name, cache))
    return text_task(name, texts, labels, length=LENGTH, most=VOCABULARY, baseline=BASELINE, seed=seed, size=size)


def _read(folder: Path) -> tuple[list[str], np.ndarray]:
    found: dict[str, int] = {}
    for part, label in FOLDERS.items():
        paths = sorted((folder / part).glob("*.txt"))
        if not paths:
            raise BadInput(f"{folder / part} holds no e-mails; fetch spam-assassin again")
        for path in paths:
            found.setdefault(" ".join(read_mail(path.read_bytes()).split()), label)
    return list(found), np.array(list(found.values()))
