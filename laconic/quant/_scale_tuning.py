"""`scale_tuning`: for codes that stay, the scales (and then for those scales, the codes) that change outputs
least.

A row of W^ is linear in its scales: w^ = sum_g s_g v_g, with v_g (K,) the values q - z of group g and zeros
elsewhere. What a layer's output loses is a quadratic in w - w^, so the best scales of a row solve G normal
equations:

    min_s (w - sum_g s_g v_g)^T H (w - sum_g s_g v_g)        A s = b,   A_gh = v_g^T H v_h,   b_g = v_g^T H w

All rows at once, A costs half a product of (rows, K) with H (K, K). With one scale per tensor the equations of
all rows add up. New scales are rounded to their storage type, and kept row by row only where the error,
computed from what is stored, falls: the result is never worse.

`refine_codes` is the other half of the alternation: coordinate descent over codes for given scales. Going
through the columns, each takes the code nearest to its optimum while all others stay:

    w^_j <- Q(w^_j + (D H)_j / H_jj)        D = W - W^

which never raises the error either.

`tune` alternates the two. Source: least-squares scales for given codes are folklore; coordinate descent over
codes is that of "QuantEase: Optimization-based Quantization for Language Models", Behdin, Acharya, Gupta,
Song, Zhu, Keerthi, Mazumder, 2023, arXiv 2309.01885, without its handling of outliers; no code was used.
Nothing is folded at inference.

Use them after `gptq` where calibration inputs are at hand: they take a part of the remaining output error for
about the price of another GPTQ, a small one at 4 bits and a larger one at 2. Like everything that fits H,
they can overfit little data.

Example:
    >>> from laconic.numerics import Int, Scale
    >>> from laconic.quant import round_to_nearest
    >>> X, W = torch.randn(256, 64) @ torch.randn(64, 64), torch.randn(16, 64)
    >>> H, scheme = X.T @ X, Scheme(Int(2), Scale("channel"))
    >>> nearest = round_to_nearest(W, scheme)
    >>> tuned = tune_scales(W, H, nearest.codes, nearest.scale, nearest.zero, scheme)
    >>> tuned.after < tuned.before
    True
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laconic.core.card import Card
from laconic.numerics import Scheme, dequantize

from ._rtn import Solved
from ._weights import check_integers

# Elements of a chunk of rows; about six temporaries of this size live at once.
CHUNK = 1 << 22
# Added to the normal equations, as a part of their mean diagonal: pulls towards the scales given.
RIDGE = 1e-6
# Columns between two exact gradients in coordinate descent.
BLOCK = 128


@dataclass(frozen=True)
class Tuned:
    """Result: `scale` like the one given, and tr(D H D^T) before and after; after <= before."""

    scale: Tensor
    before: float
    after: float


def tune_scales(
    W: Tensor,
    H: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    ridge: float = RIDGE,
) -> Tuned:
    """Least-squares scales for fixed codes and zeros.

    Args:
        W: (rows, K) of any floating type.
        H: (K, K) symmetric, positive semidefinite.
        codes: (rows, K) uint8.
        scale: as `affine_params` gives it.
        zero: likewise.
        scheme: how the matrix is stored.
        ridge: see `RIDGE`.
    """
    if W.numel() == 0:
        return Tuned(scale, 0.0, 0.0)
    if scheme.scale.granularity == "tensor":
        return _tune_shared(W, H, codes, scale, zero, scheme, ridge)
    tuned, before, after = [], 0.0, 0.0
    for rows in _row_chunks(W):
        z = None if zero is None else zero[rows]
        w, q, s = W[rows].float(), codes[rows], scale[rows]
        A, rhs, old = _normal_equations(w, H, q, s, z, scheme)
        new = _step(A, rhs, s, ridge)
        now = _row_errors(w - dequantize(q, new, z, scheme), H)
        better = now < old
        tuned.append(torch.where(better[:, None], new, s))
        before += float(old.sum())
        after += float(torch.where(better, now, old).sum())
    return Tuned(torch.cat(tuned), before, after)


def _tune_shared(
    W: Tensor, H: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, ridge: float
) -> Tuned:
    """One scale for the whole matrix: the equations of all rows in one."""
    A = torch.zeros((1, 1, 1), dtype=torch.float64, device=W.device)
    rhs = torch.zeros((1, 1), dtype=torch.float64, device=W.device)
    before = 0.0
    for rows in _row_chunks(W):
        part_A, part_rhs, old = _normal_equations(W[rows].float(), H, codes[rows], scale, zero, scheme)
        A += part_A.sum(0)
        rhs += part_rhs.sum(0)
        before += float(old.sum())
    new = _step(A, rhs, scale, ridge)
    after = sum(
        float(_row_errors(W[rows].float() - dequantize(codes[rows], new, zero, scheme), H).sum())
        for rows in _row_chunks(W)
    )
    return Tuned(new, before, after) if after < before else Tuned(scale, before, before)


def _normal_equations(
    w: Tensor, H: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    """A (rows, G, G), b - A s at the given scales (rows, G), and the error of each row (rows,)."""
    rows, k = w.shape
    one = torch.ones_like(scale)
    v = dequantize(codes, one, zero, scheme)
    D = w - dequantize(codes, scale, zero, scheme)
    gradient = D @ H
    width = scheme.scale.group_of(k) if scheme.scale.granularity == "group" else k
    groups = -(-k // width)
    A = torch.zeros((rows, groups, groups), device=w.device)
    for g in range(groups):
        begin, end = g * width, min((g + 1) * width, k)
        part = v[:, begin:end] @ H[begin:end, :end]
        A[:, g, : g + 1] = _sums(part.mul_(v[:, :end]), width)
    A += A.tril(-1).mT  # it is symmetric
    # b - A s = v_g^T H (w - w^): from the residual itself, since the difference of two large numbers would be
    # noise.
    return A, _sums(gradient * v, width), (gradient * D).sum(1, dtype=torch.float64)


def _step(A: Tensor, rhs: Tensor, scale: Tensor, ridge: float) -> Tensor:
    """s + (A + ridge)^-1 rhs in the storage type; the old scale where that is no positive number."""
    A, rhs = A.double(), rhs.double()
    mean = A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    A = A + (ridge * mean)[:, None, None] * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    # Not Cholesky: rounding may leave A slightly indefinite. A row that fails keeps its scales.
    move, failed = torch.linalg.solve_ex(A, rhs[:, :, None])
    new = (scale.double() + move[:, :, 0]).to(scale.dtype)
    ok = torch.isfinite(new) & (new > 0) & (failed == 0)[:, None]
    return torch.where(ok, new, scale)


def refine_codes(
    W: Tensor, H: Tensor, solved: Solved, scheme: Scheme, sweeps: int = 1, damp: float = 0.0
) -> tuple[Solved, float, float]:
    """Coordinate descent over the codes of `solved`, scales and zeros fixed.

    Args:
        W: (rows, K).
        H: (K, K).
        solved: the start; its groups must be runs of columns.
        scheme: how the matrix is stored.
        sweeps: passes over the columns.
        damp: added to the diagonal of H, as a part of its mean, against fitting noise.

    Returns:
        The result, and tr(D H D^T) (H damped) before and after.
    """
    if solved.g_idx is not None:
        raise ValueError("refine_codes: groups must be runs of columns")
    check_integers(scheme, "refine_codes", "descent over the codes")
    k = W.shape[1]
    diagonal = H.diagonal()
    added = damp * float(diagonal.double().mean()) if k else 0.0
    # A column that calibration never saw has no gradient: any positive number leaves it as it is.
    curvature = torch.where(diagonal + added > 0, diagonal + added, 1.0)
    codes = solved.codes.clone()
    before = after = 0.0

    def errors(D: Tensor) -> Tensor:
        return _row_errors(D, H) + added * D.square().sum(1, dtype=torch.float64)

    for rows in _row_chunks(W):
        z = None if solved.zero is None else solved.zero if solved.zero.shape[0] == 1 else solved.zero[rows]
        s = solved.scale if solved.scale.shape[0] == 1 else solved.scale[rows]
        w, q = W[rows].float(), codes[rows].clone()
        D = w - dequantize(q, s, z, scheme)
        old = errors(D)
        zeros_like_q = torch.zeros_like(q)
        steps = dequantize(zeros_like_q + 1, s, z, scheme) - dequantize(zeros_like_q, s, z, scheme)
        for _ in range(sweeps):
            _sweep(D, H, q, steps, curvature, added, scheme.element.levels - 1)
        # No step raises the error but by rounding of the arithmetic: a row that got worse keeps its codes.
        new = errors(w - dequantize(q, s, z, scheme))
        better = new < old
        codes[rows] = torch.where(better[:, None], q, codes[rows])
        before += float(old.sum())
        after += float(torch.where(better, new, old).sum())
    return replace(solved, codes=codes, loss=after / 2), before, after


def tune(W: Tensor, H: Tensor, solved: Solved, scheme: Scheme, rounds: int = 1, sweeps: int = 2) -> Solved:
    """Scales, then codes, `rounds` times, then scales again. Never worse than `solved`; `loss` is tr(D H D^T)
    / 2.

    Args:
        W: (rows, K).
        H: (K, K).
        solved: the start; its groups must be runs of columns.
        scheme: how the matrix is stored.
        rounds: alternations.
        sweeps: passes over the columns in each.
    """
    for _ in range(rounds):
        tuned = tune_scales(W, H, solved.codes, solved.scale, solved.zero, scheme)
        solved, _, _ = refine_codes(W, H, replace(solved, scale=tuned.scale), scheme, sweeps)
    tuned = tune_scales(W, H, solved.codes, solved.scale, solved.zero, scheme)
    return replace(solved, scale=tuned.scale, loss=tuned.after / 2)


def _sweep(D: Tensor, H: Tensor, codes: Tensor, steps: Tensor, curvature: Tensor, added: float, top: int) -> None:
    """One pass over the columns of D and codes (rows, K), in place."""
    k = D.shape[1]
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        local = H[begin:end, begin:end].clone()
        local.diagonal().add_(added)
        gradient = (D @ H[:, begin:end]).add_(D[:, begin:end], alpha=added).T.contiguous()
        q = codes[:, begin:end].T.float().contiguous()
        s = steps[:, begin:end].T.contiguous()
        moved = torch.zeros_like(q)  # how much each w^ of the block has moved
        for j in range(end - begin):
            g, move = gradient[j], moved[j]
            if j:
                g.addmv_(moved[:j].T, local[:j, j], alpha=-1)
            torch.div(g, s[j] * curvature[begin + j], out=move)
            move.add_(q[j]).round_().clamp_(0, top).sub_(q[j])
            q[j] += move
            move.mul_(s[j])
        D[:, begin:end] -= moved.T
        codes[:, begin:end] = q.T.to(torch.uint8)


def _sums(x: Tensor, width: int) -> Tensor:
    """(rows, G) sums over runs of `width` columns, the last of which may be short."""
    rows, k = x.shape
    whole = k // width * width
    out = x[:, :whole].view(rows, -1, width).sum(-1) if whole == k else None
    if out is not None:
        return out
    return torch.cat([x[:, :whole].reshape(rows, whole // width, width).sum(-1), x[:, whole:].sum(1, True)], dim=1)


def _row_errors(D: Tensor, H: Tensor) -> Tensor:
    """(rows,) float64 d^T H d of every row."""
    return ((D @ H) * D).sum(1, dtype=torch.float64)


def _row_chunks(W: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(1, W.shape[1]))
    return [slice(begin, min(begin + step, W.shape[0])) for begin in range(0, W.shape[0], step)]


CARD = Card(
    id="scale_tuning",
    title="QuantEase: Optimization-based Quantization for Language Models",
    authors="Behdin, Acharya, Gupta, Song, Zhu, Keerthi, Mazumder",
    year=2023,
    source="arXiv 2309.01885 for the codes; least-squares scales are folklore",
    family="quant",
    summary="Fits the scales to given codes by least squares on the layer's output, and the codes to given scales in turn.",
    objects={},
    use="After gptq, at 3 bits and below, for about the price of another gptq.",
    avoid="With little calibration data, which it can overfit.",
    composes=("gptq",),
)
