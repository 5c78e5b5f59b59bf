"""The mean of the deltas: FedAvg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loraclr.methods.options import Checked
from loraclr.methods.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class Average(Checked):
    """D = (1/N) sum_i w_i D_i, exactly, by stacking the factors.

    An adapter without this layer counts as a change of zero: N concepts always share it. Each concept acts at 1/N of its strength.
    It is the least-squares merge where all concepts see the same features. Use it as a floor, or for versions of one concept.
    """

    name: ClassVar[str] = "average"
    summary: ClassVar[str] = "mean of the deltas (FedAvg): safe and weak, every concept at 1/N"
    when: ClassVar[str] = "as a floor, or for several versions of one concept"
    reference: ClassVar[str] = "McMahan et al. 2017, arXiv 1602.05629"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        ups, downs = zip(*problem.factors, strict=True)
        return LayerSolution.of_factors(torch.cat(ups, 1), torch.cat(downs) / len(problem.concepts))
