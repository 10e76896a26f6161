"""Contracts and vectors: what every object of a kind must pass, and what official implementations computed.

    from laconic.testing import Example, check

    report = check(Example(lambda: MyNorm(16), kind="Layer", inputs=[(3, 5, 16)], wrong=[(3, 5, 15)]))
    assert report.ok, str(report)

`laconic.testing.vectors` reads and compares recorded vectors.
"""

from .contract import Broken, LeftOut, Report, check, checks_for
from .example import Example, Ints
from .traits import TRAITS
from .vectors import Case, VectorFile

__all__ = ["TRAITS", "Broken", "Case", "Example", "Ints", "LeftOut", "Report", "VectorFile", "check", "checks_for"]
