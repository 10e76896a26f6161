"""`compress(..., distribute=N)`: several processes share the layers of one compression, and the bytes are those of one.

What costs time, and who does it:

| work | who |
|---|---|
| deciding (sensitivity, trying plans), measuring, writing, verifying | the first process |
| rounding to nearest | units are dealt out by their size |
| running a block to look at its inputs | every process, on all batches |
| summing X^T X, and solving | each group of units that read the same inputs has one owner |
| running a block to move the activations past it | batches are dealt out |

Every process holds the model and takes the same road through it (`solve`, `walk`). At the end of a stage each finds what the
others solved in the workspace, just as a resumed run finds what an earlier one left, and puts the same values into its model.
A key of a solution says nothing of processes, so a run is resumed with any number of them.

Why the bytes are the same: nothing is ever added up across processes. Of X (tokens, K), the inputs of a group, its owner
sums X^T X (K, K) over all batches in their order, and solves all its rows (R, K) at once. Sensitivity is a float32 sum of squared
gradients over batches, which another order of adding would change, and sending a gradient of every weight for every batch
takes longer than computing it: so the first process does that alone. The bits of long sums and of factorizations depend on the
number of threads, so every process runs with as many as one would, and that number is part of a run's identity; so are
weights, data and options, which are compared before work is shared.

A group of units over inputs of K columns counts K^2 (K + R) (`Shares`). Within a block of a transformer, where the last matrix
is most of the work, more than three or four processes gain little; of rounding without data each takes its share.

Who starts the processes: this module on one machine (`distribute=2`); `torchrun` or whatever sets RANK and WORLD_SIZE, or a
program that has initialized `torch.distributed`; or Ray (`distribute="ray:4"`: tasks, on any machines of its cluster). They
talk over gloo. All that is said goes through one collective, `Team.gather`, in which each says a value or what went wrong: so
an error anywhere ends all, with the same sentence and exit code; and whoever waits there looks after the processes that it
started. Where the processes do not see one folder, solutions are sent as bytes.

Example:
    >>> one = Team()  # a single process: everything is its own
    >>> one.rank, one.size, one.deal([3, 1, 2])
    (0, 1, [0, 0, 0])
    >>> parse_distribute("ray:3")
    Together(size=3, by='ray')
    >>> balanced([5, 3, 3, 2], 2)
    [0, 1, 1, 0]
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from laconic.core.checkpoint import write_whole
from laconic.errors import BadInput, LaconicError
from laconic.kernels import native
from laconic.numerics import Scheme

from . import interrupt
from .measure import machine
from .recipe import Recipe
from .tensorfile import bytes_of
from .workspace import Workspace, digest, failpoint

if TYPE_CHECKING:
    from .run import Run

FOREVER = timedelta(days=30)  # a process may wait for as long as another one works; whether it lives is seen otherwise
ARRIVAL = 600.0  # seconds within which all processes must have come together
FAREWELL = 60.0  # seconds that they may take to end after the last word
GRACE = 2.0  # seconds that what a process said last may take to arrive, or its end to be noticed
LONGEST_NAP = 0.02  # seconds between two looks at whether a message has come
HELP = "say how many processes, as 2, or ray:4 for workers of a Ray cluster"


class Lost(LaconicError):
    """Another process of the run is gone."""


# --- what the user asks for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Together:
    """How many processes take part, and who starts them."""

    size: int
    by: Literal["laconic", "environment", "ray"]


@dataclass(frozen=True)
class Seat:
    """The place of a process that the first one started: what `distribute` is there."""

    rank: int
    size: int
    host: str
    port: int


def parse_distribute(value: Any) -> Together | Seat | None:
    """Who takes part; None: this process alone.

    Raises:
        BadInput: it is no number of processes, or not the number that there are.
    """
    if value is None or isinstance(value, Seat):
        return value
    by, colon, number = str(value).strip().rpartition(":")
    if by != ("ray" if colon else "") or not number.isdecimal() or int(number) < 1:
        raise BadInput(f"distribute is {str(value)!r}: {HELP}")
    size, there = int(number), world_size()
    if there > 1:
        if colon or size != there:
            raise BadInput(
                f"distribute is {str(value)!r}, and this is one of {there} processes that were started together: say {there}, "
                "or start one process alone"
            )
        return Together(size, "environment")
    return Together(size, "ray" if colon else "laconic") if size > 1 else None


def world_size() -> int:
    """How many processes were started together with this one, by `torchrun` or its like."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


