"""The weighted sum of deltas that are first cut to their largest entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.methods.sparse import keep_largest


@dataclass(frozen=True)
class MagnitudePrune(Checked):
    """D = scale * sum_i of the largest entries of w_i D_i, without rescaling.

    An adapter without this layer adds nothing. The result has full rank and is cut in the file.
    """

    density: Annotated[float, Option("share of each delta's entries that is kept, the largest", 0, 1)] = 0.5
    scale: Annotated[float, Option("multiplies the whole sum")] = 1.0

    name: ClassVar[str] = "magnitude-prune"
    summary: ClassVar[str] = "sum of the deltas, each cut to its largest entries"
    when: ClassVar[str] = "a few strong adapters that overshoot as a sum; expect each to weaken"
    reference: ClassVar[str] = "Han et al. 2015, arXiv 1506.02626"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        change = problem.delta(0) * 0
        for index in range(len(problem.concepts)):
            change += keep_largest(problem.delta(index), self.density)
        return LayerSolution(change=change * self.scale)
