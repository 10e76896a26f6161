"""The works: what `laconic bench` measures by name, and what ours aim at in each.

Names of groups (`gemv`, `batch`, `gemm`, `minilm`, `load`, `llama`) stand for all works whose name begins so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from laconic.errors import BadInput

from .machine import INT8, READ
from .problems import Encoder, LanguageModel, Load, Problem, Product

__all__ = ["Aim", "Work", "find", "works"]

FLOAT = "torch float32"
READING = "reading the file"


@dataclass(frozen=True)
class Aim:
    """What the fastest of ours should reach: of those that reach the work's aim for the cosine, where it has one.

    Attributes:
        what: "times" (as fast as a rival), "read" or "int8" (a share of what the machine can do), "cosine".
        least: the figure to reach.
        rivals: beginnings of contestants' names; the fastest of them counts.
    """

    what: str
    least: float
    rivals: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """As a person says it."""
        if self.what == "times":
            return f"{self.least:.3g} times as fast as {' and '.join(self.rivals)}"
        if self.what == "cosine":
            return f"cosine to float of {self.least}"
        return f"{self.least:.0%} of the machine's {'read bandwidth' if self.what == READ else 'int8 peak'}"


@dataclass(frozen=True)
class Work:
    """Something to measure.

    Attributes:
        name: on the command line.
        text: what it is, in a line.
        problem: makes the problem.
        aims: of ours.
        baseline: the contestant that all ratios are against.
    """

    name: str
    text: str
    problem: Callable[[], Problem]
    aims: tuple[Aim, ...] = ()
    baseline: str = FLOAT


def works() -> list[Work]:
    """All of them."""
    return [*_vectors(), *_products(), *_encoders(), *_loading(), *_language_models()]


def find(names: Sequence[str]) -> list[Work]:
    """The works of these names and beginnings of names, each once; all without a name.

    Raises:
        BadInput: nothing is called so.
    """
    known = works()
    found = []
    for name in names:
        some = [work for work in known if work.name == name] or [work for work in known if work.name.startswith(name)]
        if not some:
            groups = ", ".join(dict.fromkeys(work.name.partition("-")[0] for work in known))
            raise BadInput(f"no work is called {name!r}; the groups are {groups}, and `laconic bench --list` shows all")
        found += some
    return list(dict.fromkeys(found)) if names else known


def _vectors() -> Iterator[Work]:
    """One row, as when one token is decoded: memory bounds it."""
    kinds: list[tuple[str, int | None, tuple[Aim, ...]]] = [
        ("int4", 32, (Aim(READ, 0.8), Aim("times", 8, (FLOAT,)), Aim("times", 1.5, ("llama.cpp Q4_0",)))),
        ("int4", 128, (Aim(READ, 0.8), Aim("times", 8, (FLOAT,)), Aim("times", 1.5, ("llama.cpp Q4_0",)))),
        ("ternary", 128, (Aim(READ, 0.6), Aim("times", 1.5, ("llama.cpp TQ2_0",)))),
        ("binary", 128, (Aim(READ, 0.6), Aim("times", 1.5, ("llama.cpp TQ2_0",)))),
        ("int8", None, ()),
        ("int3", 128, ()),
        ("int2", 128, ()),
    ]
    for weights, group, aims in kinds:
        for k, n in ((4096, 4096), (4096, 11008)):
            if aims or n == k:
                yield _product("gemv", 1, k, n, weights, group, None, aims)


def _products() -> Iterator[Work]:
    for rows in (8, 32):
        yield _product("batch", rows, 4096, 4096, "int4", 128, None, ())
    yield _product(
        "gemm", 512, 4096, 4096, "int8", None, 8,
        (Aim(INT8, 0.6), Aim("times", 1, ("torch int8", "torch qint8"))),
    )  # fmt: skip
    yield _product("gemm", 1024, 4096, 4096, "binary", None, 1, (Aim("times", 8, (FLOAT,)),))


def _product(
    group_name: str, m: int, k: int, n: int, weights: str, group: int | None, activations: int | None,
    aims: tuple[Aim, ...],
) -> Work:  # fmt: skip
    shape = f"{k}x{n}" if m == 1 else f"{m}x{k}x{n}"
    name = f"{group_name}-{shape}-{weights}" + (f"-g{group}" if group else "")
    shared = f"groups of {group}" if group else "a scale for each row"
    inputs = "float inputs" if activations is None else f"inputs of {activations} bit" + "s" * (activations > 1)
    text = f"{m} row{'s' * (m > 1)} times a {k}x{n} matrix, {weights} weights, {shared}, {inputs}"
    return Work(name, text, partial(Product, m, k, n, weights, group, activations), aims)


def _encoders() -> Iterator[Work]:
    rivals = ("onnxruntime int8", "openvino int8")
    for batch, tokens, share, cosine in ((1, 32, 0.8, 0.998), (32, 128, 0.7, 0.995)):
        yield Work(
            f"minilm-{batch}x{tokens}",
            f"MiniLM-L6 embeds {batch} text{'s' * (batch > 1)} of {tokens} tokens",
            partial(Encoder, batch, tokens),
            (Aim("times", 1 / share, rivals), Aim("cosine", cosine)),
        )


def _loading() -> Iterator[Work]:
    yield Work(
        "load-minilm", "an int8 artifact of MiniLM is loaded and embeds a text of 32 tokens", partial(Load, 1, 32),
        (Aim("times", 1 / 1.5, (READING,)),), READING,
    )  # fmt: skip


def _language_models() -> Iterator[Work]:
    model = "a Llama of 411 M parameters (8 layers, width 2048)"
    four, three = ("llama.cpp Q4_0",), ("llama.cpp TQ2_0",)
    yield Work(
        "llama-decode-int4", f"{model} decodes a token, 4-bit weights", partial(LanguageModel, 1, 16),
        (Aim("times", 1.5, four),),
    )  # fmt: skip
    yield Work(
        "llama-decode-ternary", f"{model} decodes a token, ternary weights",
        partial(LanguageModel, 1, 16, "ternary", 128), (Aim("times", 1.5, three),),
    )  # fmt: skip
    yield Work(
        "llama-prefill-int4", f"{model} reads 128 tokens, 4-bit weights", partial(LanguageModel, 128, 0),
        (Aim("times", 3, four),),
    )  # fmt: skip
