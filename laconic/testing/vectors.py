"""Recorded vectors: what official implementations computed, compared within the tolerance that the file itself states.

`<name>.json` says which methods a file is for (`ids`) and gives its `cases`; `<name>.npz` holds the arrays. A case has a
`name`, a `what` (forward, backward, optimizer, ...), `args` and `arrays`: role -> array, or a list of arrays (one per
call or step). In `tests/<family>/test_<id>.py` one function computes a case:

    def run_vector(case: Case) -> dict[str, Tensor | list[Tensor]]:
        layer = RMSNorm(case.args["features"])
        layer.load_state_dict(case.named("state."))
        return {"output": layer(case.array("input"))}

A role that was read is an input. Every other role must be returned, and is compared. Nothing is skipped silently: a role
neither read nor returned fails the case, unless the file lists it as `informational`. A file may serve several ids; a
case that belongs to another of them is answered with `NotImplemented`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NotImplementedType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.errors import BadInput

from .contract import Broken

__all__ = ["Case", "Returned", "Tolerance", "VectorFile", "compare", "folder", "run_case"]

Returned = Mapping[str, Tensor | Sequence[Tensor]]

_REQUIRED = {"source", "calls", "keys", "ids", "cases", "tolerance", "official"}
_OPTIONAL = {"official_note", "shapes", "notes", "unused", "informational"}
_CASE = {"name", "what", "args", "arrays"}
_TOLERANCE = {"rtol", "atol", "dtype", "note"}
_OFFICIAL = ("full", "partly", "retyped")


def folder(root: Path | str = ".") -> Path:
    """The folder of vectors: `LACONIC_VECTORS`, else `tests/vectors` in the root of the source tree.

    Raises:
        BadInput: there is no such folder.
    """
    chosen = Path(os.environ.get("LACONIC_VECTORS") or Path(root) / "tests" / "vectors")
    if not chosen.is_dir():
        raise BadInput(f"{chosen} is no folder of vectors: set LACONIC_VECTORS to one")
    return chosen


@dataclass(frozen=True)
class Tolerance:
    """|got - want| <= atol + rtol |want|; `dtype` is what the recorded code computed in, `note` what else it leaves free."""

    rtol: float
    atol: float
    dtype: str = ""
    note: str = ""


@dataclass(frozen=True)
class VectorFile:
    """One pair of `<name>.json` and `<name>.npz`, checked as a whole when it is read."""

    name: str
    ids: tuple[str, ...]
    about: Mapping[str, Any] = field(repr=False)
    stored: Mapping[str, np.ndarray] = field(repr=False)

    @classmethod
    def read(cls, name: str, where: Path | None = None) -> VectorFile:
        """Read and check a file.

        Raises:
            BadInput: it is missing, does not parse, or does not say what it must, by file and case.
        """
        base = (where or folder()) / name
        described, arrays = base.with_name(f"{name}.json"), base.with_name(f"{name}.npz")
        try:
            about = json.loads(described.read_text(encoding="utf-8"))
            with np.load(arrays, allow_pickle=False) as opened:
                stored = {key: np.array(opened[key]) for key in opened.files}
        except FileNotFoundError as error:
            raise BadInput(f"{error.filename} is missing: vectors are a .json and an .npz of the same name") from error
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise BadInput(f"the vectors {base} do not parse: {error}") from error
        _check_file(described, about, stored)
        return cls(name, tuple(about["ids"]), about, stored)

    def cases(self) -> list[Case]:
        """The cases, fresh: which roles were read is kept in each."""
        return [Case(self, case["name"], case["what"], case["args"], case["arrays"]) for case in self.about["cases"]]

    def case(self, name: str) -> Case:
        """One case by name.

        Raises:
            BadInput: there is none.
        """
        for case in self.cases():
            if case.name == name:
                return case
        raise BadInput(f"{self.name}.json has no case {name!r}: {', '.join(c['name'] for c in self.about['cases'])}")

    def tolerance(self, role: str) -> Tolerance:
        """That of a role: its own exception, one whose pattern matches (if the file uses patterns), the file's."""
        general = {k: v for k, v in self.about["tolerance"].items() if k in _TOLERANCE}
        exceptions = self.about["tolerance"].get("except", {})
        special = exceptions.get(role)
        if special is None and "except_match" in self.about["tolerance"]:
            special = next((e for pattern, e in exceptions.items() if fnmatch.fnmatchcase(role, pattern)), None)
        return Tolerance(**{**general, **(special or {})})


