"""Iso-C: the sum of the deltas, with all its directions equally strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class IsoC(Checked):
    """D = scale * mean(s) U V^T, where sum_i w_i D_i = U diag(s) V^T: directions that few adapters share are no weaker than common ones.

    From the factors alone. The paper's changes have full rank, and its mean runs over all min(out, in) singular values. The sum of LoRAs
    has k of them that are not zero up to float64 rounding: the mean is theirs, and nothing is added in other directions, where U and V are
    arbitrary. A direction of noise becomes as strong as all others, so one adapter alone does not come back unless its singular values are
    equal. A smaller rank is cut from the sum before it is levelled, as afterwards no direction comes first; the receipt's `lost` is of that
    sum. An adapter without this layer adds nothing.
    """

    rank: Annotated[int | None, Option("directions of the sum that are kept, the largest; None: all", 1)] = None
    scale: Annotated[float, Option("multiplies the whole merge")] = 1.0

    name: ClassVar[str] = "iso-c"
    summary: ClassVar[str] = "weighted sum of the deltas, all its singular values replaced by their mean"
    when: ClassVar[str] = "adapters that drown in what others share with each other; an adapter alone is changed, too"
    reference: ClassVar[str] = "Marczak et al. 2025, arXiv 2502.04959"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        ups, downs = zip(*problem.factors, strict=True)
        up, down, lost = levelled(torch.cat(ups, 1), torch.cat(downs), self.rank)
        return LayerSolution.cut(up * self.scale, down, lost)


def levelled(up: Tensor, down: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """up @ down as up (out, k) and down (k, in) whose k singular values are all the mean of what they were: those of the best approximation
    of rank `rank`, and how much that lost, 0..1."""
    u, s, vh = linalg.thin_svd_of_product(up, down)
    kept = s[:rank]
    lost = float(s[len(kept) :].norm() / s.norm()) if len(kept) < len(s) else 0.0
    return u[:, : len(kept)] * kept.mean(), vh[: len(kept)], lost
