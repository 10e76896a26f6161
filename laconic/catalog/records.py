"""The records of claims as the catalog shows them: `experiments/records/<id>.json` of the source tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laconic.errors import BadInput

__all__ = ["read_record", "verdict_of"]


def read_record(package: Path, id: str) -> dict[str, Any] | None:
    """The record of a method's claim, or None where there is none (an installed package carries no experiments).

    Raises:
        BadInput: the file is not JSON.
    """
    path = package.parent / "experiments" / "records" / f"{id}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadInput(f"{path.name}:{error.lineno}: this record is not JSON: run `laconic reproduce {id}`") from None
    return record if isinstance(record, dict) else None


def verdict_of(claim: object, record: dict[str, Any] | None) -> str:
    """One word on a claim: its verdict, "not run", or "none" where the card claims nothing."""
    if claim is None:
        return "none"
    return str(record.get("verdict", "unknown")) if record else "not run"
