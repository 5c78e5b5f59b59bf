"""DARE, then the election and the mean of TIES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.methods.sparse import Election, agreeing_mean, drop_random, generator_of


@dataclass(frozen=True)
class DareTies(Checked):
    """As `ties`, but each delta is thinned at random and rescaled (`dare-linear`) instead of trimmed to its largest entries.

    An adapter without this layer neither votes nor counts in the mean. The result has full rank and is cut in the file.
    """

    density: Annotated[float, Option("probability that an entry is kept", 0, 1)] = 0.5
    election: Annotated[Election, Option("the sign of the entries' sum, or that of most of them")] = "total"
    scale: Annotated[float, Option("multiplies the mean")] = 1.0

    name: ClassVar[str] = "dare-ties"
    summary: ClassVar[str] = "drops random entries of each delta, rescales the rest, elects signs and averages what agrees"
    when: ClassVar[str] = "to compare with language-model practice; noisier than `ties`"
    reference: ClassVar[str] = "Yu et al. 2024, arXiv 2311.03099; Yadav et al. 2023, arXiv 2306.01708"
    needs: ClassVar[frozenset[str]] = frozenset({"generator"})

    def solve(self, problem: LayerProblem) -> LayerSolution:
        kept = (
            drop_random(problem.delta(index), self.density, generator_of(problem, concept))
            for index, concept in enumerate(problem.concepts)
        )
        return LayerSolution(change=agreeing_mean(kept, self.election) * self.scale)
