"""TIES: trim each delta, elect a sign for every entry, average what agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.methods.sparse import Election, agreeing_mean, keep_largest


@dataclass(frozen=True)
class Ties(Checked):
    """D = scale * the mean, per entry, of those largest entries of the w_i D_i that have the elected sign.

    Each layer keeps its own share of entries (the paper trims over the whole model, PEFT per layer as here). Weights count in the
    election, as a stronger adapter's delta would. An adapter without this layer neither votes nor counts in the mean. The result has
    full rank, whatever the adapters' ranks: in the file it is cut to the sum of them, and the receipt says at what cost.
    """

    density: Annotated[float, Option("share of each delta's entries that is kept, the largest", 0, 1)] = 0.2
    election: Annotated[Election, Option("the sign of the entries' sum, or that of most of them")] = "total"
    scale: Annotated[float, Option("multiplies the mean")] = 1.0

    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "trims each delta to its largest entries, elects a sign per entry and averages what agrees"
    when: ClassVar[str] = "adapters of related tasks whose deltas contradict each other in sign; random low-rank deltas have no such signs"
    reference: ClassVar[str] = "Yadav et al. 2023, arXiv 2306.01708"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        kept = (keep_largest(problem.delta(index), self.density) for index in range(len(problem.concepts)))
        return LayerSolution(change=agreeing_mean(kept, self.election) * self.scale)
