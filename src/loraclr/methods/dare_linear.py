"""DARE with a plain sum: drop entries at random, rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.methods.sparse import drop_random, generator_of


@dataclass(frozen=True)
class DareLinear(Checked):
    """D = scale * sum_i (w_i D_i * mask_i) / density, with independent random masks that keep an entry with probability `density`.

    Its mean over seeds is the weighted sum; one draw is the sum and noise. Masks depend on seed, layer and the concept's name, not on
    the order of the inputs. An adapter without this layer adds nothing. The result has full rank and is cut in the file.
    """

    density: Annotated[float, Option("probability that an entry is kept", 0, 1)] = 0.5
    scale: Annotated[float, Option("multiplies the whole sum")] = 1.0

    name: ClassVar[str] = "dare-linear"
    summary: ClassVar[str] = "drops random entries of each delta, rescales the rest, and sums"
    when: ClassVar[str] = "to compare with language-model practice; on LoRAs it is the sum with noise added"
    reference: ClassVar[str] = "Yu et al. 2024, arXiv 2311.03099"
    needs: ClassVar[frozenset[str]] = frozenset({"generator"})

    def solve(self, problem: LayerProblem) -> LayerSolution:
        change = problem.delta(0) * 0
        for index, concept in enumerate(problem.concepts):
            change += drop_random(problem.delta(index), self.density, generator_of(problem, concept))
        return LayerSolution(change=change * self.scale)