# --- who does what -----------------------------------------------------------------------------------------------------


def balanced(costs: Sequence[float], size: int) -> list[int]:
    """A process for each piece of work: the largest first, each to the one that has least so far."""
    load, owner = [0.0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = min(range(size), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner


@dataclass(frozen=True)
class Elsewhere:
    """Stands where statistics would that another process collects."""

    rank: int


@dataclass
class Shares:
    """Which process collects the inputs of which modules, and solves them.

    Modules that read the same tensor have one leader, the first that reads it, and one owner; which they are shows as the
    model runs, alike in every process. A stage whose modules have the names of an earlier one's (the next block) is planned
    as that one came out; else a leader goes to the process that has least so far.

    Args:
        team: of processes.
        shape: module's path -> (K, R), columns and rows of its weights.
        learned: what earlier stages showed: relative path -> relative path of its leader. It is added to.
    """

    team: Team
    shape: Mapping[str, tuple[int, int]]
    learned: dict[str, str]
    owner: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load = [0.0] * self.team.size
        # The stage's own part of the paths: up to the last dot that all of them share.
        common = os.path.commonprefix(list(self.shape)) if len(self.shape) > 1 else ""
        self._prefix = common[: common.rfind(".") + 1]
        leaders = {path: self.learned.get(self._relative(path)) for path in self.shape}
        self._planned: set[str] = set()
        if None in leaders.values():
            return
        costs: dict[str, float] = {}
        for path, leader in leaders.items():
            named = f"{self._prefix}{leader}"
            costs[named] = costs.get(named, 0.0) + self._cost(path, named)
        self.owner.update(zip(costs, self.team.deal(list(costs.values())), strict=True))
        self._planned = set(costs)
        for leader, rank in self.owner.items():
            self._load[rank] += costs[leader]

    def of(self, path: str, leader: str) -> int:
        """The process of a module, which reads what `leader` reads; called when a module is first seen."""
        self.learned[self._relative(path)] = self._relative(leader)
        rank = self.owner.setdefault(leader, min(range(self.team.size), key=self._load.__getitem__))
        if leader not in self._planned:
            self._load[rank] += self._cost(path, leader)
        return rank

    def _relative(self, path: str) -> str:
        return path.removeprefix(self._prefix)

    def _cost(self, path: str, leader: str) -> float:
        k, rows = self.shape[path]
        return float(k * k * (rows + (k if path == leader else 0)))


# --- what they say to each other -----------------------------------------------------------------------------------------


class Team:
    """The processes of a run, as `solve` and `walk` see them; this one is a single process.

    Attributes:
        rank: of this process; 0 is the first one.
        size: how many there are.
    """

    rank, size = 0, 1

    def begin(self) -> None:
        """Start the other processes, if that is for this one to do: from here on it is safe that work will come."""

    def gather(self, value: Any = None) -> list[Any]:
        """What every process says (JSON), by rank. All must call it alike.

        Raises:
            LaconicError: one of them failed; `BadInput` where it said so.
        """
        return [value]

    def agree(self, workspace: Workspace, keys: Iterable[str]) -> set[str]:
        """Which solutions must be made; the others are there for every process."""
        return {key for key in keys if workspace.read(key) is None}

    def share(self, workspace: Workspace, made: Mapping[str, int]) -> None:
        """Wait until every process has made its solutions (key -> rank); they are then there for all."""

    def deal(self, costs: Sequence[float]) -> list[int]:
        """A process for each piece of work."""
        return balanced(costs, self.size)

    def mine(self, count: int) -> range:
        """Which of so many equal pieces of work are this process's."""
        return range(self.rank, count, self.size)

    def exchange(self, tensors: Any) -> None:
        """Complete a sequence of tensors of which each process has set its own (`mine`)."""

    def order(self, run: Run, job: Mapping[str, Any]) -> None:
        """Let the other processes solve with this one what `job` says."""

    def end(self, result: Mapping[str, Any]) -> None:
        """Send the other processes home."""


Parcel = tuple[int, int, Callable[[], Any], Callable[[Tensor], None]]  # sender's rank, bytes, how to read, how to keep


class Several(Team):
    """One of several processes.

    Args:
        rank, size: of this process, and how many there are.
        connect: makes the process group; it may wait for the others.
        workers: those that this process starts, if it does.
        leave: is called when all is done.
    """

    def __init__(
        self, rank: int, size: int, connect: Callable[[Several], Any], workers: Workers | None = None,
        leave: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.rank, self.size, self.workers = rank, size, workers
        self.shared = True  # whether all see one workspace
        self.over = False  # nothing more is said
        self._connect, self._leave, self._group = connect, leave, None

    def begin(self) -> None:
        if self.workers is not None:
            self.workers.start()

    def gather(self, value: Any = None) -> list[Any]:
        return self._gather({"value": value})

    def fail(self, error: Exception) -> None:
        """Tell the others why this process ends."""
        if self.over:
            return
        kind = "BadInput" if isinstance(error, BadInput) else "LaconicError"
        said = str(error) if isinstance(error, LaconicError) else f"{type(error).__name__}: {error}"
        with suppress(LaconicError):
            self._gather({"error": kind, "said": said})

    def agree(self, workspace: Workspace, keys: Iterable[str]) -> set[str]:
        keys = list(keys)
        lacking = self.gather([key for key in keys if workspace.read(key) is None])
        missing = set(lacking[0])  # the first process has what an earlier run left
        if not self.shared:
            sent = {key for one in lacking[1:] for key in one} - missing
            self._send_solutions(workspace, {key: 0 for key in keys if key in sent})
        return missing

    def share(self, workspace: Workspace, made: Mapping[str, int]) -> None:
        self.gather()
        if not self.shared:
            self._send_solutions(workspace, made)
        workspace.fresh.update(key for key, rank in made.items() if rank != self.rank)

    def exchange(self, tensors: Any) -> None:
        held = {i: tensors[i].contiguous() for i in self.mine(len(tensors))}
        said = {i: (str(x.dtype).removeprefix("torch."), list(x.shape)) for i, x in held.items()}
        forms = {int(i): form for one in self.gather(said) for i, form in one.items()}
        parcels = []
        for i, (name, shape) in sorted(forms.items()):
            dtype = getattr(torch, name)
            count = torch.Size(shape).numel() * dtype.itemsize
            keep = lambda x, i=i, dtype=dtype, shape=shape: tensors.__setitem__(i, x.view(dtype).view(shape))  # noqa: E731
            parcels.append((i % self.size, count, lambda i=i: bytes_of(held[i]), keep))
        self._send(parcels)

    def order(self, run: Run, job: Mapping[str, Any]) -> None:
        sign = run.workspace.records / f"together-{secrets.token_hex(8)}"
        sign.touch()
        said = {"job": job, "likeness": likeness(run), "sign": str(sign.absolute())}
        self.gather(said)
        heard = self.gather({"shared": True, "cpu": machine()["cpu"]})
        self.shared = all(one["shared"] for one in heard)
        if self.workers is not None and (sentence := self.workers.crowded()):
            run.note(sentence)
        sign.unlink(missing_ok=True)
        if kinds := {one["cpu"] for one in heard} - {heard[0]["cpu"]}:
            run.note(
                f"processes ran on {', '.join(sorted(kinds))} beside {heard[0]['cpu']}: one process may give other bytes"
            )

    def end(self, result: Mapping[str, Any]) -> None:
        self.gather({"end": result})

    def close(self, ended: bool) -> None:
        """Take leave."""
        self.over = True
        if self.workers is not None:
            self.workers.stop(ended)
        self._group = None
        if ended:
            self._leave()

    def _send_solutions(self, workspace: Workspace, made: Mapping[str, int]) -> None:
        files = {key: workspace.records / f"{key}.safetensors" for key in made}
        mine = {key: files[key].stat().st_size for key, rank in made.items() if rank == self.rank}
        sizes = {key: size for one in self.gather(mine) for key, size in one.items()}
        self._send(
            [
                (rank, sizes[key], files[key].read_bytes, lambda x, key=key: write_whole(files[key], bytes_of(x)))
                for key, rank in made.items()
            ]
        )

    def _send(self, parcels: Iterable[Parcel]) -> None:
        """Send bytes from one to all, parcel by parcel; what fails is raised when all have come, so that none waits."""
        failed: Exception | None = None
        for rank, count, read, keep in parcels:
            data = torch.zeros(count, dtype=torch.uint8)
            try:
                if rank == self.rank:
                    data = torch.frombuffer(bytearray(read()), dtype=torch.uint8) if count else data
            except OSError as error:
                failed = error
            if count:
                self._wait(self._joined().broadcast(data, rank))
            try:
                if rank != self.rank:
                    keep(data)
            except (OSError, BadInput) as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _gather(self, said: Mapping[str, Any]) -> list[Any]:
        if self.rank:
            failpoint("worker")
        data = torch.frombuffer(bytearray(json.dumps(said, default=str).encode()), dtype=torch.uint8)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._all(counts, torch.tensor([len(data)]))
        parts = [torch.zeros(int(max(counts)), dtype=torch.uint8) for _ in range(self.size)]
        padded = parts[self.rank].clone()
        padded[: len(data)] = data
        self._all(parts, padded)
        found = [json.loads(part[: int(n)].numpy().tobytes()) for part, n in zip(parts, counts, strict=True)]
        for rank, one in enumerate(found):
            if "error" in one:
                self.over = True
                kind = BadInput if one["error"] == "BadInput" else LaconicError
                raise kind(one["said"] if rank == 0 else f"process {rank} of {self.size}: {one['said']}")
        return [one["value"] for one in found]

    def _all(self, parts: list[Tensor], mine: Tensor) -> None:
        self._wait(self._joined().allgather([parts], [mine]))

    def _joined(self) -> Any:
        if self._group is None:
            self._group = self._connect(self)
        return self._group

    def _wait(self, work: Any) -> None:
        """Wait for a message while Ctrl-C works and the processes that this one started live.

        Raises:
            Lost: one of them, or the connection to another one, is gone.
        """
        nap = 1e-4
        while not work.is_completed():
            self.look_after(lambda: not work.is_completed())
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)
        try:
            work.wait()
        except RuntimeError as error:
            self.over = True
            end = time.monotonic() + GRACE
            while time.monotonic() < end:
                self.look_after(lambda: True)
                if self.workers is None:
                    break
                time.sleep(LONGEST_NAP)
            raise Lost("the connection to another process of this run is gone: run again with --resume") from error

    def look_after(self, waits: Callable[[], bool]) -> None:
        """Raise Ctrl-C, and say which process has ended while one `waits` for it."""
        interrupt.check()
        fallen = self.workers.fallen() if self.workers is not None else None
        if fallen is None:
            return
        end = time.monotonic() + GRACE
        while waits() and time.monotonic() < end:  # its last word may be on its way
            time.sleep(LONGEST_NAP)
        if waits():
            self.over = True
            raise Lost(f"{fallen}; what is solved is kept: run again with --resume")


# --- who starts them ---------------------------------------------------------------------------------------------------


@contextmanager
def team_of(place: Together | Seat | None, given: Mapping[str, Any]) -> Iterator[Team]:
    """The processes of a run while it lasts.

    Args:
        place: from `parse_distribute`.
        given: arguments of `compress`, for processes that are started here.
    """
    if place is None:
        yield Team()
        return
    team, ended = _team(place, given), False
    try:
        yield team
        ended = True
    except Exception as error:
        if team.workers is None:  # those that this process started are ended with it
            team.fail(error)
        raise
    finally:
        team.close(ended)


def _team(place: Together | Seat, given: Mapping[str, Any]) -> Several:
    if isinstance(place, Seat):
        store = dist.TCPStore(place.host, place.port, place.size, False, FOREVER)
        store.set(f"here/{place.rank}", "")

        def connect(team: Several) -> Any:
            store.set(f"ready/{place.rank}", "")
            return _group(store, place.rank, place.size, place.host)

        return Several(place.rank, place.size, connect)
    if place.by == "environment":
        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(seconds=ARRIVAL))
            group = dist.new_group(backend="gloo", timeout=FOREVER)
        except (RuntimeError, ValueError) as error:
            raise BadInput(
                f"the {place.size} processes that were started together do not find each other: {str(error).splitlines()[0]}"
            ) from error
        rank, leave = dist.get_rank(), lambda: dist.destroy_process_group(group)
        return Several(rank, place.size, lambda team: group, leave=leave)
    kind = RayWorkers if place.by == "ray" else LocalWorkers
    workers = kind(place.size, given)
    return Several(0, place.size, lambda team: workers.meet(team), workers)


def _group(store: Any, rank: int, size: int, host: str) -> Any:
    """A gloo process group of our own: the default one belongs to the program that uses us."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    if host == LOCAL and before is None:  # whatever the machine's name resolves to
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        return dist.ProcessGroupGloo(dist.PrefixStore("laconic", store), rank, size, FOREVER)
    except RuntimeError as error:
        raise Lost(f"process {rank} of {size} finds no other: {str(error).splitlines()[0]}") from error
    finally:
        if before is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)


LOCAL = "127.0.0.1"


class Workers(Protocol):
    """Processes that the first one starts."""

    def start(self) -> None:
        """Start them."""
        ...

    def meet(self, team: Several) -> Any:
        """The process group, when all have come."""
        ...

    def fallen(self) -> str | None:
        """A sentence on one that has ended, if one has."""
        ...

    def crowded(self) -> str:
        """A sentence where they have too few cores, else nothing."""
        ...

    def stop(self, ended: bool) -> None:
        """See them off: to their own end where the run `ended` well, at once otherwise."""
        ...


class Started:
    """What the two kinds of workers have in common: the place where all meet, which is the first process's."""

    def __init__(self, size: int, given: Mapping[str, Any]):
        self.size, self.given = size, dict(given)
        self.store: Any = None
        self.host = LOCAL

    def start(self) -> None:
        """Start them, once."""
        if self.store is not None:
            return
        listener = socket.create_server((self.host, 0))
        port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            self.host, port, self.size, True, FOREVER, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.given["threads"] = torch.get_num_threads()
        self.launch([Seat(rank, self.size, self.host, port) for rank in range(1, self.size)])

    def launch(self, seats: list[Seat]) -> None:
        """Start a process for each seat."""
        raise NotImplementedError

    def crowded(self) -> str:
        """A sentence where they have too few cores, else nothing."""
        return ""

    def meet(self, team: Several) -> Any:
        """The process group, when all have come.

        Raises:
            LaconicError: one ended before, or does not come.
        """
        self.start()
        begin = time.monotonic()
        for sign in ("here", "ready"):  # they read the model between the two, which may take long
            names = [f"{sign}/{rank}" for rank in range(1, self.size)]
            while not self.store.check(names):
                team.look_after(lambda names=names: not self.store.check(names))
                if sign == "here" and time.monotonic() > begin + ARRIVAL:
                    raise LaconicError(
                        f"not all of the {self.size} processes came within {ARRIVAL:.0f} seconds: ask for fewer"
                    )
                time.sleep(LONGEST_NAP)
        return _group(self.store, 0, self.size, self.host)


class LocalWorkers(Started):
    """Processes on this machine."""

    def __init__(self, size: int, given: Mapping[str, Any]):
        super().__init__(size, given)
        self.processes: list[Any] = []

    def launch(self, seats: list[Seat]) -> None:
        """Start a process for each seat, which imports the program's main module again as `multiprocessing` does.

        Raises:
            BadInput: what was given cannot be sent to them.
        """
        context = get_context("spawn")
        for seat in seats:
            process = context.Process(target=work, args=(seat, self.given), daemon=True, name=f"laconic-{seat.rank}")
            try:
                process.start()
            except Exception as error:  # noqa: BLE001 - the user's own objects may raise anything as they are pickled
                raise BadInput(
                    f"what was given cannot be sent to another process ({str(error).splitlines()[0]}): name the model by a folder "
                    "or module:function, and the data by a file, or leave distribute out"
                ) from error
            self.processes.append(process)

    def crowded(self) -> str:
        """A sentence where they have too few cores, else nothing."""
        cores, threads = os.cpu_count() or 1, torch.get_num_threads()
        if threads == 1 or self.size * threads <= cores:
            return ""
        return (
            f"{self.size} processes of {threads} threads each shared {cores} cores: --threads {max(1, cores // self.size)} is "
            "faster (the number of threads may change the bytes)"
        )

    def fallen(self) -> str | None:
        """A sentence on one that has ended, if one has."""
        for rank, process in enumerate(self.processes, 1):
            if process.exitcode is not None:
                return f"process {rank} of {self.size} {_ending(process.exitcode)}"
        return None

    def stop(self, ended: bool) -> None:
        """See them off."""
        for process in self.processes:
            if ended:
                process.join(FAREWELL)
            process.terminate()
        for process in self.processes:
            process.join(GRACE)
            process.kill()
            process.join()


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return (
        f"ended with exit code {code} (what it printed says why; a script that starts processes needs its work under "
        "`if __name__ == '__main__':`)"
    )


class RayWorkers(Started):
    """Tasks of a Ray cluster: the one that RAY_ADDRESS or `ray.init` names, else one made on this machine.

    Raises:
        BadInput: Ray is not installed.
    """

    def __init__(self, size: int, given: Mapping[str, Any]):
        super().__init__(size, given)
        try:
            import ray
        except ImportError as error:
            raise BadInput(
                "distribute=ray:N needs Ray, which is not installed: pip install 'laconic[ray]', or say a number of processes"
            ) from error
        self.ray, self.tasks = ray, []
        self.begun = not ray.is_initialized()
        if self.begun:
            ray.init(log_to_driver=False, include_dashboard=False)
        self.host = ray.util.get_node_ip_address()
        for name in ("model", "data", "recipe"):  # tasks run in a folder of their own
            value = self.given.get(name)
            if isinstance(value, (str, os.PathLike)) and Path(value).exists():
                self.given[name] = os.path.abspath(value)

    def launch(self, seats: list[Seat]) -> None:
        """Start a task for each seat, on different machines as far as there are any."""
        options = {
            "num_cpus": min(self.given["threads"], os.cpu_count() or 1),
            "max_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        task = self.ray.remote(work).options(**options)
        self.tasks = [task.remote(seat, self.given) for seat in seats]

    def fallen(self) -> str | None:
        """A sentence on one that has ended, if one has."""
        done, _ = self.ray.wait(self.tasks, num_returns=1, timeout=0) if self.tasks else ([], [])
        for one in done:
            rank = self.tasks.index(one) + 1
            try:
                self.ray.get(one)
            except Exception as error:  # noqa: BLE001 - Ray wraps whatever its task raised
                return f"process {rank} of {self.size} ended: {str(error).strip().splitlines()[-1]}"
            return f"process {rank} of {self.size} has ended"
        return None

    def stop(self, ended: bool) -> None:
        """See them off."""
        if self.tasks and ended:
            self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=FAREWELL)
        for one in self.tasks:
            self.ray.cancel(one, force=True)
        if self.begun:
            self.ray.shutdown()


# --- what the others do ------------------------------------------------------------------------------------------------


def work(seat: Seat, given: Mapping[str, Any]) -> None:
    """The life of a process that the first one started; whatever goes wrong, the first one says it."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    from .compress import compress

    try:
        compress(**given, distribute=seat)
    except LaconicError:
        pass
    except Exception:  # noqa: BLE001 - it has been told to the first process; here is where it happened
        traceback.print_exc()


class Following(Workspace):
    """The workspace as a process sees it that is not the first: it makes and removes nothing but its own."""

    def __init__(self, out: str | os.PathLike[str], rank: int):
        self._place(out)
        self.rank, self._own = rank, self.partial / f"activations-{rank}"
        self.activations = self._own

    def open(self, need: int = 0) -> None:
        """Nothing: the first process makes the folder."""

    def abandon(self) -> None:
        """Nothing: the first process removes it."""

    def settle(self, records: Path, shared: bool) -> None:
        """Work in the first process's folder if all see it, else in one for the time being."""
        if shared:
            self.records, self._own = records, records.with_name(f"activations-{self.rank}")
            self.activations = self._own
        elif self.records.parent != self._own:
            self._own = Path(tempfile.mkdtemp(prefix="laconic-"))
            self.records, self.activations = self._own / "records", self._own / "activations"
            self.records.mkdir()

    def leave(self) -> None:
        """Remove what is this process's own."""
        shutil.rmtree(self._own, ignore_errors=True)


def likeness(run: Run) -> dict[str, str]:
    """What must be alike in all processes."""
    return {
        "the version of torch": torch.__version__,
        "the number of threads (--threads, OMP_NUM_THREADS)": str(torch.get_num_threads()),
        "whether native kernels are there": str(native.load() is not None),
        "whether the model fits under --max-ram": str(not run.ground.streamed),
        "the weights": digest(run.digests),
        "the options or the data": run.identity,
    }


def follow(run: Run) -> dict[str, Any]:
    """Solve what the first process orders, until it is done; gives what it ended with.

    Raises:
        BadInput: this process does not see the same model or data, or runs otherwise.
    """
    workspace, team = run.workspace, run.team
    assert isinstance(workspace, Following) and isinstance(team, Several)
    solved = False
    try:
        while True:
            said = team.gather()[0]
            if "end" in said:
                return said["end"]
            job = said["job"]
            recipe = Recipe.model_validate(job["recipe"])
            if solved:
                run.restore(recipe)
            run.take(recipe)
            mine = likeness(run)
            if differs := [name for name, value in said["likeness"].items() if mine[name] != value]:
                raise BadInput(f"{differs[0]} differs from that of the first process ({_both(said, mine, differs[0])})")
            sign = Path(said["sign"])
            heard = team.gather({"shared": sign.exists(), "cpu": machine()["cpu"]})
            team.shared = all(one["shared"] for one in heard)
            workspace.settle(sign.parent, team.shared)
            for unit in run.ground.units:
                unit.inputs = job["inputs"].get(unit.name, "")
            decision = {name: Scheme.parse(text) if text else None for name, text in job["decision"].items()}
            run.solve_share(decision, job["method"])
            solved = True
    finally:
        workspace.leave()


def _both(said: Mapping[str, Any], mine: Mapping[str, str], name: str) -> str:
    theirs, own = said["likeness"][name], mine[name]
    return f"{own[:12]} here, {theirs[:12]} there"
