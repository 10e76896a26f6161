"""`gptq`: rounds columns one by one, and lets the columns not yet rounded absorb each one's error.

For a linear layer with weight W (rows, K) and inputs X (tokens, K), rounding to the nearest code minimizes
||W - W^||^2, but what matters is the output:

    ||X W^T - X W^^T||^2 = tr(D H D^T),    D = W - W^,    H = X^T X    (K, K)

GPTQ goes through the columns in order. With H^-1 = U^T U (U upper triangular) and Q rounding to a code:

    e_j = (w_j - Q(w_j)) / U_jj        W[:, j+1:] -= e_j U[j, j+1:]        (w_j: column j as corrected so far)

which is exactly the least-squares optimal correction of the remaining columns at every step, without ever
inverting again. Half the objective with the damped H is then sum e_j^2 / 2, the `loss` returned.

- *Damping*: H + damp mean(diag H) I. Where that is not positive definite in float32, float64 is tried, then
  more damping, always from a clean copy of H; the damping used is reported.
- *Groups*: the scale of a group is chosen when its first column is reached, from the group as corrected so
  far.
- *act_order*: columns in order of falling diag(H), so that the inputs that matter most are rounded first.
  Groups are then runs of that order and need `g_idx`, or with `static_groups` runs of the original order with
  scales chosen beforehand, which files can hold.
- *Dead columns* (H_jj = 0: an input that calibration never saw) do not touch the objective.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", Frantar,
Ashkboos, Hoefler, Alistarh, 2022, arXiv 2210.17323. Official code: IST-DASLab/gptq, Apache-2.0. We differ
from it:
- dead columns are rounded to nearest; official sets them to zero, which is free on calibration data and ruins
  a model on inputs that calibration missed (an expert that was never routed to would be all zeros):
  `dead="zero"`;
- the scale of a group that starts inside a block sees the corrections of that block:
  `stale_group_scales=True`;
- scales are rounded to their storage type, and zero points to integers, before any code is computed;
- symmetric scales of rows without negative weights hold their range (official clips its upper half): pass another
  rule as `choose`;
- U comes from one Cholesky factor of H with its axes reversed, and its inverse, instead of two factors and an
  inverse;
- the correction inside a block is applied when a column is reached, in one product, and not after every
  column.

Nothing is folded at inference. Solve a layer with inputs that come from the already quantized layers before
it. Use `rtn` at 8 bits or without data. Cost: 2/3 K^3 + rows K^2 multiplications; layers that share inputs
(q, k, v) share H: stack their rows, or give them one `Factor`.

Example:
    >>> from laconic.numerics import Int, Scale
    >>> from laconic.quant import round_to_nearest
    >>> X, W = torch.randn(256, 64) @ torch.randn(64, 64), torch.randn(16, 64)
    >>> H, scheme = X.T @ X, Scheme(Int(3), Scale("channel"))
    >>> solved = gptq_matrix(W, H, scheme, act_order=True)
    >>> nearest = round_to_nearest(W, scheme)
    >>> output_error(W - solved.dequantize(scheme), H) < output_error(W - nearest.dequantize(scheme), H)
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.passes import Context, Decision
from laconic.core.record import Record
from laconic.core.statistics import column_sums
from laconic.nn import matrix_view, pack_tensors
from laconic.numerics import Scheme, affine_params, check_finite

from ._products import fast_products
from ._rtn import Solved
from ._weights import PackWeights, check_integers

# Rows of X taken at a time, and the width of the panels of H's lower triangle.
TOKENS = 8192
PANEL = 256
# Columns between two corrections inside a block: below this width, one product per column costs less.
STRIP = 32
# Elements of unfolded convolution inputs to hold at a time.
UNFOLDED = 1 << 24
# Elements of a matrix to turn into columns at a time.
CHUNK = 1 << 22
# Damping is multiplied by 10 after a failed factorization, up to this.
MAX_DAMP = 1e3

Dead = Literal["round", "zero"]
# How scales and zeros are chosen: as `affine_params(x, scheme, name)`.
Choose = Callable[[Tensor, Scheme, str], tuple[Tensor, Tensor | None]]


# --- the Hessian -------------------------------------------------------------------------------------


class Hessian:
    """Accumulates H = 2/n sum x x^T over calibration inputs, and their mean.

    Args:
        k: length of x.
        groups: of a grouped convolution: one H per group, `matrix` is then (groups, k, k).
        device: where to accumulate.

    Attributes:
        n: sequences seen; positive rescaling of H changes nothing downstream, so the count is a convention
            (official: the length of the first axis of an input of three axes or more, else 1).
        tokens: vectors seen.
    """

    def __init__(self, k: int, groups: int = 1, device: torch.device | str | None = None) -> None:
        self.k = k
        self.groups = groups
        self.n = 0
        self.tokens = 0
        self._sum: Tensor | None = torch.zeros((groups, k, k), device=device)
        self._total = torch.zeros((groups, k), dtype=torch.float64, device=device)

    @classmethod
    def of(cls, module: nn.Module, device: torch.device | str | None = None) -> Hessian:
        """An empty one for a convolution, or for anything with a (rows, K) weight."""
        groups = module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1
        return cls(module.weight[0].numel(), groups, device)

    def add(self, x: Tensor, sequences: int | None = None) -> None:
        """Add inputs.

        Args:
            x: (..., K), or (groups, tokens, K) if there are several groups.
            sequences: what to add to `n`.

        Raises:
            ValueError: the last axis is not K, or the matrix was taken.
        """
        if self._sum is None:
            raise ValueError(f"Hessian({self.k}): its matrix was taken, it holds no more inputs")
        if x.shape[-1] != self.k:
            raise ValueError(f"Hessian({self.k}): inputs of shape {tuple(x.shape)} do not end in {self.k}")
        if self.groups > 1 and (x.ndim != 3 or x.shape[0] != self.groups):
            raise ValueError(f"Hessian: {self.groups} groups take (groups, tokens, K), got {tuple(x.shape)}")
        if sequences is None:
            sequences = x.shape[0] if x.ndim > 2 and self.groups == 1 else 1
        x = x.detach().reshape(self.groups, -1, self.k)
        for g, begin in ((g, b) for g in range(self.groups) for b in range(0, x.shape[1], TOKENS)):
            part = x[g, begin : begin + TOKENS].to(self._sum.device, torch.float32)
            # H is symmetric: panels of the lower triangle save up to half of the products.
            with fast_products():
                for a, b in _blocks_between(0, self.k, PANEL, None):
                    self._sum[g, a:b, :b].addmm_(part[:, a:b].T, part[:, :b])
            self._total[g] += column_sums(part)
        self.n += sequences
        self.tokens += x.shape[1]

    def add_conv(self, x: Tensor, module: nn.Module) -> None:
        """Add the inputs (N, C, ...) of a convolution, a few examples at a time."""
        per_example = max(1, x[:1].numel() * math.prod(module.kernel_size))
        step = max(1, UNFOLDED // per_example)
        for begin in range(0, x.shape[0], step):
            part = x[begin : begin + step]
            self.add(conv_inputs(part, module), sequences=part.shape[0])

    @property
    def matrix(self) -> Tensor:
        """2/n sum x x^T: (K, K), or (groups, K, K). Zeros before any input."""
        if self._sum is None:
            raise ValueError(f"Hessian({self.k}): its matrix was taken")
        return self._finished(self._sum.clone())

    def take(self) -> Tensor:
        """`matrix`, made where the sums stood: no second (K, K) is held, and nothing can be added any more."""
        if self._sum is None:
            raise ValueError(f"Hessian({self.k}): its matrix was taken")
        sums, self._sum = self._sum, None
        return self._finished(sums)

    def _finished(self, sums: Tensor) -> Tensor:
        """Mirror the lower triangle, in place and panel by panel, and scale."""
        for a, b in _blocks_between(0, self.k, PANEL, None):
            square = sums[:, a:b, a:b]
            square.copy_(square.tril() + square.tril(-1).mT)
            sums[:, a:b, b:] = sums[:, b:, a:b].mT
        sums.mul_(2 / max(1, self.n))
        return sums if self.groups > 1 else sums[0]

    @property
    def mean(self) -> Tensor:
        """Mean of x: (K,) or (groups, K) float32. Zeros before any input."""
        mean = (self._total / max(1, self.tokens)).float()
        return mean if self.groups > 1 else mean[0]


def conv_inputs(x: Tensor, module: nn.Module) -> Tensor:
    """The vectors that a convolution multiplies by its weights: y = conv_inputs(x)[g] @
    weight.flatten(1)[rows of g].T.

    Args:
        x: (N, C, ...) input of the module, one to three spatial axes.
        module: nn.Conv1d, Conv2d or Conv3d.

    Returns:
        (groups, N * positions, C / groups * kernel).

    Raises:
        ValueError: `module` is something else, a transposed convolution among others.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError(f"conv_inputs: {type(module).__name__} is not a Conv1d, Conv2d or Conv3d")
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    axes = len(kernel)
    if x.ndim == axes + 1:
        x = x.unsqueeze(0)
    pads: list[int] = []
    for axis in reversed(range(axes)):  # F.pad goes from the last axis to the first
        if module.padding == "same":
            total = dilation[axis] * (kernel[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0, 0] if module.padding == "valid" else [int(module.padding[axis])] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, pads, mode=mode).contiguous()
    n, channels = x.shape[:2]
    steps = x.stride()
    out = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(axes)]
    windows = x.as_strided(
        (module.groups, n, *out, channels // module.groups, *kernel),
        (
            steps[1] * (channels // module.groups),
            steps[0],
            *(steps[2 + i] * stride[i] for i in range(axes)),
            steps[1],
            *(steps[2 + i] * dilation[i] for i in range(axes)),
        ),
    )
    return windows.reshape(module.groups, n * math.prod(out), -1)


# --- the inverse factor ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """U of H^-1 = U^T U, in the order in which columns are rounded.

    Attributes:
        unit: (K, K) U with each row divided by its diagonal element (garbage-free upper triangle, ones on
            it).
        diag: (K,) the diagonal of U.
        dead: (K,) bool, in the original order.
        order: (K,) column rounded at each step, or None: from the first to the last.
        damp: the damping that made H positive definite.
    """

    unit: Tensor
    diag: Tensor
    dead: Tensor
    order: Tensor | None
    damp: float


def inverse_factor(
    H: Tensor, *, damp: float = 0.01, act_order: bool = False, dead: Dead = "round", name: str = "tensor"
) -> Factor:
    """Factor of the damped inverse of H, computed once for all matrices that share it.

    Args:
        H: (K, K) symmetric, positive semidefinite, left as it is.
        damp: added to the diagonal, as a part of its mean.
        act_order: sort columns by falling diagonal.
        dead: "zero" is the official rule, whose unit diagonal of dead columns counts in the mean (see
            `gptq_matrix`).
        name: for messages.

    Raises:
        NotFinite: inf or nan in `H`.
        ValueError: no damping makes H positive definite, so it is not a Hessian.
    """
    check_finite(H, f"Hessian of {name}")
    diagonal = H.diagonal().clone()
    unseen = diagonal == 0
    alive = diagonal[~unseen]
    # With the mean of the others in their place, dead columns change neither damping nor conditioning.
    diagonal[unseen] = 1.0 if dead == "zero" or alive.numel() == 0 else alive.mean()
    order = torch.argsort(diagonal, descending=True) if act_order else None
    mean = float(diagonal.double().mean()) if diagonal.numel() else 1.0
    used = damp
    # With J reversing the axes and J H J = L L^T:  H = (J L J)(J L J)^T, so U = (J L J)^-1 = J L^-1 J.
    backwards = None if order is None else order.flip(0)
    while True:
        for dtype in (torch.float32, torch.float64):
            # K may be large: besides H two (K, K) matrices live at a time, this copy and U.
            turned = H.flip(0, 1) if backwards is None else H.index_select(0, backwards).index_select(1, backwards)
            turned = turned.to(dtype)
            damped = diagonal + used * mean
            turned.diagonal().copy_(damped.flip(0) if backwards is None else damped[backwards])
            failed = torch.empty((), dtype=torch.int32, device=H.device)
            lower = turned.mT  # symmetric, so the same; LAPACK works in place on matrices that lie by columns
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
            if int(failed):
                continue
            _invert_lower_(lower)
            upper = lower.flip(0, 1)
            del turned, lower
            diag = upper.diagonal().clone()
            unit = upper.div_(diag[:, None]).float()
            if bool(torch.isfinite(unit.sum())) and bool((diag > 0).all()):
                return Factor(unit, diag.float(), unseen, order, used)
        used = max(10 * used, 1e-4)
        if used > MAX_DAMP:
            damping = f"even with damping {used / 10:g}"
            raise ValueError(f"{name}: its Hessian is not positive semidefinite, {damping}")


def _invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: a third of the work of solving for I."""
    k = lower.shape[0]
    if k <= 256:
        eye = torch.eye(k, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = k // 2
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower_(first)
    _invert_lower_(last)
    below.copy_(last @ (below @ first).neg_())


# --- the columns -------------------------------------------------------------------------------------


def gptq_matrix(
    W: Tensor,
    H: Tensor | Factor,
    scheme: Scheme,
    *,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    stale_group_scales: bool = False,
    dead: Dead = "round",
    choose: Choose = affine_params,
    generator: torch.Generator | None = None,
    name: str = "tensor",
) -> Solved:
    """Codes, scales and zeros of a matrix by GPTQ.

    Args:
        W: (rows, K) of any floating type, left as it is.
        H: (K, K); or (groups, K, K) of a grouped convolution, whose rows come in as many equal runs; or a
            `Factor`, which then settles `damp` and `act_order`.
        scheme: how to store it. Scales come from its rule, of whole rows before rounding starts, of groups as
            they are reached.
        damp: see `inverse_factor`.
        block: columns between two corrections of everything that follows. A matter of speed alone, except
            with `stale_group_scales`.
        act_order: round columns in order of falling diag(H).
        static_groups: choose the scales of groups beforehand, from W as it is.
        stale_group_scales: as the official code, choose the scale of a group that starts inside a block from
            weights that lack the corrections of that block.
        dead: what becomes of columns whose input was always zero: "round" to nearest, or "zero".
        choose: the rule for scales, where that of the scheme is not what is wanted.
        generator: randomness of stochastic rounding.
        name: the parameter's path, for messages.

    Returns:
        Solved; `loss` is tr(D H D^T) / 2 with the damped H.

    Raises:
        NotFinite: inf or nan in `W` or `H`.
        ScaleOutOfRange: a scale does not fit in the scheme's scale dtype.
        ValueError: shapes that do not belong together.
    """
    rows, k = W.shape
    if isinstance(H, Tensor) and H.ndim == 3 and rows and rows % H.shape[0] == 0:
        options = dict(damp=damp, block=block, act_order=act_order, static_groups=static_groups)
        options |= dict(stale_group_scales=stale_group_scales, dead=dead, choose=choose, generator=generator, name=name)
        return _by_groups(W, H, scheme, options)
    size = H.unit.shape if isinstance(H, Factor) else H.shape
    if size != (k, k):
        raise ValueError(f"{name}: a weight of {k} columns needs a ({k}, {k}) Hessian, got {tuple(size)}")
    factor = H if isinstance(H, Factor) else inverse_factor(H, damp=damp, act_order=act_order, dead=dead, name=name)
    (solved,) = gptq_rows(
        [W], factor, scheme, block=block, static_groups=static_groups, stale_group_scales=stale_group_scales, dead=dead,
        choose=choose, generator=generator, names=[name],
    )  # fmt: skip
    return solved


def gptq_rows(
    matrices: Sequence[Tensor],
    factor: Factor,
    scheme: Scheme,
    *,
    block: int = 128,
    static_groups: bool = False,
    stale_group_scales: bool = False,
    dead: Dead = "round",
    choose: Choose = affine_params,
    generator: torch.Generator | None = None,
    names: Sequence[str],
) -> list[Solved]:
    """`gptq_matrix` for matrices that share inputs and scheme, as the rows of one: their columns cost one loop.

    Args:
        matrices: (rows, K) each; a single one if a scale is shared by a tensor.
        factor: of their inputs.
        block: and what follows, see `gptq_matrix`.
        names: the parameters' paths, for messages.
    """
    sizes, k, name = [len(W) for W in matrices], factor.unit.shape[0], ", ".join(names)
    check_integers(scheme, name, "gptq")
    for one, W in zip(names, matrices, strict=True):
        check_finite(W, one)
    rows, device = sum(sizes), factor.unit.device
    if rows == 0 or k == 0:
        codes = [torch.empty((size, k), dtype=torch.uint8, device=device) for size in sizes]
        return [
            Solved(q, *choose(W, scheme, name), 0.0, damp=factor.damp) for q, W in zip(codes, matrices, strict=True)
        ]
    work = _columns(matrices, factor.order)
    if dead == "zero":
        work[factor.dead if factor.order is None else factor.dead[factor.order]] = 0
    grid = _Grid(scheme, rows, k, device, factor.order, dynamic=not static_groups, choose=choose, name=name)
    grid.choose_static(matrices, work)
    codes_by_column = torch.empty((k, rows), dtype=torch.uint8, device=device)
    losses = torch.zeros(rows, dtype=torch.float64, device=device)
    for begin, end in _blocks(k, block, grid.dynamic_group, stale_group_scales):
        if stale_group_scales:
            grid.choose_dynamic(work, begin, end)
        errors = torch.empty((end - begin, rows), device=device)
        for a, b in _blocks_between(begin, end, STRIP, grid.dynamic_group):
            if not stale_group_scales:
                grid.choose_dynamic(work, a, b)
            strip = errors[a - begin : b - begin]
            codes_by_column[a:b] = _round_strip(work[a:b], factor.unit[a:b, a:b], grid, a, strip, generator)
            if b < end:
                work[b:end].addmm_(factor.unit[a:b, b:end].T, strip, alpha=-1)
        if end < k:
            work[end:].addmm_(factor.unit[begin:end, end:].T, errors, alpha=-1)
        losses += errors.div_(factor.diag[begin:end, None]).square_().sum(0, dtype=torch.float64)
    if factor.order is not None:
        restored = torch.empty_like(codes_by_column)
        restored[factor.order] = codes_by_column
        codes_by_column = restored
    scale, zero, g_idx = grid.result()
    whole = Solved(codes_by_column.T.contiguous(), scale, zero, 0.0, g_idx, factor.damp)
    return [
        replace(part, loss=float(loss.sum()) / 2)
        for part, loss in zip(whole.split(sizes), losses.split(sizes), strict=True)
    ]


def _columns(matrices: Sequence[Tensor], order: Tensor | None) -> Tensor:
    """(K, rows) float32: columns as rows, in the order of rounding. Each is then contiguous, and corrected in place."""
    k = matrices[0].shape[1]
    work = torch.empty((k, sum(len(W) for W in matrices)), device=matrices[0].device)
    step, at = max(1, CHUNK // k), 0
    for part in (part for W in matrices for part in W.detach().split(step)):
        columns = part.T if order is None else part[:, order].T
        work[:, at : at + len(part)] = columns
        at += len(part)
    return work


def _by_groups(W: Tensor, H: Tensor, scheme: Scheme, options: dict) -> Solved:
    """A grouped convolution, in which every run of rows has inputs of its own."""
    if scheme.scale.granularity == "tensor":
        raise ValueError(f"{options['name']}: groups of a convolution are solved apart, use a scale per channel")
    parts = [gptq_matrix(w, h, scheme, **options) for w, h in zip(W.chunk(H.shape[0]), H, strict=True)]
    if parts[0].g_idx is not None:
        raise ValueError(f"{options['name']}: act_order of a grouped convolution needs static_groups")
    return Solved.of_rows(parts)


def _round_strip(
    work: Tensor, unit: Tensor, grid: _Grid, first: int, errors: Tensor, generator: torch.Generator | None
) -> Tensor:
    """The column loop: round the rows of `work` (n, rows), leave w - Q(w) in `errors`, return codes.

    A column takes the corrections of the strip's earlier columns in one product when it is reached.
    """
    n = work.shape[0]
    scale, zero = grid.of_columns(first, first + n)
    top = grid.top
    shifted = torch.empty_like(work)  # q - z
    stochastic = grid.scheme.rounding == "stochastic"
    real = grid.scheme.zero == "real"
    low, high = (-zero, top - zero) if zero is not None else (None, None)
    half = float((grid.top + 1) // 2)
    columns = unit.T.contiguous()
    for j in range(n):
        w, v, s = work[j], shifted[j], scale[j]
        if j:
            w.addmv_(errors[:j].T, columns[j, :j], alpha=-1)
        torch.div(w, s, out=v)
        if real:
            v += zero[j]
        if stochastic:
            v.add_(torch.rand(v.shape, generator=generator, device=v.device)).floor_()
        else:
            v.round_()
        # An integer zero may be added later: round(w/s) + z in [0, top] is round(w/s) in [-z, top - z].
        if real:
            v.clamp_(0, top).sub_(zero[j])
        elif zero is None:
            v.clamp_(-half, half - 1)
        else:
            torch.clamp(v, low[j], high[j], out=v)
        torch.addcmul(w, v, s, value=-1, out=errors[j])
    return shifted.add_(half if zero is None else zero).round_().clamp_(0, top).to(torch.uint8)


class _Grid:
    """Scales and zeros of the columns in the order of rounding: chosen at once, or group by group."""

    def __init__(
        self,
        scheme: Scheme,
        rows: int,
        k: int,
        device: torch.device,
        order: Tensor | None,
        dynamic: bool,
        choose: Choose,
        name: str,
    ) -> None:
        self.scheme, self.name, self._rule = scheme, name, choose
        self.top = scheme.element.levels - 1
        self.group = scheme.scale.group_of(k) if scheme.scale.granularity == "group" else k
        groups = -(-k // self.group)
        grouped = scheme.scale.granularity == "group"
        self.dynamic = grouped and dynamic
        self.dynamic_group = self.group if self.dynamic else None
        self.order = order
        column = torch.arange(k, device=device)
        self.index = (order if order is not None and not self.dynamic else column) // self.group
        self.scale = torch.empty((groups, rows), dtype=scheme.scale.torch_dtype, device=device)
        zero_dtype = torch.uint8 if scheme.zero == "int" else scheme.scale.torch_dtype
        self.zero = None if scheme.zero == "none" else torch.empty((groups, rows), dtype=zero_dtype, device=device)
        self.per_row = scheme if not grouped else scheme.with_(granularity="channel", group=None)

    def choose_static(self, matrices: Sequence[Tensor], work: Tensor) -> None:
        """Scales known before rounding: of rows from the weights as given (as official), of groups from `work`."""
        k = work.shape[0]
        if self.scheme.scale.granularity != "group":
            at = 0
            step = max(1, CHUNK // k) if self.scheme.scale.granularity != "tensor" else work.shape[1]
            for part in (part for W in matrices for part in W.detach().split(step)):
                self._store(0, slice(at, at + len(part)), *self._rule(part.float(), self.scheme, self.name))
                at += len(part)
        elif not self.dynamic:
            place = torch.arange(k) if self.order is None else torch.argsort(self.order)
            for g, columns in enumerate(place.split(self.group)):
                self._choose_group(g, work[columns])

    def choose_dynamic(self, work: Tensor, begin: int, end: int) -> None:
        """Scales of the groups whose first column lies in begin..end, from `work` as it is now."""
        if self.dynamic:
            for g in range(-(-begin // self.group), -(-end // self.group)):
                self._choose_group(g, work[g * self.group : (g + 1) * self.group])

    def _choose_group(self, g: int, columns: Tensor) -> None:
        self._store(g, slice(None), *self._rule(columns.T, self.per_row, self.name))

    def _store(self, g: int, rows: slice, scale: Tensor, zero: Tensor | None) -> None:
        self.scale[g, rows] = scale[:, 0]
        if self.zero is not None and zero is not None:
            self.zero[g, rows] = zero[:, 0]

    def of_columns(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero (n, rows) float32 of columns in the order of rounding."""
        groups = self.index[begin:end]
        return self.scale[groups].float(), None if self.zero is None else self.zero[groups].float()

    def result(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(rows, G) scale and zero, and each column's group if groups are not runs of columns."""
        scale = self.scale.T.contiguous()
        zero = None if self.zero is None else self.zero.T.contiguous()
        if self.scheme.scale.granularity == "tensor":
            scale, zero = scale[:1], None if zero is None else zero[:1]
        if not self.dynamic or self.order is None:
            return scale, zero, None
        g_idx = torch.empty_like(self.order)
        g_idx[self.order] = self.index
        return scale, zero, g_idx


def _blocks(k: int, block: int, group: int | None, stale: bool) -> list[tuple[int, int]]:
    """Ranges of at most `block` columns; unless scales may be stale, a group begins one or lies within."""
    if group is None or stale:
        return _blocks_between(0, k, block, None)
    if group <= block:
        return _blocks_between(0, k, block // group * group, None)
    return _blocks_between(0, k, block, group)


def _blocks_between(begin: int, end: int, step: int, group: int | None) -> list[tuple[int, int]]:
    """Cut begin..end every `step` columns, and, where groups are given, at every group's first column."""
    if group is None:
        starts = list(range(begin, end, step))
    else:
        first = begin // group * group
        runs = [(max(a, begin), min(a + group, end)) for a in range(first, end, group)]
        starts = [start for a, b in runs for start in range(a, b, step)]
    return list(zip(starts, [*starts[1:], end], strict=True))


def output_error(D: Tensor, H: Tensor) -> float:
    """tr(D H D^T): what a layer's output changes by when its weight changes by D (rows, K)."""
    total = 0.0
    step = max(1, (1 << 22) // max(1, D.shape[1]))
    for begin in range(0, D.shape[0], step):
        part = D[begin : begin + step].float()
        total += float(((part @ H) * part).sum(dtype=torch.float64))
    return total


@dataclass(frozen=True)
class GPTQ(PackWeights):
    """The pass: every linear layer and convolution whose inputs are known, by `gptq_matrix`.

    Args:
        scheme: how to store them.
        damp, act_order, static_groups: see `gptq_matrix`.
    """

    damp: float = 0.01
    act_order: bool = True
    static_groups: bool = True

    id: ClassVar = "gptq"
    needs: ClassVar = frozenset({"data", "float"})
    ops: ClassVar = ("linear", "conv")

    def solve(self, path: str, decision: Decision, ctx: Context) -> Record:
        """Codes and scales of the parameter at `path`, from `ctx.hessians` of its module."""
        scheme = Scheme.parse(decision.units[path]["scheme"])
        unit = self._unit(path, ctx.structure, ctx.model)
        layer = path.rpartition(".")[0]
        if layer not in ctx.hessians:
            raise ValueError(f"{layer}: GPTQ needs the second moment of its inputs on calibration data")
        solved = gptq_matrix(
            matrix_view(ctx.model.get_parameter(path).detach(), unit.view), ctx.hessians[layer].matrix, scheme,
            damp=self.damp, act_order=self.act_order, static_groups=self.static_groups, name=path,
        )  # fmt: skip
        tensors = pack_tensors(unit.spec(scheme), solved.codes, solved.scale, solved.zero)
        return unit.record(scheme, tensors, method="gptq", loss=solved.loss)


CARD = Card(
    id="gptq",
    title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    authors="Frantar, Ashkboos, Hoefler, Alistarh",
    year=2022,
    source="arXiv 2210.17323",
    family="quant",
    summary="Rounds the columns of a weight one by one, and lets those not yet rounded absorb each one's error.",
    objects={"GPTQ": "Pass"},
    use="At 4 bits and below, where some thousand tokens of calibration data are at hand.",
    avoid="At 8 bits, where rtn is as good and takes seconds, or where inputs at hand are not those of later use.",
    composes=("scale_tuning", "smoothquant", "fold_batchnorm"),
    vectors=("formats", "gptq"),
    code="IST-DASLab/gptq, Apache-2.0",
)
