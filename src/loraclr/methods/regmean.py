"""RegMean on deltas: the least-squares merge from Grams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from loraclr import linalg
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.methods.quadratic import Quadratic


@dataclass(frozen=True)
class Regmean(Checked):
    """D = (sum_i w_i D_i H_i)(sum_i H_i)^-1, H_i = G_i with its off-diagonal entries multiplied by `off_diagonal`.

    With 1 it is the exact least-squares merge, min sum_i ||X_i (D - w_i D_i)^T||^2, of least norm where rows are few: the optimum that
    `gradient-fusion` descends to. Less than 1 makes the Grams invertible, as published. Grams are sums over rows: longer prompts count
    more. An adapter without this layer has the target "no change" on its own features. Rank at most sum_i r_i.
    """

    off_diagonal: Annotated[float, Option("factor on the Grams' off-diagonal entries", 0, 1)] = 0.9

    name: ClassVar[str] = "regmean"
    summary: ClassVar[str] = "least-squares merge in closed form, without ridge or preservation"
    when: ClassVar[str] = "a baseline that looks at features; `loraclr` is the same with what keeps ordinary pictures as they were"
    reference: ClassVar[str] = "Jin et al. 2023, arXiv 2212.09849"
    needs: ClassVar[frozenset[str]] = frozenset({"statistics"})

    def solve(self, problem: LayerProblem) -> LayerSolution:
        if self.off_diagonal == 1:
            quadratic = Quadratic.of(problem)
            return LayerSolution.of_factors(quadratic.up, quadratic.minimiser(), status="optimal")
        ups, downs = zip(*problem.factors, strict=True)
        total, blocks = torch.zeros(problem.width, problem.width, dtype=torch.float64), []
        for down, moments in zip(downs, problem.moments(), strict=True):
            gram = moments.gram()
            seen = self.off_diagonal * gram + torch.diag((1 - self.off_diagonal) * gram.diagonal())
            total += seen
            blocks.append(down @ seen)
        return LayerSolution.of_factors(torch.cat(ups, 1), linalg.ridge_solve(torch.cat(blocks), total, 0.0), status="optimal")
