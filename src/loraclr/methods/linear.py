"""Factor averaging: wrong, and widespread enough to be reproduced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraclr.adapter import LoraLayer
from loraclr.errors import MergeError
from loraclr.methods.options import Checked
from loraclr.methods.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class Linear(Checked):
    """D = (sum_i sqrt(c_i) B_i)(sum_i sqrt(c_i) A_i), c_i = w_i scale_i; of a negative c_i the sign goes to A_i. PEFT's `linear`.

    Not a merge of the deltas: its terms sqrt(c_i c_j) B_i A_j, i != j, mean nothing, as they change with the way in which a delta is
    split into factors. An adapter without this layer adds nothing. All ranks must be equal, and dense layers have no factors of their
    own: both raise MergeError.
    """

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "adds up the factors instead of their products: wrong but compatible"
    when: ClassVar[str] = "only to reproduce a file that other tools made this way; otherwise `sum` or `svd`"
    reference: ClassVar[str] = "PEFT, add_weighted_adapter(combination_type='linear')"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        present = [(layer, weight) for layer, weight in zip(problem.layers, problem.weights, strict=True) if layer is not None]
        ranks = sorted({layer.rank for layer, _ in present})
        if len(ranks) > 1 or not all(isinstance(layer, LoraLayer) for layer, _ in present):
            seen = f"of ranks {', '.join(map(str, ranks))}" if len(ranks) > 1 else "with a dense one"
            raise MergeError(f"{problem.layer}: adding up factors needs LoRAs of one rank, these are {seen}; use `sum` or `svd`")
        rank = ranks[0] if ranks else 0
        up: Tensor = torch.zeros(problem.out, rank, dtype=torch.float64)
        down: Tensor = torch.zeros(rank, problem.width, dtype=torch.float64)
        for layer, weight in present:
            assert isinstance(layer, LoraLayer)
            size = weight * layer.scale
            up += abs(size) ** 0.5 * layer.up.flatten(1).double()
            down += (abs(size) ** 0.5 if size >= 0 else -(abs(size) ** 0.5)) * layer.down.flatten(1).double()
        return LayerSolution(up, down)
