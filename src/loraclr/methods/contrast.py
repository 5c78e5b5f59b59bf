"""The negative part of the LoRACLR objective: the hinge on paired rows, and descent where it is active.

Distances are ||Y_i - Yhat_j|| over all rows, i the concept of the target, j that of the prediction (arXiv 2412.09622, eq. 3; the
released code takes the minimum over the other index). A delta is Q V with orthonormal Q (out, k), as in `quadratic.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.methods.problem import Distances, LayerProblem
from loraclr.methods.quadratic import Quadratic

PORTION = 512  # rows of each concept that are compared at a time


@dataclass(frozen=True, eq=False)
class Contrast:
    """(1/N) sum_a max_b (m_ab - d_ab)_+^2 over anchors a and their negatives b, on the paired rows."""

    rows: Tensor  # (concepts, rows, in)
    base: Tensor  # (concepts, rows, out): X_i W^T, zeros in delta space
    targets: Tensor  # (concepts, rows, out)
    margins: Tensor  # (concepts, concepts): of target i and prediction j
    unit: float  # multiplies Frobenius norms
    anchor: str

    @staticmethod
    def of(problem: LayerProblem, *, margin: float, mode: str, anchor: str, space: str, distance: str, most: int | None = None) -> Contrast:
        """Outputs are X (W + D)^T in space "output" and X D^T in space "delta"; "relative" margins are m ||Y_i - Y_j||.

        `most` takes only so many of the paired rows, spread evenly.
        """
        rows = problem.sample()
        if most is not None and most < rows.shape[1]:
            rows = rows[:, torch.linspace(0, rows.shape[1] - 1, most).long()]
        changes = torch.stack([(x @ down.T) @ up.T for x, (up, down) in zip(rows, problem.factors, strict=True)])
        base = rows @ problem.weight().T if space == "output" else torch.zeros_like(changes)
        targets = base + changes
        unit = rows.shape[1] ** -0.5 if distance == "rms" else 1.0
        margins = margin * unit * _distances(targets, targets) if mode == "relative" else rows.new_full((len(rows),) * 2, margin)
        return Contrast(rows, base, targets, margins, unit, anchor)

    def distances(self, up: Tensor, v: Tensor) -> Tensor:
        """(concepts, concepts): target i against prediction j; the diagonal is infinite, a concept being no negative of itself."""
        return self._table(self.base + (self.rows @ v.T) @ up.T)

    def value_and_gradient(self, up: Tensor, v: Tensor) -> tuple[float, Tensor, Tensor]:
        """The hinge, its gradient (k, in), and the table of `distances`. Of tied negatives the first counts."""
        predictions = self.base + (self.rows @ v.T) @ up.T
        found = self._table(predictions)
        value, gradient = 0.0, torch.zeros_like(v)
        for i, j, short in self.active(found):
            value += short**2
            if found[i, j] > 0:  # at distance 0 every direction leads away: the zero sub-gradient
                push = ((predictions[j] - self.targets[i]) @ up).T @ self.rows[j]
                gradient -= 2 * short * self.unit**2 / float(found[i, j]) * push
        return value / len(self.rows), gradient / len(self.rows), found

    def active(self, found: Tensor) -> list[tuple[int, int, float]]:
        """Target, prediction and shortfall of every anchor whose nearest negative is inside the margin."""
        return active(self.margins, found, self.anchor)

    def _table(self, predictions: Tensor) -> Tensor:
        return (self.unit * _distances(self.targets, predictions)).fill_diagonal_(torch.inf)


def active(margins: Tensor, found: Tensor, anchor: str) -> list[tuple[int, int, float]]:
    """Of (N, N) margins and distances, as `Contrast.active` says."""
    short, other = (margins - found).max(1 if anchor == "target" else 0)
    anchors = torch.nonzero(short > 0).flatten().tolist()
    pairs = [(a, int(other[a])) if anchor == "target" else (int(other[a]), a) for a in anchors]
    return [(i, j, float(margins[i, j] - found[i, j])) for i, j in pairs]


class Tally:
    """Sums the squared distances of all pairs over paired rows that come in portions and are not kept."""

    def __init__(self, problem: LayerProblem, space: str, changes: Sequence[tuple[Tensor, Tensor]]) -> None:
        """For merged changes as up (out, k) and down (k, in); `space` is as in `Contrast.of`."""
        self._problem, self._space, self._changes = problem, space, tuple(changes)
        number = len(problem.concepts)
        self._natural = torch.zeros(number, number, dtype=torch.float64)
        self._found = torch.zeros(len(self._changes), number, number, dtype=torch.float64)
        self._rows = 0

    def add(self, rows: Tensor) -> None:
        """(concepts, rows, in), row k of all concepts from the same place."""
        factors = replace(self._problem).factors  # made anew: in double precision they are kept for no layer but this
        weight = self._problem.weight() if self._space == "output" else None
        for x in torch.split(rows.double(), PORTION, 1):
            targets = torch.stack([(part @ down.T) @ up.T for part, (up, down) in zip(x, factors, strict=True)])
            base = torch.zeros_like(targets) if weight is None else x @ weight.T
            self._natural += _distances(base + targets, base + targets).square()
            predictions = [base + (x @ down.T) @ up.T for up, down in self._changes]
            self._found += torch.stack([_distances(base + targets, predicted).square() for predicted in predictions])
        self._rows += rows.shape[1]

    def distances(self) -> tuple[Distances, ...]:
        """One for each change."""
        return tuple(Distances(found.sqrt(), self._natural.sqrt(), self._rows) for found in self._found)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) Frobenius distances of a (n, rows, out) and b (m, rows, out), without the cancelling inner-product form."""
    return torch.cdist(a.flatten(1), b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def refine(quadratic: Quadratic, contrast: Contrast, start: Tensor, *, penalty: float, iterations: int) -> tuple[Tensor, float]:
    """L-BFGS on J = q/N + penalty ||D|| + hinge from V = `start` (k, in), so within the span of the adapters' columns.

    With L L^T = S + w G_0 + mu I it moves Z in V = Z L^-1: there the quadratic part is a sphere (but for a little of the identity that
    keeps L invertible). Returns V, never worse than `start`, and the gradient that is left as a share of its two opposing parts.
    """
    number, up = len(contrast.rows), quadratic.up
    metric = quadratic.metric()
    metric.diagonal().add_(1e-6 * metric.diagonal().mean())
    lower = linalg.cholesky(metric)

    def coefficients(z: Tensor) -> Tensor:
        v: Tensor = torch.linalg.solve_triangular(lower, z, upper=False, left=False)
        return v

    def parts(z: Tensor) -> tuple[float, Tensor, Tensor]:
        v = coefficients(z)
        value, pull = quadratic.value_and_gradient(v)
        hinge, push, _ = contrast.value_and_gradient(up, v)
        size = float(v.norm())
        pull = pull / number + (penalty / size * v if size > 0 else 0)
        pull, push = (torch.linalg.solve_triangular(lower.T, part, upper=True, left=False) for part in (pull, push))
        return value / number + penalty * size + hinge, pull, push

    z = (start @ lower).requires_grad_()

    def closure() -> float:
        with torch.no_grad():
            value, pull, push = parts(z)
            z.grad = (pull + push).contiguous()
        return value

    optimiser = torch.optim.LBFGS(
        [z], max_iter=iterations, history_size=20, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    with torch.no_grad():
        first = parts(start @ lower)[0]
    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        better = parts(z)[0] <= first
        _, pull, push = parts(z if better else start @ lower)
        left = float((pull + push).norm() / (pull.norm() + push.norm()).clamp(min=1e-300))
        return coefficients(z.detach()) if better else start, left
