"""`codebook_features`: hidden states as the mean of a few codes out of a learned table, so that they can be read.

For the inputs x (..., d) of a layer, u = LayerNorm(x) with gain and shift of its own, codes c_i (n, d), s_i their likeness:

    s_i = <u, c_i> / |c_i|  ("inner")      s_i = -|u - c_i|  ("euclidean")      I = the k codes of largest s_i
    y = 1 / k sum_(i in I) c_i              takes the place of x

With g = dL/dy, T inputs and e = 1/T sum |y - u|^2, gradients are

    loss          codes                          u
    base          g through y                    g
    aeloss        g through y, and de/dc         g
    vqvae         de/dc                          g + 2 beta (u - y)
    fullaeloss    g through y, and de/dc         g + 2 beta (u - y)

With groups each d / groups features have a layer norm and a table of their own: one for each head, before the projection
of an attention.

Source: "Codebook Features: Sparse and Discrete Interpretability for Neural Networks", Tamkin, Taufeeque, Goodman, 2023,
arXiv 2310.17230. Official code: taufeeque9/codebook-features, MIT. The mean over the k codes is that of the code, where
the paper has a sum; that the commitment term of u is not divided by T, where that of the codes is, is theirs, too.

Codes stand for something: `recorded_codes` says which were taken, `forced_code` puts one in, and `disabled` takes codes
out. Use it to find out what a network does; as compression k log2(n) bits carry a hidden state, and the table is large.

Example:
    >>> import torch
    >>> layer = CodebookLayer(8, num_codes=16, k=2)
    >>> x = torch.randn(4, 8)
    >>> with layer.forced_code(3):
    ...     bool((layer(x) == layer.codes[0, 3]).all())
    True
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from laconic.core.card import Card
from laconic.core.modes import evaluating
from laconic.errors import BadInput

SIMILARITIES = ("inner", "euclidean")
LOSSES = ("base", "aeloss", "vqvae", "fullaeloss")
CHUNK = 1 << 22  # likenesses at once: bounds the memory that T x n of them take


# --- mathematics ------------------------------------------------------------------------------------


def nearest_codes(
    u: Tensor, codes: Tensor, k: int = 1, similarity: str = "inner", allowed: Tensor | None = None
) -> Tensor:
    """The k codes most like each of u (T, d), int64 (T, k), the best first.

    Args:
        u: (T, d).
        codes: c (n, d).
        k: how many.
        similarity: one of `SIMILARITIES`.
        allowed: (n,) bool, False for codes that are not to be taken; k at least are True.

    Raises:
        ValueError: another similarity, or fewer codes than k.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity is {similarity!r}: it must be one of {', '.join(SIMILARITIES)}")
    if not 1 <= k <= len(codes):
        raise ValueError(f"k={k} codes are wanted, and there are {len(codes)}")
    u, codes = u.detach(), codes.detach()
    if similarity == "inner":
        codes = codes / codes.norm(dim=1, keepdim=True).clamp(min=torch.finfo(codes.dtype).tiny)
    found = []
    for part in u.split(max(1, CHUNK // len(codes))):
        like = part @ codes.t() if similarity == "inner" else -torch.cdist(part, codes)
        if allowed is not None:
            like = like.masked_fill(~allowed, -math.inf)
        found.append(like.topk(k, dim=1).indices)
    return torch.cat(found) if found else torch.empty((0, k), dtype=torch.int64, device=u.device)


class _Snap(torch.autograd.Function):
    """y of u (T, d), codes (n, d) and indices (T, k)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, codes: Tensor, ids: Tensor, loss: str, beta: float) -> Tensor:
        y = codes[ids].mean(1)
        ctx.save_for_backward(u, y, ids)
        ctx.loss, ctx.beta, ctx.count = loss, beta, len(codes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        u, y, ids = ctx.saved_tensors
        to_u = gradient + 2 * ctx.beta * (u - y) if ctx.loss in ("vqvae", "fullaeloss") else gradient
        to_y = torch.zeros_like(gradient) if ctx.loss == "vqvae" else gradient
        if ctx.loss != "base" and len(u):
            to_y = to_y + 2 / len(u) * (y - u)
        each = (to_y / ids.shape[1]).repeat_interleave(ids.shape[1], dim=0)
        to_codes = torch.zeros(ctx.count, u.shape[1], dtype=gradient.dtype, device=gradient.device)
        return to_u, to_codes.index_add_(0, ids.reshape(-1), each), None, None, None


def snap(
    x: Tensor, codes: Tensor, k: int = 1, *, similarity: str = "inner", loss: str = "aeloss", beta: float = 0.25,
    allowed: Tensor | None = None, ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y of the shape of x (..., d), and the codes (..., k) that it is the mean of.

    Args:
        x: what is looked up as it is, without a layer norm.
        codes: c (n, d).
        k, similarity, allowed: see `nearest_codes`.
        loss: one of `LOSSES`.
        beta: of "vqvae" and "fullaeloss".
        ids: take these codes (..., k) instead.

    Raises:
        ValueError: another similarity or loss, or fewer codes than k.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: it must be one of {', '.join(LOSSES)}")
    flat = x.reshape(-1, x.shape[-1])
    chosen = nearest_codes(flat, codes, k, similarity, allowed) if ids is None else ids.reshape(len(flat), -1)
    y = _Snap.apply(flat, codes, chosen, loss, beta)
    return y.view(x.shape), chosen.view(*x.shape[:-1], -1)


# --- the layer --------------------------------------------------------------------------------------


class CodebookLayer(nn.Module):
    """A bottleneck of codes: (..., dim) -> the same.

    Args:
        dim: features.
        num_codes: n, of each group.
        k: codes to a state.
        similarity: one of `SIMILARITIES`.
        loss: one of `LOSSES`.
        beta: of two of those.
        groups: into how many parts of equal size the features are cut, each with a table of its own.
        eps: of the layer norms.
        device, dtype: of the parameters.

    Raises:
        ValueError: groups that do not divide the features, fewer codes than k, another similarity or loss; in the call,
            an input of another shape.
    """

    allowed: Tensor
    steps_used: Tensor

    def __init__(
        self, dim: int, num_codes: int = 10000, k: int = 8, similarity: str = "inner", loss: str = "aeloss",
        groups: int = 1, *, beta: float = 0.25, eps: float = 1e-5, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"codebook_features: {dim} features are not cut into {groups} equal parts")
        if not 1 <= k <= num_codes:
            raise ValueError(f"codebook_features: k={k} codes out of {num_codes} are wanted")
        if similarity not in SIMILARITIES or loss not in LOSSES:
            raise ValueError(
                f"codebook_features: similarity={similarity!r}, loss={loss!r}: one of {', '.join(SIMILARITIES)}, and of "
                f"{', '.join(LOSSES)}"
            )
        self.dim, self.num_codes, self.k, self.groups = dim, num_codes, k, groups
        self.similarity, self.loss, self.beta, self.eps = similarity, loss, beta, eps
        part = dim // groups
        self.weight = nn.Parameter(torch.ones(groups, part, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(groups, part, device=device, dtype=dtype))
        self.codes = nn.Parameter(torch.randn(groups, num_codes, part, device=device, dtype=dtype))
        self.register_buffer("allowed", torch.ones(groups, num_codes, dtype=torch.bool, device=device))
        self.register_buffer("steps_used", torch.zeros(groups, num_codes, dtype=torch.int64, device=device))
        self._forced: dict[int, tuple[int, Tensor | None]] = {}
        self._listeners: list[Callable[[Tensor], None]] = []

    def normalized(self, x: Tensor) -> Tensor:
        """u (..., groups, dim / groups)."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"codebook_features: inputs have {self.dim} features, found {tuple(x.shape)}")
        parts = x.unflatten(-1, (self.groups, -1))
        u = F.layer_norm(
            parts.float() if x.dtype in (torch.float16, torch.bfloat16) else parts, parts.shape[-1:], eps=self.eps
        )
        return u * self.weight.to(u.dtype) + self.bias.to(u.dtype)

    def forward(self, x: Tensor) -> Tensor:
        u = self.normalized(x)
        found, ids = [], []
        for group in range(self.groups):
            part, codes = u[..., group, :], self.codes[group].to(u.dtype)
            chosen = self._chosen(group, part, codes)
            y, chosen = snap(part, codes, self.k, loss=self.loss, beta=self.beta, ids=chosen)
            found.append(y)
            ids.append(chosen)
        taken = torch.stack(ids, -2)
        if self.training:
            self._count(taken.detach())
        for listener in self._listeners:
            listener(taken)
        return torch.cat(found, -1).to(x.dtype)

    def _chosen(self, group: int, part: Tensor, codes: Tensor) -> Tensor:
        flat = part.reshape(-1, part.shape[-1])
        ids = nearest_codes(flat, codes, self.k, self.similarity, self.allowed[group])
        if group in self._forced:
            code, where = self._forced[group]
            forced = torch.full_like(ids, code)
            ids = forced if where is None else torch.where(where.expand(part.shape[:-1]).reshape(-1, 1), forced, ids)
        return ids

    @torch.no_grad()
    def _count(self, taken: Tensor) -> None:
        for group in range(self.groups):
            self.steps_used[group, taken[..., group, :].reshape(-1).unique()] += 1

    # --- reading and writing codes

    @contextmanager
    def forced_code(self, code: int, group: int = 0, where: Tensor | None = None) -> Iterator[None]:
        """Inside, a code takes the place of all that would be chosen.

        Args:
            code: its index.
            group: of which table.
            where: bool, broadcasts against the shape of the input without its last dimension; everywhere by default.

        Raises:
            BadInput: there is no such code.
        """
        self._check(code, group)
        before = dict(self._forced)
        self._forced[group] = code, where
        try:
            yield
        finally:
            self._forced = before

    @contextmanager
    def disabled(self, codes: Sequence[int], group: int = 0) -> Iterator[None]:
        """Inside, these codes are never chosen.

        Raises:
            BadInput: there is no such code, or fewer than k would be left.
        """
        for code in codes:
            self._check(code, group)
        before = self.allowed.clone()
        left = int(before[group].sum() - before[group, list(codes)].sum())
        if left < self.k:
            raise BadInput(f"k={self.k} codes are wanted, and {left} would be left of table {group}")
        self.allowed[group, list(codes)] = False
        try:
            yield
        finally:
            self.allowed.copy_(before)

    def _check(self, code: int, group: int) -> None:
        if not (0 <= group < self.groups and 0 <= code < self.num_codes):
            raise BadInput(f"there is no code {code} of table {group}: {self.groups} tables of {self.num_codes} codes")

    @torch.no_grad()
    def start_from_(self, x: Tensor, steps: int = 10, seed: int = 0) -> None:
        """Set the codes to the means of k-means clusters of what these inputs are normalized to.

        Raises:
            BadInput: there are fewer inputs than codes.
        """
        u = self.normalized(x).reshape(-1, self.groups, self.dim // self.groups)
        if len(u) < self.num_codes:
            raise BadInput(f"{self.num_codes} codes cannot start from {len(u)} inputs")
        generator = torch.Generator().manual_seed(seed)
        for group in range(self.groups):
            part = u[:, group]
            centres = part[torch.randperm(len(part), generator=generator)[: self.num_codes].to(part.device)].clone()
            for _ in range(steps):
                ids = nearest_codes(part, centres, 1, "euclidean")[:, 0]
                sums = torch.zeros_like(centres).index_add_(0, ids, part)
                counts = torch.bincount(ids, minlength=self.num_codes)[:, None]
                centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
            self.codes[group].copy_(centres)

    @torch.no_grad()
    def replace_dead_(self, x: Tensor, seed: int = 0) -> int:
        """Set codes that no training step took since the last call to random ones of these inputs; returns how many."""
        u = self.normalized(x).reshape(-1, self.groups, self.dim // self.groups)
        generator, replaced = torch.Generator().manual_seed(seed), 0
        for group in range(self.groups):
            dead = (self.steps_used[group] == 0).nonzero()[:, 0]
            drawn = torch.randint(len(u), (len(dead),), generator=generator).to(u.device)
            self.codes[group, dead] = u[drawn, group].to(self.codes.dtype)
            replaced += len(dead)
        self.steps_used.zero_()
        return replaced

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_codes={self.num_codes}, k={self.k}, similarity={self.similarity!r}, loss={self.loss!r}, "
            f"groups={self.groups}"
        )


# --- in a model -------------------------------------------------------------------------------------

NAME = "codebook"  # of the submodule


def _after(module: Any, arguments: tuple, output: Any) -> Any:
    """The hook of a module whose output goes through codes; of several outputs the first."""
    layer = getattr(module, NAME)
    return (layer(output[0]), *output[1:]) if isinstance(output, tuple) else layer(output)


def _before(module: Any, arguments: tuple) -> tuple:
    """The pre-hook of a module whose input does."""
    return (getattr(module, NAME)(arguments[0]), *arguments[1:])


def add_codebooks_(
    model: nn.Module, example: tuple[tuple, Mapping[str, Any]], *, after: str | Sequence[str] = (),
    before: str | Sequence[str] = (), groups: int = 1, num_codes: int = 10000, k: int = 8, **options: Any,
) -> dict[str, CodebookLayer]:  # fmt: skip
    """Put a `CodebookLayer` behind some modules and in front of others, in place.

    Args:
        model: any.
        example: (args, kwargs) of one forward call, from which widths are seen.
        after: globs over paths: the output of these goes through codes, as `"*.mlp"`.
        before: the input of these does: the output projection of an attention, as `"*.attn.out"`.
        groups: of those before, one for each head.
        num_codes, k, options: see `CodebookLayer`.

    Returns:
        Path -> layer. They are trained with the model.

    Raises:
        BadInput: a glob matches no module, one module is matched twice, or the groups do not divide the features.
    """
    chosen: dict[str, bool] = {}
    for patterns, in_front in ((after, False), (before, True)):
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hit = [path for path, _ in model.named_modules() if path and fnmatch.fnmatchcase(path, pattern)]
            if not hit:
                raise BadInput(f"no module's path is or matches {pattern!r}")
            for path in hit:
                if chosen.setdefault(path, in_front) != in_front or hasattr(model.get_submodule(path), NAME):
                    raise BadInput(f"{path} is to have two codebooks, and has one place for them")
    seen = _widths(model, example, chosen)
    made = {}
    for path, in_front in chosen.items():
        if path not in seen:
            raise BadInput(f"{path} is not called on the example, or with something else than a tensor of features")
        like = seen[path]
        try:
            made[path] = CodebookLayer(
                like.shape[-1], num_codes, k, groups=groups if in_front else 1, device=like.device, dtype=like.dtype,
                **options,
            )  # fmt: skip
        except ValueError as error:
            raise BadInput(f"{path}: {error}") from error
    for path, layer in made.items():
        module = model.get_submodule(path)
        module.add_module(NAME, layer.train(module.training))
        module.register_forward_pre_hook(_before) if chosen[path] else module.register_forward_hook(_after)
    return made


@torch.no_grad()
def _widths(
    model: nn.Module, example: tuple[tuple, Mapping[str, Any]], chosen: Mapping[str, bool]
) -> dict[str, Tensor]:
    """Path -> what goes through its codebook."""
    seen: dict[str, Tensor] = {}

    def keep(path: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, Tensor) and value.is_floating_point():
            seen[path] = value

    with ExitStack() as stack:
        for path, in_front in chosen.items():
            module = model.get_submodule(path)
            if in_front:
                handle = module.register_forward_pre_hook(lambda m, a, path=path: keep(path, a))
            else:
                handle = module.register_forward_hook(lambda m, a, out, path=path: keep(path, out))
            stack.callback(handle.remove)
        with evaluating(model):
            model(*example[0], **example[1])
    return seen


@contextmanager
def recorded_codes(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, path of each codebook -> the codes (..., groups, k) of every call."""
    found: dict[str, list[Tensor]] = {}
    layers = {path: module for path, module in model.named_modules() if isinstance(module, CodebookLayer)}
    if not layers:
        raise BadInput(f"{type(model).__name__} has no codebook: see add_codebooks_")
    for path, layer in layers.items():
        found[path] = []
        layer._listeners.append(found[path].append)
    try:
        yield found
    finally:
        for path, layer in layers.items():
            layer._listeners = [one for one in layer._listeners if getattr(one, "__self__", None) is not found[path]]


CARD = Card(
    id="codebook_features",
    title="Codebook Features: Sparse and Discrete Interpretability for Neural Networks",
    authors="Tamkin, Taufeeque, Goodman",
    year=2023,
    source="arXiv 2310.17230",
    family="quant",
    summary="Lets hidden states be means of a few codes out of a learned table, which can be read, forced and taken out.",
    objects={"CodebookLayer": "Layer"},
    traits={"CodebookLayer": ("gradient:surrogate", "batch_independent_eval")},
    use="To find out, and to steer, what the hidden states of a network stand for.",
    avoid="To make a network smaller or faster: the tables are large, and looking up costs a product with them.",
    vectors=("codebook",),
    code="github.com/taufeeque9/codebook-features, MIT",
    claim={
        "text": "In a transformer trained on walks through a finite-state machine, forcing the code that belongs to a state "
        "makes the next token one that is possible there, more often than forcing another code that is in use, by more "
        "than 0.3.",
        "metric": "probability",
        "direction": "higher",
        "margin": 0.3,
        "arms": ("random_code", "code_of_state"),
        "seeds": 5,
        "minutes": 2,
        "task": "finite-state machine",
    },
)
