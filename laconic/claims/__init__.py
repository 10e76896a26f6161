"""Claims: does a method do what its paper says, on a small task, over paired seeds, by one rule for all methods.

A method's card states the claim and its margin before anything is run; `experiments/<family>/<id>.py` trains one
arm with one seed; here the seeds are run, the verdict is computed, and the record is written.
"""

from __future__ import annotations

from .reproduce import Outcome, reproduce
from .verdict import Verdict, judge

__all__ = ["Outcome", "Verdict", "judge", "reproduce"]
