"""Linear algebra of stacked factors and ridge problems. Tensors only; it knows nothing of LoRA. Everything is float64.

A matrix D (out, in) is written up @ down with up (out, k), down (k, in). A Gram is X^T X (in, in) of feature rows X (rows, in).
Only unbatched Cholesky, QR, SVD and eigh are used: torch's batched LU is broken on CPU (pytorch#142815).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraclr.errors import NumericalError

JITTER = (1e-12, 1e-10, 1e-8)  # times the mean diagonal, tried in turn
BLOCK = 64  # columns of a Gram computed at a time: more are hardly faster, and store more of the half that is not needed
CLEAR = 1e-6  # squared singular values above this share of the factors' own are exact to 1e-10 in spite of being squared
APART, INDEPENDENT = 0.15, 1e-5  # of a column's length, from what the others span: far from it, and further than rounding
WIDE = 7 / 8  # of the smaller side: with more columns stacked than that, their product is cut faster than their factors
NULL = 1e-12  # eigenvalues of a Gram below this share of the largest are rounding, not signal


class Truncation(NamedTuple):
    """up @ down of rank at most `rank`; `lost` is the relative error, 0..1, in the metric it was cut in."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)
    lost: float


def gram(rows: Tensor) -> Tensor:
    """X^T X (in, in), float64, of rows (rows, in) of any float type: one half is computed, the other mirrored, so that it is symmetric
    to the last bit."""
    return whole(half_gram(rows), rows.shape[1])


def half_gram(rows: Tensor, before: Tensor | None = None) -> Tensor:
    """The lower half of X^T X, block row by block row up to and with the diagonal's block, in one piece; added to such a half `before`."""
    if before is not None and before.device != rows.device:  # sums stay where they are, products are made where the rows are
        return before + half_gram(rows).to(before.device)
    rows = rows.detach().to(torch.float64)
    width = rows.shape[1]
    half = rows.new_zeros(half_size(width)) if before is None else before.clone()
    for start, place in zip(range(0, width, BLOCK), _places(width), strict=True):
        stop = min(start + BLOCK, width)
        part = half[place.start : place.stop].view(stop - start, stop)
        part.addmm_(rows[:, start:stop].T, rows[:, :stop])
        own = part[:, start:]
        own.copy_(own.tril() + own.tril(-1).T)
    return half


def whole(half: Tensor, width: int) -> Tensor:
    """The symmetric (in, in) of its `half_gram`."""
    square = half.new_empty(width, width)
    for start, place in zip(range(0, width, BLOCK), _places(width), strict=True):
        stop = min(start + BLOCK, width)
        part = half[place.start : place.stop].view(stop - start, stop)
        square[start:stop, :stop] = part
        square[:start, start:stop] = part[:, :start].T
    return square


def half(square: Tensor) -> Tensor:
    """The half of a symmetric (in, in), as `half_gram` makes it."""
    return torch.cat([square[start : start + BLOCK, : start + BLOCK].reshape(-1) for start in range(0, len(square), BLOCK)])


def half_size(width: int) -> int:
    """How many numbers the half of a symmetric (width, width) has."""
    return sum(len(part) for part in _places(width))


def _places(width: int) -> list[range]:
    """Where each block row of a half is."""
    found, place = [], 0
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        found.append(range(place, place + (stop - start) * stop))
        place = found[-1].stop
    return found


def svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD U, s, V^T of up @ down, by QR of each factor and an SVD of the small core: never (out, in)."""
    left, upper = torch.linalg.qr(up.to(torch.float64))
    right, lower = torch.linalg.qr(down.to(torch.float64).T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def thin_svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`svd_of_product` without the singular values that are zero up to the rounding of the factors, which may cancel each other."""
    u, s, vh = svd_of_product(up, down)
    size = float((up.norm(dim=0) * down.norm(dim=1)).sum())
    rank = int((s > _rounding(up.shape[0], down.shape[1]) * size).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def orientation(columns: Tensor) -> Tensor:
    """(1, k) signs that make the entry of largest magnitude of each column (out, k) positive: an SVD may return either sign."""
    if not columns.shape[1]:
        return columns.new_ones(1, 0)
    return columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()


def orthonormalised(columns: Tensor) -> Tensor:
    """The nearest (out, k) with orthonormal columns to unit columns (out, k), U V^T of their U S V^T (Procrustes).

    Where columns are the same up to single precision, or more than `out`, it has orthonormal columns on their span only: a singular value
    that is nothing but rounding stays 0 instead of becoming 1.
    """
    u, s, vh = svd_of_product(columns, torch.eye(columns.shape[1], dtype=torch.float64))
    there = s > INDEPENDENT
    return u[:, there] @ vh[there]


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The blocks (rows_i, columns_i) along the diagonal, zeros elsewhere."""
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def span(columns: Tensor) -> Tensor:
    """(out, min(out, k)) orthonormal columns whose span holds those of (out, k)."""
    if columns.shape[1] > columns.shape[0]:
        return torch.eye(columns.shape[0], dtype=columns.dtype)
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def truncate(up: Tensor, down: Tensor, rank: int) -> Truncation:
    """The best approximation of up @ down of rank `rank` (Eckart-Young), both factors equally large in every direction."""
    up, down = up.to(torch.float64), down.to(torch.float64)
    side, stacked = min(up.shape[0], down.shape[1]), up.shape[1]
    if 0 < rank < min(side, stacked) and stacked >= WIDE * side:
        dense = truncate_dense(up @ down, rank)
        if dense.up.shape[1]:
            return dense
    found = _leading(up, down, rank)
    if found is not None:
        return found
    u, s, vh = svd_of_product(up, down)
    root = s[:rank].sqrt()
    return Truncation(u[:, :rank] * root, root[:, None] * vh[:rank], _share(s[rank:].square().sum(), s.square().sum()))


def _leading(up: Tensor, down: Tensor, rank: int) -> Truncation | None:
    """`truncate` by an eigendecomposition of up^T up and down down^T (k, k), a third of the time. It squares singular values: None where
    those that matter are too small for that, beside factors that cancel each other or by themselves."""
    if not 0 < rank < up.shape[1]:
        return None
    left, right = up.T @ up, down @ down.T
    lower, info = torch.linalg.cholesky_ex(right)
    if int(info):
        return None
    values, vectors = torch.linalg.eigh(lower.T @ left @ lower)  # of D D^T = (up lower) (up lower)^T
    lost = _cut(values, rank, size=left.norm() * right.norm())
    if lost is None:
        return None
    basis = torch.linalg.qr(up @ (lower @ vectors[:, -rank:].flip(1)))[0]
    return _balanced(basis, (basis.T @ up) @ down, lost)


def _cut(values: Tensor, rank: int, *, size: Tensor) -> float | None:
    """What a cut to the last `rank` of these ascending squared singular values loses. They are wrong by the rounding of `size`, the norm of
    what they were computed from: None where that matters to the smaller ones, those that are cut."""
    cut = values[:-rank].clamp(min=0).sum()
    return _share(cut, values.clamp(min=0).sum()) if bool(cut > CLEAR * size) else None


def _balanced(up: Tensor, down: Tensor, lost: float = 0.0) -> Truncation:
    """The same product, both factors equally large in every column."""
    root = (down.norm(dim=1) / up.norm(dim=0)).sqrt()
    return Truncation(up * root, down / root[:, None], lost)


def lowest_rank(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the fewest columns, both factors equally large in every column: singular values that are zero up to float64
    rounding are dropped.

    Where the columns of one factor are well apart and those of the other independent, none can be spared, and none cancels much of what
    others add: they are kept as they are, in their order.
    """
    up, down = up.to(torch.float64), down.to(torch.float64)
    if _all_needed(up, down):
        return _balanced(up, down)[:2]
    u, s, vh = svd_of_product(up, down)
    rank = int((s > _rounding(up.shape[0], down.shape[1]) * s.max()).sum()) if len(s) else 0
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _all_needed(up: Tensor, down: Tensor) -> bool:
    """Whether no column of `up` with its row of `down` can be spared. The least singular value of k unit columns is at least the least of
    their distances from what the others span, divided by the square root of k; the largest is at most that root."""
    left = _apart(up)
    right = _apart(down.T) if left > INDEPENDENT else 0.0
    if min(left, right) <= INDEPENDENT or max(left, right) <= APART:
        return False
    sizes = up.norm(dim=0) * down.norm(dim=1)
    return float(left * right * sizes.min() / (len(sizes) ** 2 * sizes.max())) > _rounding(up.shape[0], down.shape[1])


def _apart(columns: Tensor) -> float:
    """The least distance of a column from what the others span, as a share of its length; 0 where one is nearly there."""
    if not 0 < columns.shape[1] <= columns.shape[0]:
        return 0.0
    square = columns.T @ columns
    size = square.diagonal().sqrt()
    lower, info = torch.linalg.cholesky_ex(square / size / size[:, None])
    if int(info):
        return 0.0
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False)
    return float((1 / inverse.norm(dim=0).max()).nan_to_num())


