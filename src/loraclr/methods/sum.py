"""The weighted sum of the deltas: what loading several LoRAs at once does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class Sum(Checked):
    """D = scale * sum_i w_i D_i, exactly, by stacking the factors: what others call concat or task arithmetic.

    An adapter without this layer adds nothing. Every concept acts at full strength on every other's features, so more than two or
    three overshoot; lower the weights to .6-.8 or the scale.
    """

    scale: Annotated[float, Option("multiplies the whole sum")] = 1.0

    name: ClassVar[str] = "sum"
    summary: ClassVar[str] = "weighted sum of the deltas, as loading all adapters at once"
    when: ClassVar[str] = "two or three adapters of different kinds, such as a person and a style; more overshoot"
    aliases: ClassVar[tuple[str, ...]] = ("concat", "task-arithmetic")
    reference: ClassVar[str] = "Ilharco et al. 2023, arXiv 2212.04089"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        ups, downs = zip(*problem.factors, strict=True)
        return LayerSolution.of_factors(torch.cat(ups, 1), torch.cat(downs) * self.scale)
