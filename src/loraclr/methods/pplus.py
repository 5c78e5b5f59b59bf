"""P+: the union of learned tokens; no weight is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loraclr.errors import MergeError
from loraclr.methods.options import Checked
from loraclr.methods.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class Pplus(Checked):
    """D = 0 in every layer: only the learned tokens go into the merge, which keeps those of all adapters side by side.

    Merging tokens alone costs nothing: each is exactly what it was. An adapter that also changes weights loses that change, and every
    such layer says so in its advice. Adapters without any learned token raise MergeError: nothing would be left of them.
    """

    name: ClassVar[str] = "pplus"
    summary: ClassVar[str] = "the union of learned tokens, weights untouched"
    when: ClassVar[str] = "adapters of learned tokens alone (textual inversion, P+); as the floor of what tokens carry in ED-LoRAs"
    reference: ClassVar[str] = "Voynov et al. 2023, arXiv 2303.09522"
    needs: ClassVar[frozenset[str]] = frozenset()

    def check_tokens(self, tokens: int) -> None:
        if not tokens:
            raise MergeError("pplus merges learned tokens alone, and none of the adapters brings one; use another method")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        owners = [concept for concept, layer in zip(problem.concepts, problem.layers, strict=True) if layer is not None]
        up, down = torch.zeros(problem.out, 0, dtype=torch.float64), torch.zeros(0, problem.width, dtype=torch.float64)
        return LayerSolution(up, down, status="untouched", advice=f"the change by {', '.join(owners)} is left out; only tokens are merged")