def factor(change: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest exact factors of a dense (out, in); where it has full rank, itself and an identity."""
    up, down, _ = truncate_dense(change, min(change.shape))
    return up, down


def truncate_dense(change: Tensor, rank: int) -> Truncation:
    """The same of a dense (out, in), cut to its best approximation of rank `rank` where its own is higher: by eigenvalues of its smaller
    Gram matrix, a third of the time, but where squares are too small for that."""
    change = change.to(torch.float64)
    out, width = change.shape
    if 0 < rank < min(out, width):
        square = change @ change.T if out <= width else change.T @ change
        values, vectors = torch.linalg.eigh(square)
        lost = _cut(values, rank, size=square.norm())
        if lost is not None:
            leading = vectors[:, -rank:].flip(1)
            basis = leading if out <= width else torch.linalg.qr(change @ leading)[0]
            return _balanced(basis, basis.T @ change, lost)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    own = int((s > _rounding(*change.shape) * s.max()).sum())
    if own == min(change.shape) <= rank:
        return Truncation(*identity_factors(change), 0.0)
    kept = min(own, rank)
    root = s[:kept].sqrt()
    return Truncation(
        u[:, :kept] * root, root[:, None] * vh[:kept], _share(s[rank:].square().sum(), s.square().sum()) if own > rank else 0.0
    )


def identity_factors(change: Tensor) -> tuple[Tensor, Tensor]:
    """A dense (out, in) as factors of rank min(out, in), one of them the identity: lossless and free."""
    out, width = change.shape
    eye = torch.eye(min(out, width), dtype=change.dtype, device=change.device)
    return (eye, change) if out <= width else (change, eye)


def truncate_aware(up: Tensor, down: Tensor, rank: int, *, metric: Tensor, mu: float = 0.0) -> Truncation:
    """The rank-`rank` matrix nearest to D = up @ down in ||(D' - D) (S + mu I)^(1/2)||_F, with S = `metric` (in, in).

    That is the rank-constrained optimum of a ridge objective whose optimum is D: P P^T D, P the leading left singular vectors of
    D (S + mu I)^(1/2), here the eigenvectors of D (S + mu I) D^T, so that S may be singular and nothing is inverted.
    """
    up, down = up.to(torch.float64), down.to(torch.float64)
    left, upper = torch.linalg.qr(up)
    core = upper @ (down @ metric @ down.T + mu * (down @ down.T)) @ upper.T
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    keep = left @ vectors.flip(1)[:, :rank]
    values = values.flip(0).clamp(min=0)
    return Truncation(keep, keep.T @ up @ down, _share(values[rank:].sum(), values.sum()))


def cholesky(matrix: Tensor, what: str = "the Gram matrix") -> Tensor:
    """Lower Cholesky factor of a symmetric (n, n). Warns with the number when it has to add to the diagonal.

    Raises NumericalError on NaN or infinity, and when it is not positive definite even with 1e-8 of its mean diagonal added.
    """
    if not math.isfinite(float(matrix.sum())):  # one pass: a NaN or infinity anywhere is in the sum
        raise NumericalError(f"{what} holds NaN or infinity; collect the features in float32 and check the adapters for broken weights")
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return lower
    scale = float(matrix.diagonal().mean().abs())
    for jitter in JITTER:
        lifted = matrix.clone()
        lifted.diagonal().add_(jitter * scale)
        lower, info = torch.linalg.cholesky_ex(lifted)
        if int(info) == 0:
            warnings.warn(
                f"{what} is singular: added {jitter * scale:.3g}, {jitter:.0e} of its mean diagonal", RuntimeWarning, stacklevel=2
            )
            return lower
    raise NumericalError(
        f"{what}, {tuple(matrix.shape)}, is not positive definite (leading minor {int(info)}), even with {JITTER[-1]:.0e} of its mean "
        "diagonal added; raise `ridge`"
    )


def ridge_solve(right: Tensor, square: Tensor, mu: float) -> Tensor:
    """right (k, in) times (S + mu I)^-1, with S = `square` (in, in), by Cholesky; for mu = 0 and a singular S right S^+, of least norm.

    Rows that repeat each other leave S singular however many they are. Raises NumericalError on NaN or infinity.
    """
    if mu == 0:
        lower, info = torch.linalg.cholesky_ex(square)
        if int(info) or not float(lower.diagonal().min()) ** 2 > NULL * float(square.diagonal().max()):  # or NaN
            return _least_norm(right.T, square, "the Gram matrix").T
        plain: Tensor = torch.cholesky_solve(right.T, lower)
        return plain.T
    lifted = square.clone()
    lifted.diagonal().add_(mu)
    solution: Tensor = torch.cholesky_solve(right.T, cholesky(lifted))
    return solution.T


def _least_norm(right: Tensor, square: Tensor, what: str) -> Tensor:
    """S^+ right, for a symmetric S = `square` (n, n) whose eigenvalues below `NULL` of the largest are rounding, and (n, k)."""
    if not bool(torch.isfinite(square).all()):
        raise NumericalError(f"{what} holds NaN or infinity; collect the features in float32 and check the adapters for broken weights")
    values, vectors = torch.linalg.eigh(square)
    inverse = torch.where(values > NULL * values.max().clamp(min=0), 1 / values, torch.zeros_like(values))
    least: Tensor = vectors @ (inverse[:, None] * (vectors.T @ right))
    return least


def dual_coefficients(targets: Tensor, kernel: Tensor, mu: float) -> Tensor:
    """The a (rows, k) with (X X^T + mu I) a = C, for `kernel` = X X^T and C = `targets` (rows, k): the optimum is V = a^T X.

    With mu = 0 it is the one of least norm.
    """
    if mu > 0:
        lifted = kernel.clone()
        lifted.diagonal().add_(mu)
        solution: Tensor = torch.cholesky_solve(targets, cholesky(lifted, "the kernel of the rows"))
        return solution
    return _least_norm(targets, kernel, "the kernel of the rows")


def dual_solve(targets: Tensor, rows: Tensor, kernel: Tensor, mu: float) -> Tensor:
    """The V (k, in) that minimises ||X V^T - C||^2 + mu ||V||^2, for fewer rows than features.

    C = `targets` (rows, k), X = `rows` (rows, in), `kernel` = X X^T. With mu = 0 it is the solution of least norm, (X^+ C)^T.
    """
    return dual_coefficients(targets, kernel, mu).T @ rows


def dual_norm(coefficients: Tensor, targets: Tensor, mu: float) -> float:
    """||V||_F of V = a^T X from the coefficients a alone: <a, X X^T a> with X X^T a = C - mu a."""
    return float((coefficients * (targets - mu * coefficients)).sum().clamp(min=0).sqrt())


def secular_root(norm: Callable[[float], float], target: float, *, start: float, rtol: float = 1e-9, steps: int = 200) -> float:
    """The mu > 0 with mu * norm(mu) = target, for a norm of the form ||R (S + mu I)^-1||.

    mu * norm(mu) increases from 0 to ||R||; 1 / norm(mu) is nearly linear in mu, so its secant gives the next guess, safeguarded by
    a bracket. The caller must have checked that target < ||R||. Raises NumericalError if it does not settle.
    """
    low, high, mu = 0.0, math.inf, start
    last: tuple[float, float] | None = None
    for _ in range(steps):
        size = norm(mu)
        if not math.isfinite(size):
            raise NumericalError(f"the delta has norm {size} at mu = {mu:.3g}; check the features and adapters for NaN")
        if abs(mu * size - target) <= rtol * target or high - low <= 1e-15 * high < math.inf:
            return mu
        if mu * size < target:
            low = mu
        else:
            high = mu
        inverse = 1 / size if size > 0 else math.inf
        slope = (inverse - last[1]) / (mu - last[0]) if last and mu != last[0] else 0.0
        last = (mu, inverse)
        share = 1 - target * slope
        guess = target * (inverse - slope * mu) / share if share > 0 else math.inf
        if not low < guess < high:
            guess = 4 * mu if high == math.inf else math.sqrt(low * high) if low > 0 else high / 4
        mu = guess
    raise NumericalError(f"the secular equation did not settle in {steps} steps (mu = {mu:.3g}); choose `ridge` instead of `penalty`")


def _rounding(out: int, width: int) -> float:
    return max(out, width) * torch.finfo(torch.float64).eps


def _share(part: Tensor, whole: Tensor) -> float:
    return float((part / whole).sqrt()) if float(whole) > 0 else 0.0
