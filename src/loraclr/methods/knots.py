"""KnOTS: rotate all deltas into one common basis, then TIES there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.methods.sparse import Election, agreeing_mean, keep_largest


@dataclass(frozen=True)
class Knots(Checked):
    """D = scale * U M: [w_1 D_1 ... w_N D_N] = U S [V_1^T ... V_N^T], and M is the TIES mean of the pieces S V_i^T, entry by entry.

    From the factors alone: QR of the stacked `up` and of each `down`, and an SVD of the small core. U has orthonormal columns and D at
    most sum_i r_i of them, so unlike `ties` it is an ordinary LoRA, exactly. With a plain sum of the pieces D would be the weighted
    sum. Singular values that are zero up to rounding are dropped. An adapter without this layer neither votes nor counts in the mean.
    """

    density: Annotated[float, Option("share of each piece's entries that is kept, the largest", 0, 1)] = 0.2
    election: Annotated[Election, Option("the sign of the entries' sum, or that of most of them")] = "total"
    scale: Annotated[float, Option("multiplies the mean")] = 1.0

    name: ClassVar[str] = "knots"
    summary: ClassVar[str] = "aligns the deltas in a joint SVD basis, then TIES on the aligned pieces"
    when: ClassVar[str] = "TIES for LoRAs: their entries can only vote where they mean the same direction"
    reference: ClassVar[str] = "Stoica et al. 2024, arXiv 2410.19735"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        basis, pieces = aligned(problem)
        if not basis.shape[1]:
            return LayerSolution(basis, torch.zeros(0, problem.width, dtype=torch.float64))
        merged = agreeing_mean((keep_largest(piece, self.density) for piece in pieces), self.election)
        return LayerSolution.of_factors(basis, merged * self.scale)


def aligned(problem: LayerProblem) -> tuple[Tensor, list[Tensor]]:
    """U (out, k) with orthonormal columns, and the pieces S V_i^T (k, in) of w_i D_i = U S V_i^T.

    Each column of U has its entry of largest magnitude positive, so that a tie elects the same sign in whatever order.
    """
    ups, downs = zip(*problem.factors, strict=True)
    thin = [torch.linalg.qr(down.T) for down in downs]
    basis, sizes, right = linalg.thin_svd_of_product(torch.cat(ups, 1), linalg.block_diagonal([lower.T for _, lower in thin]))
    signs = linalg.orientation(basis)
    parts = (signs * sizes).T * right
    blocks = torch.split_with_sizes(parts, [lower.shape[0] for _, lower in thin], 1)
    return basis * signs, [block @ left.T for block, (left, _) in zip(blocks, thin, strict=True)]
