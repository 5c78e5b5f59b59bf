"""The convex part of the LoRACLR objective for one layer, and its minimiser in closed form.

    q(D) = sum_i a_i ||X_i (D - D_i)^T||^2 + N w ||X_0 D^T||^2 + mu ||D - P||^2

All D_i = B_i A_i lie in the span of [B_1 ... B_N], so the minimiser does too: with an orthonormal basis Q of that span it is sought as
V in D = Q V, and norms and inner products of D are those of V. Only X^T X enters, or, where all concepts together have fewer rows
than the layer has inputs, X X^T (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.errors import MergeError
from loraclr.methods.problem import LayerProblem
from loraclr.statistics import Moments


@dataclass(frozen=True, eq=False)
class Quadratic:
    up: Tensor  # Q (out, k), orthonormal columns
    right: Tensor  # R + mu P = sum_i a_i D_i G_i + mu P, as (k, in)
    prior: Tensor | None  # P as (k, in); None is 0
    mu: float
    constant: float  # q(0)
    square: Tensor  # S + N w G_0 (in, in); in the dual form X X^T (rows, rows)
    rows: Tensor | None  # the dual form's X (rows, in), the rows of concept i scaled by sqrt(a_i)
    targets: Tensor | None  # their outputs X_i D_i^T, as (rows, k)

    @staticmethod
    def of(
        problem: LayerProblem,
        *,
        ridge: float = 0.0,
        preservation: float = 0.0,
        prior: str = "zero",
        normalise: bool = False,
        importance: tuple[float, ...] = (),
        balance: bool = False,
    ) -> Quadratic:
        """a_i is importance_i, over the row count when `normalise`, over ||X_i D_i^T||^2 per row when `balance`; S = sum_i a_i G_i.

        mu is `ridge` times the mean diagonal of S, which `balance` leaves as it is.
        """
        number, width = len(problem.concepts), problem.width
        fit = problem.moments()
        shares = [(importance[i] if importance else 1.0) / (fit[i].count if normalise else 1) for i in range(number)]
        if balance:
            shares = _balanced(problem, fit, shares)
        parts = list(zip(fit, shares, strict=True))
        if preservation > 0:
            parts.append(_preserve(problem, preservation * number, normalise))
        sums = _Sums.of(problem, parts)
        constant = 0.0
        blocks, outputs = [], []
        ups, downs = zip(*problem.factors, strict=True)
        for index, (seen, share) in enumerate(sums.over(parts)):
            if index < number:
                block = share * _times_gram(downs[index], seen)
                constant += float(((ups[index].T @ ups[index]) * (block @ downs[index].T)).sum())
                blocks.append(block)
                if sums.dual and seen.rows is not None:
                    outputs.append(seen.rows @ (share**0.5 * downs[index]).T)
        mu = ridge * sum(sums.traces[:number]) / width
        stack = torch.cat(ups, 1)
        basis = linalg.span(stack)
        inside = basis.T @ stack
        centre = inside @ torch.cat(downs) / number if prior == "mean" else None
        pull: Tensor | float = 0.0
        if centre is not None:
            pull, constant = mu * centre, constant + mu * float(centre.square().sum())
        if sums.dual:
            rows = sums.rows()
            acting = linalg.block_diagonal(outputs)  # X_i A_i^T; concept-free rows, below, ask for no change
            targets = torch.cat([acting, acting.new_zeros(len(rows) - len(acting), acting.shape[1])]) @ inside.T
            return Quadratic(basis, targets.T @ rows + pull, centre, mu, constant, sums.kernel(), rows, targets)
        return Quadratic(basis, inside @ torch.cat(blocks) + pull, centre, mu, constant, sums.square(), None, None)

    @staticmethod
    def held_out(problem: LayerProblem) -> Quadratic:
        """The sum over concepts of the squared residual on the held-out prompts, in the same basis: 0 is every adapter's own behaviour.

        Raises MergeError where no held-out prompts were collected.
        """
        kept = {} if problem.statistics is None else problem.statistics.held_out
        if problem.statistics is None or set(problem.concepts) - set(kept):
            raise MergeError(f"{problem.layer}: no held-out statistics to choose by; collect some held-out prompts, or set choose='fixed'")
        pairs = zip(problem.concepts, problem.factors, strict=True)
        energies = [float(((up.T @ up) * kept[concept].inner(down)).sum()) for concept, (up, down) in pairs]
        shares = tuple(1 / energy if energy > 0 else 0.0 for energy in energies)
        return Quadratic.of(replace(problem, statistics=replace(problem.statistics, fit=kept)), importance=shares)

    def with_mu(self, mu: float) -> Quadratic:
        """The same but for the ridge."""
        if self.prior is None:
            return replace(self, mu=mu)
        more = mu - self.mu
        return replace(self, mu=mu, right=self.right + more * self.prior, constant=self.constant + more * float(self.prior.square().sum()))

    def minimiser(self, extra: float = 0.0) -> Tensor:
        """The V (k, in) of least q(D) + extra ||D||^2: (R + mu P)(S + N w G_0 + (mu + extra) I)^-1, primal or dual."""
        total = self.mu + extra
        if self.rows is None or self.targets is None:
            return linalg.ridge_solve(self.right, self.square, total)
        if self.prior is None or total == 0:
            return linalg.dual_solve(self.targets, self.rows, self.square, total)
        centre = self.prior * (self.mu / total)
        return centre + linalg.dual_solve(self.targets - self.rows @ centre.T, self.rows, self.square, total)

    def penalised(self, multiplier: float) -> tuple[Tensor, float]:
        """V of least q(D) + 2 multiplier ||D||_F (not squared), and the mu that takes the penalty's place, infinite for V = 0.

        V = V(mu) with mu ||V(mu)|| = multiplier, a monotone equation in one unknown; V = 0 iff ||R|| <= multiplier.
        """
        size = float(self.right.norm())
        if size <= multiplier:
            return torch.zeros_like(self.right), float("inf")
        found: dict[float, Tensor] = {}  # V, or in the dual form the coefficients that it is made of: the last one tried

        def norm(mu: float) -> float:
            found.clear()
            if self.targets is not None and self.prior is None:
                found[mu] = linalg.dual_coefficients(self.targets, self.square, self.mu + mu)
                return linalg.dual_norm(found[mu], self.targets, self.mu + mu)
            found[mu] = self.minimiser(mu)
            return float(found[mu].norm())

        energy = float(self.square.trace()) / self.right.shape[1] + self.mu
        root = linalg.secular_root(norm, multiplier, start=min(1.0, multiplier / size) * energy)
        return found[root].T @ self.rows if self.rows is not None and self.prior is None else found[root], root

    def least(self, minimiser: Tensor, extra: float = 0.0) -> float:
        """q at what `minimiser(extra)` returned."""
        return self.constant - float((self.right * minimiser).sum()) - (extra * float(minimiser.square().sum()) if minimiser.any() else 0.0)

    def value_and_gradient(self, v: Tensor) -> tuple[float, Tensor]:
        """q(D) and its gradient 2 (V A - R), (k, in)."""
        product = self.mu * v + (v @ self.square if self.rows is None else (v @ self.rows.T) @ self.rows)
        return self.constant + float(((product - 2 * self.right) * v).sum()), 2 * (product - self.right)

    def metric(self) -> Tensor:
        """S + N w G_0 + mu I (in, in): the curvature that `refine` preconditions with."""
        metric = self.square.clone() if self.rows is None else linalg.gram(self.rows)
        metric.diagonal().add_(self.mu)
        return metric


class _Sums:
    """The rows of all moments in one piece, or (not `dual`) the sum of their Grams, for which rows wait until they fill one.

    Siblings share them: no one may write into what they give.
    """

    def __init__(self, width: int, *, dual: bool) -> None:
        self.width, self.dual = width, dual
        self.traces: list[float] = []  # of every part's Gram
        self._loose: list[Tensor] = []
        self._square: Tensor | None = None
        self._kernel: Tensor | None = None
        self._complete = False

    @staticmethod
    def of(problem: LayerProblem, parts: Sequence[tuple[Moments, float]]) -> _Sums:
        """Those of `parts`, moments with their shares: made by a sibling, or still to be gone `over`."""
        seen = [moments for moments, _ in parts]
        made = problem.siblings.of(seen)
        what = ("sums", *(share for _, share in parts))
        if what not in made:
            dual = sum(moments.kept for moments in seen) < problem.width and all(moments.few for moments in seen)
            made[what] = _Sums(problem.width, dual=dual)
        found: _Sums = made[what]
        return found

    def over(self, parts: Sequence[tuple[Moments, float]]) -> Iterator[tuple[Moments, float]]:
        """`parts`, one at a time in memory, for they may be on disk; added up while somebody sees them for the first time."""
        if not self._complete:
            self.traces, self._loose, self._square = [], [], None
        for moments, share in parts:
            seen = moments.loaded()
            if not self._complete:
                self._add(seen.scaled(share))
            yield seen, share
        self._complete = True

    def rows(self) -> Tensor:
        if len(self._loose) != 1:
            self._loose = [torch.cat([torch.zeros(0, self.width, dtype=torch.float64), *self._loose])]
        return self._loose[0]

    def kernel(self) -> Tensor:
        """X X^T of the rows."""
        if self._kernel is None:
            self._kernel = linalg.gram(self.rows().T)
        return self._kernel

    def square(self) -> Tensor:
        if self._loose or self._square is None:
            self._fold(linalg.gram(self.rows()))
            self._loose.clear()
        assert self._square is not None
        return self._square

    def _add(self, moments: Moments) -> None:
        self.traces.append(_trace(moments))
        if moments.rows is not None:
            self._loose.append(moments.rows)
            if not self.dual and sum(map(len, self._loose)) >= self.width:
                self._fold(linalg.gram(self.rows()))
                self._loose.clear()
        else:
            self._fold(moments.gram())

    def _fold(self, square: Tensor) -> None:  # `square` is ours: `scaled` and `gram` make new ones
        self._square = square if self._square is None else self._square.add_(square)


def _balanced(problem: LayerProblem, fit: list[Moments], shares: list[float]) -> list[float]:
    """Shares under which every adapter's own action counts alike, with the same trace of S. Without an action: the mean factor."""
    energies = []
    for (up, down), moments in zip(problem.factors, fit, strict=True):
        energies.append(float(((up.T @ up) * moments.inner(down)).sum()) / max(moments.count, 1))
    factors = [1 / energy if energy > 0 else 0.0 for energy in energies]
    acting = [factor for factor in factors if factor > 0]
    if not acting:
        return shares
    factors = [factor or sum(acting) / len(acting) for factor in factors]
    traces = [share * _trace(moments) for share, moments in zip(shares, fit, strict=True)]
    level = sum(traces) / sum(factor * trace for factor, trace in zip(factors, traces, strict=True))
    return [share * factor * level for share, factor in zip(shares, factors, strict=True)]


def _trace(moments: Moments) -> float:
    return float(rows.square().sum() if (rows := moments.rows) is not None else moments.gram().trace())


def _times_gram(down: Tensor, moments: Moments) -> Tensor:
    return (down @ rows.T) @ rows if (rows := moments.rows) is not None else down @ moments.gram()


def _preserve(problem: LayerProblem, preservation: float, normalise: bool) -> tuple[Moments, float]:
    """The moments of concept-free prompts, and their share."""
    kept = None if problem.statistics is None else problem.statistics.preserve
    if kept is None or kept.count == 0:
        raise MergeError(f"{problem.layer}: no preservation statistics; collect some concept-free prompts, or set preservation=0")
    return kept, preservation / (kept.count if normalise else 1)
