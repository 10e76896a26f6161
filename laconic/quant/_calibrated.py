"""`solve_calibrated`: GPTQ and its repair for matrices that read the same inputs, such as q, k and v.

All of them share one Hessian H = X^T X, so they share its factor (2/3 K^3 of the work), and those with equal schemes go
through the column loop as the rows of one matrix:

- columns in order of falling diag(H), groups as runs of the original order (`act_order`, `static_groups`);
- at `SEARCH_BITS` and below, ranges are searched by error instead of taken from minimum to maximum, where the scheme
  names no other rule;
- then the scales are solved for by least squares (`tune_scales`), and at `REFINE_BITS` and below scales and codes
  alternate (`tune`).

What is returned of a matrix is its share of the output's energy that became error, on the inputs behind H:

    loss = tr(E H E^T) / tr(W H W^T)        E = W - W^ (rows, K)

Source: see `gptq_matrix` and `tune_scales`. Which options are used at which width was chosen by the loss on inputs that
H had not seen: `benchmarks/gptq_against_rtn.py` shows what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laconic.numerics import Scheme

from ._awq import clipped_round
from ._gptq import Factor, Hessian, gptq_rows, inverse_factor
from ._products import fast_products
from ._rtn import Solved, round_to_nearest
from ._scale_tuning import tune, tune_scales

# From here down a searched range, and codes refined once more, take enough of the error to be worth their time.
SEARCH_BITS = 4
REFINE_BITS = 3
# Elements of a chunk of rows, and of matrices whose columns go through one loop: larger ones gain nothing by company.
CHUNK = 1 << 22
STACKED = 1 << 23


@dataclass(frozen=True)
class Matrix:
    """A matrix to store.

    Attributes:
        name: the parameter's path, for messages.
        W: (rows, K) of any floating type and any strides, left as it is.
        scheme: how to store it.
    """

    name: str
    W: Tensor
    scheme: Scheme


@dataclass(frozen=True)
class Calibrated:
    """A stored matrix.

    Attributes:
        name: of the `Matrix`.
        solved: codes, tuned scale and zero; groups are runs of columns.
        loss: tr(E H E^T) / tr(W H W^T) with the H given; 0 where nothing comes out of W.
    """

    name: str
    solved: Solved
    loss: float


def solve_calibrated(matrices: Sequence[Matrix], H: Hessian | Tensor, *, damp: float = 0.01) -> list[Calibrated]:
    """Codes and scales of matrices that read the same inputs.

    Args:
        matrices: (rows, K) each, with one K.
        H: of their inputs. A `Hessian` is used up (see `Hessian.take`); a tensor (K, K), or (groups, K, K) of a grouped
            convolution, is left as it is.
        damp: see `inverse_factor`.

    Returns:
        One result for each matrix, in order.

    Raises:
        NotFinite: inf or nan in a matrix or in `H`.
        ScaleOutOfRange: a scale does not fit in its scheme's scale dtype.
        ValueError: a matrix and `H` do not belong together.
    """
    hessian = H.take() if isinstance(H, Hessian) else H
    k = hessian.shape[-1]
    for matrix in matrices:
        if matrix.W.ndim != 2 or matrix.W.shape[1] != k:
            raise ValueError(f"{matrix.name}: its shape {tuple(matrix.W.shape)} does not fit a Hessian of {k} columns")
    if not matrices:
        return []
    with fast_products():
        if hessian.ndim == 3:
            return [_by_groups(matrix, hessian, damp) for matrix in matrices]
        return _together(matrices, hessian, damp)


def clip_calibrated(matrices: Sequence[Matrix], H: Hessian | Tensor) -> list[Calibrated]:
    """Codes and scales of matrices that read the same inputs, to nearest in clipped ranges (`clipped_round`).

    Args:
        matrices, H: as of `solve_calibrated`. A matrix with one scale for all of it, and those of a grouped convolution,
            are rounded in their whole ranges.
    """
    hessian = H.take() if isinstance(H, Hessian) else H
    done = []
    for matrix in matrices:
        W = matrix.W.detach()
        if hessian.ndim == 3 or matrix.scheme.scale.granularity == "tensor":
            solved = round_to_nearest(W, matrix.scheme, matrix.name)
            energy = float(W.float().square().sum(dtype=torch.float64))
        else:
            with fast_products():
                solved = clipped_round(W, hessian, matrix.scheme, matrix.name)
                energy = _energy(W, hessian)
        done.append(Calibrated(matrix.name, solved, solved.loss / energy if energy > 0 else 0.0))
    return done


def _together(matrices: Sequence[Matrix], H: Tensor, damp: float) -> list[Calibrated]:
    """One factor of H (K, K) for all, one column loop for each scheme."""
    factor = inverse_factor(H, damp=damp, act_order=True, name=matrices[0].name)
    solved: dict[int, Solved] = {}
    for alike in _by_scheme(matrices):
        solved.update(zip(alike, _round([matrices[i] for i in alike], factor), strict=True))
    del factor  # as large as H
    return [_repair(matrix, H, solved.pop(i)) for i, matrix in enumerate(matrices)]


def _by_scheme(matrices: Sequence[Matrix]) -> list[list[int]]:
    """Indices of matrices that are rounded as the rows of one: of one scheme, up to STACKED elements in all.

    A scale per tensor stands alone.
    """
    alike: list[list[int]] = []
    for i, matrix in enumerate(matrices):
        alone = matrix.scheme.scale.granularity == "tensor"
        for others in alike:
            size = sum(matrices[j].W.numel() for j in others) + matrix.W.numel()
            if not alone and matrices[others[0]].scheme == matrix.scheme and size <= STACKED:
                others.append(i)
                break
        else:
            alike.append([i])
    return alike


def _round(matrices: list[Matrix], factor: Factor) -> list[Solved]:
    """The column loop over the rows of matrices of one scheme."""
    scheme = matrices[0].scheme
    searched = scheme.bits <= SEARCH_BITS and scheme.scale.rule == "minmax"
    options = scheme.with_(rule="mse") if searched else scheme
    return gptq_rows([m.W for m in matrices], factor, options, static_groups=True, names=[m.name for m in matrices])


def _repair(matrix: Matrix, H: Tensor, solved: Solved) -> Calibrated:
    """Better scales for the codes, at few bits better codes too, and the loss of what came out."""
    W, scheme = matrix.W.detach(), matrix.scheme
    if scheme.bits <= REFINE_BITS:
        done = tune(W, H, solved, scheme)
    else:
        tuned = tune_scales(W, H, solved.codes, solved.scale, solved.zero, scheme)
        done = replace(solved, scale=tuned.scale, loss=tuned.after / 2)
    energy = _energy(W, H)
    return Calibrated(matrix.name, done, 2 * done.loss / energy if energy > 0 else 0.0)


def _by_groups(matrix: Matrix, H: Tensor, damp: float) -> Calibrated:
    """A grouped convolution: every run of rows has inputs of its own."""
    rows, groups = matrix.W.shape[0], H.shape[0]
    if rows % groups:
        raise ValueError(f"{matrix.name}: {rows} rows are not {groups} equal groups")
    if matrix.scheme.scale.granularity == "tensor":
        raise ValueError(f"{matrix.name}: groups of a convolution are solved apart, use a scale per channel")
    parts, losses, energy = [], 0.0, 0.0
    for w, h in zip(matrix.W.chunk(groups), H, strict=True):
        (part,) = _together([replace(matrix, W=w)], h, damp)
        parts.append(part.solved)
        losses += 2 * part.solved.loss
        energy += _energy(w, h)
    return Calibrated(matrix.name, Solved.of_rows(parts), losses / energy if energy > 0 else 0.0)


def _energy(W: Tensor, H: Tensor) -> float:
    """tr(W H W^T), a few rows at a time."""
    total, step = 0.0, max(1, CHUNK // max(1, W.shape[1]))
    for begin in range(0, W.shape[0], step):
        w = W[begin : begin + step].float()
        total += float((w @ H).mul_(w).sum(dtype=torch.float64))
    return total


CARD = None  # methods share this; it is none itself
