"""The weighted sum of the deltas, cut to a small rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from loraclr import linalg
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class Svd(Checked):
    """The best rank-r approximation of scale * sum_i w_i D_i in Frobenius norm (Eckart-Young), from the factors alone.

    An adapter without this layer adds nothing. Knows no features: directions that the pictures never use count as much as others.
    """

    rank: Annotated[int | None, Option("rank of the result; None: the largest rank among the adapters", 1)] = None
    scale: Annotated[float, Option("multiplies the whole sum")] = 1.0

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "weighted sum of the deltas, cut to a small rank by SVD"
    when: ClassVar[str] = "as `sum`, where a file of small rank is wanted and no base is at hand"
    reference: ClassVar[str] = "Eckart and Young 1936, doi 10.1007/BF02288367"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        ups, downs = zip(*problem.factors, strict=True)
        rank = self.rank or max(up.shape[1] for up in ups)
        up, down, lost = linalg.truncate(torch.cat(ups, 1), torch.cat(downs) * self.scale, rank)
        advice = f"rank {rank} loses {lost:.0%} of the sum; raise `rank`" if lost > 0.5 else ""
        return LayerSolution.cut(up, down, lost, advice=advice)
