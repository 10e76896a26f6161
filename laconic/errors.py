"""The errors that laconic raises on purpose."""

from __future__ import annotations

__all__ = ["BadInput", "Impossible", "LaconicError"]


class LaconicError(Exception):
    """Base of every error that laconic raises on purpose (exit code 1 on the command line)."""


class BadInput(LaconicError):
    """What the user gave cannot be worked with; the message is one clear sentence (exit code 2)."""


class Impossible(BadInput):
    """The input is sound but the budget cannot be reached from the model's shapes (exit code 2)."""