@dataclass
class Case:
    """One call that was recorded.

    Attributes:
        file: where it comes from.
        name, what, args: as written: what was called, and with which options.
        roles: role -> name of its array, or a list of names.
        read: the roles that were read, and are inputs therefore.
        peeked: the roles that were looked at and must be returned all the same.
    """

    file: VectorFile
    name: str
    what: str
    args: Mapping[str, Any]
    roles: Mapping[str, str | list[str]]
    read: set[str] = field(default_factory=set)
    peeked: set[str] = field(default_factory=set)

    def __contains__(self, role: str) -> bool:
        return role in self.roles

    @property
    def informational(self) -> frozenset[str]:
        """Roles that the file gives for the reader alone."""
        return frozenset(self.file.about.get("informational", ()))

    def array(self, role: str) -> Tensor:
        """The one tensor of a role, fresh, in its stored type; marks the role as an input.

        Raises:
            BadInput: the case has no such role, or it has several arrays.
        """
        self.read.add(role)
        return self._one(role)

    def arrays(self, role: str) -> list[Tensor]:
        """All tensors of a role, in order; marks it as an input."""
        self.read.add(role)
        return self._several(role)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of all roles that start so, by the rest of their name: a state dict. They become inputs.

        Raises:
            BadInput: no role starts so.
        """
        found = {role.removeprefix(prefix): self.array(role) for role in self.roles if role.startswith(prefix)}
        if not found:
            raise BadInput(f"{self} has no role that starts with {prefix!r}: it has {', '.join(self.roles)}")
        return found

    def words(self, role: str) -> list[str]:
        """The strings of a role that holds text; marks it as an input."""
        self.read.add(role)
        return [str(word) for word in np.ravel(self._stored(role)[0])]

    def peek(self, role: str) -> list[Tensor]:
        """What was recorded for a result, where the file leaves something free (the sign of an eigenvector, a tie).

        The role must still be returned.

        Raises:
            BadInput: the file's tolerance has no note that leaves anything free.
        """
        if not self.file.tolerance(role).note:
            raise BadInput(f"{self}: the tolerance of {role!r} has no note that leaves anything free: compute it")
        self.peeked.add(role)
        return self._several(role)

    def expected(self, role: str) -> Tensor | list[Tensor]:
        """What a result is compared with."""
        return self._one(role) if isinstance(self._names(role), str) else self._several(role)

    def __str__(self) -> str:
        return f"{self.file.name}.json, case {self.name}"

    def _names(self, role: str) -> str | list[str]:
        if role not in self.roles:
            raise BadInput(f"{self} has no role {role!r}: it has {', '.join(self.roles)}")
        return self.roles[role]

    def _stored(self, role: str) -> list[np.ndarray]:
        names = self._names(role)
        return [self.file.stored[name] for name in ([names] if isinstance(names, str) else names)]

    def _several(self, role: str) -> list[Tensor]:
        found = self._stored(role)
        if any(array.dtype.kind in "US" for array in found):
            raise BadInput(f"{self}: the role {role!r} holds text: read it with case.words")
        return [torch.from_numpy(array.copy()) for array in found]

    def _one(self, role: str) -> Tensor:
        if not isinstance(self._names(role), str):
            raise BadInput(f"{self}: the role {role!r} is a list of arrays: read it with case.arrays")
        return self._several(role)[0]


def run_case(case: Case, runners: Mapping[str, Callable[[Case], Returned | NotImplementedType]]) -> list[str]:
    """Let the landed methods of a file compute a case and compare; returns the ids that took it.

    Args:
        case: one of the file's cases.
        runners: id -> its `run_vector`.

    Raises:
        Broken: a result is off, or a role was neither read nor returned.
        BadInput: a role that the case does not have, or what was returned cannot be compared.
    """
    took = []
    for method, run in runners.items():
        fresh = case.file.case(case.name)
        returned = run(fresh)
        if returned is NotImplemented:
            continue
        compare(fresh, returned)
        took.append(method)
    return took


def compare(case: Case, returned: Returned) -> None:
    """Hold what was returned against what was recorded.

    Raises:
        Broken: every difference, by role.
        BadInput: see `run_case`.
    """
    if not isinstance(returned, Mapping) or not returned:
        raise BadInput(f"{case}: run_vector must return results by role, and returned {type(returned).__name__}")
    for role in returned:
        case.expected(role)
    wrong = [f"{role}: was read as an input, so to return it shows nothing" for role in returned if role in case.read]
    for role in case.roles:
        if role not in case.read and role not in returned and role not in case.informational:
            wrong.append(f"{role}: neither read nor returned: compare it, or let the file list it as informational")
    for role, got in returned.items():
        if role not in case.read:
            wrong += _differences(role, got, case.expected(role), case.file.tolerance(role))
    if wrong:
        raise Broken("\n  ".join([f"{case}:", *wrong]))


def _differences(role: str, got: Any, want: Tensor | list[Tensor], tolerance: Tolerance) -> list[str]:
    if isinstance(want, Tensor):
        return _difference(role, got, want, tolerance)
    if isinstance(got, Tensor) or not isinstance(got, Sequence):
        return [f"{role}: a list of {len(want)} tensors was recorded, and {type(got).__name__} was returned"]
    if len(got) != len(want):
        return [f"{role}: {len(want)} tensors were recorded, and {len(got)} returned"]
    return [
        line
        for i, (g, w) in enumerate(zip(got, want, strict=True))
        for line in _difference(f"{role}[{i}]", g, w, tolerance)
    ]


def _difference(role: str, got: Any, want: Tensor, tolerance: Tolerance) -> list[str]:
    if not isinstance(got, Tensor):
        return [f"{role}: one tensor was recorded, and {type(got).__name__} was returned"]
    got = got.detach().cpu()
    if got.shape != want.shape:
        return [f"{role}: the shape is {tuple(got.shape)}, and {tuple(want.shape)} was recorded"]
    if not got.is_floating_point() and not want.is_floating_point() and not tolerance.rtol and not tolerance.atol:
        off = got.to(torch.int64) != want.to(torch.int64)  # float64 holds no more than 53 bits of a whole number
        error = (got.to(torch.int64) - want.to(torch.int64)).abs()
    else:
        wide = torch.complex128 if got.is_complex() or want.is_complex() else torch.float64
        got, want = got.to(wide), want.to(wide)
        off = ~torch.isclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)
        error = (got - want).abs().nan_to_num(torch.inf)
    if not off.any():
        return []
    at = int(torch.where(off, error, -1).flatten().argmax())
    index = tuple(int(i) for i in np.unravel_index(at, tuple(want.shape)))
    return [
        f"{role}: {int(off.sum())} of {off.numel()} values are off; at {index} {got.flatten()[at].item()!r} for "
        f"{want.flatten()[at].item()!r}, with rtol {tolerance.rtol} and atol {tolerance.atol}"
    ]


def _check_file(path: Path, about: Any, stored: Mapping[str, np.ndarray]) -> None:
    def refuse(what: str) -> None:
        raise BadInput(f"{path}: {what}")

    if not isinstance(about, dict):
        raise BadInput(f"{path}: holds a {type(about).__name__} where an object is needed")
    _check_keys(f"{path}", about, _REQUIRED, _OPTIONAL)
    if about["official"] not in _OFFICIAL:
        refuse(f"official is {about['official']!r}; it is one of {', '.join(_OFFICIAL)}")
    if not about["ids"] or not all(isinstance(i, str) for i in about["ids"]):
        refuse("ids must name the methods that the vectors are for")
    if not isinstance(about["cases"], list) or not about["cases"]:
        refuse("there are no cases")
    _check_tolerance(path, about["tolerance"])
    used: set[str] = set()
    for case in about["cases"]:
        where = f"{path}, case {case.get('name', '?') if isinstance(case, dict) else '?'}"
        _check_keys(where, case, _CASE, set())
        for role, names in case["arrays"].items():
            if not isinstance(names, (str, list)):
                raise BadInput(f"{where}: the role {role!r} names a {type(names).__name__}, not an array or a list")
            for name in [names] if isinstance(names, str) else names:
                if name not in stored:
                    raise BadInput(f"{where}: the array {name!r} of the role {role!r} is not in {path.stem}.npz")
                used.add(name)
    names = [case["name"] for case in about["cases"]]
    _once(path, "cases", names)
    roles = {role for case in about["cases"] for role in case["arrays"]}
    _known(path, "informational", about.get("informational", ()), roles, "role of any case")
    _known(path, "unused", about.get("unused", ()), stored, f"array of {path.stem}.npz")
    patterns = "except_match" in about["tolerance"]
    for pattern in about["tolerance"].get("except", {}):
        if pattern not in roles and not (patterns and fnmatch.filter(roles, pattern)):
            refuse(f"the tolerance of {pattern!r} is for no role of any case")
    left = sorted(set(stored) - used - set(about.get("unused", ())))
    if left:
        refuse(f"the array {left[0]!r} plays no role in any case: give it one, or list it with the reason under unused")


def _check_tolerance(path: Path, tolerance: Any) -> None:
    where = f"{path}, tolerance"
    _check_keys(where, tolerance, {"rtol", "atol", "dtype"}, {"note", "except", "except_match"})
    if tolerance.get("except_match", "fnmatch on the role") != "fnmatch on the role":
        raise BadInput(f"{where}: except_match is {tolerance['except_match']!r}; 'fnmatch on the role' is known")
    for role, special in tolerance.get("except", {}).items():
        _check_keys(f"{where} of {role!r}", special, set(), _TOLERANCE)
    for limits in (tolerance, *tolerance.get("except", {}).values()):
        for name in ("rtol", "atol"):
            value = limits.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise BadInput(f"{where}: {name} is {value!r}, not a number of at least 0")


def _check_keys(where: str, given: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(given, dict):
        raise BadInput(f"{where}: holds a {type(given).__name__} where an object is needed")
    for key in sorted(required - set(given)):
        raise BadInput(f"{where}: {key!r} is missing")
    for key in sorted(set(given) - required - optional):
        raise BadInput(f"{where}: the key {key!r} is not known; known are {', '.join(sorted(required | optional))}")


def _once(path: Path, what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{path}: two {what} are called {name!r}")


def _known(path: Path, key: str, given: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise BadInput(f"{path}: {key} lists {name!r}, which is no {what}")
