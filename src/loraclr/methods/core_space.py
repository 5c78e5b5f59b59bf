"""Core Space: all deltas as small cores between two common bases, merged there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.methods.iso_c import levelled
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.methods.sparse import Election, agreeing_mean, keep_largest


@dataclass(frozen=True)
class CoreSpace(Checked):
    """D = scale * U M V^T: w_i D_i = U M_i V^T exactly, U and V the left singular vectors of all `up` and of all `down` side by side, and M
    is what `rule` makes of the cores M_i, at most sum_i r_i square.

    From the factors alone. `mean` is the `average`, and with `isotropic` it is `iso-c` over N, as neither depends on a basis; nor does
    `tsv`. `ties` does: entries vote where they mean the same pair of directions, and the result stays an ordinary LoRA. As many entries
    are kept as a core has rows, at least: a single adapter of low rank has no more. The authors take `up` and `down` as they are stored;
    here both are first made equally large, U_i S_i^(1/2) and S_i^(1/2) V_i^T, so that a merge depends on deltas alone. Entries of a core
    that are zero up to rounding do not vote. An adapter without this layer neither votes nor counts in the mean of `ties`.
    """

    rule: Annotated[Literal["ties", "mean"], Option("how cores are merged, entry by entry")] = "ties"
    density: Annotated[float, Option("share of each core's entries that `ties` keeps, the largest; one a row at least", 0, 1)] = 0.2
    election: Annotated[Election, Option("for `ties`: the sign of the entries' sum, or that of most of them")] = "total"
    isotropic: Annotated[bool, Option("replace all singular values of the merged core by their mean, as `iso-c` does")] = False
    rank: Annotated[int | None, Option("with `isotropic`: directions that are kept, the largest; None: all", 1)] = None
    scale: Annotated[float, Option("multiplies the whole merge")] = 1.0

    name: ClassVar[str] = "core-space"
    summary: ClassVar[str] = "small cores of the deltas between common bases of all adapters, TIES or a mean on the cores"
    when: ClassVar[str] = "as `knots`, with the directions of both inputs and outputs in common"
    reference: ClassVar[str] = "Panariello et al. 2025, arXiv 2509.17786"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        left, cores, right = cored(problem)
        if self.rule == "mean":
            merged = torch.stack(cores).mean(0)
        else:
            most = max(cores[0].shape)
            share = max(self.density, (most + 0.5) / max(cores[0].numel(), 1))
            merged = agreeing_mean((keep_largest(core, share) for core in cores), self.election)
        up, down, lost = left @ (merged * self.scale), right, 0.0
        if self.isotropic:
            up, down, lost = levelled(up, down, self.rank)
        return LayerSolution.cut(up, down, lost)


def cored(problem: LayerProblem) -> tuple[Tensor, list[Tensor], Tensor]:
    """U (out, k), the cores M_i (k, l) and V^T (l, in) of w_i D_i = U M_i V^T, signs as `linalg.orientation` fixes them."""
    triples = [linalg.thin_svd_of_product(up, down) for up, down in problem.factors]
    ups, downs = [u * s.sqrt() for u, s, _ in triples], [s.sqrt()[:, None] * vh for _, s, vh in triples]
    left, right = _basis(torch.cat(ups, 1)), _basis(torch.cat(downs).T)
    least = torch.finfo(torch.float64).eps * max(problem.out, problem.width) * torch.cat(ups, 1).norm() * torch.cat(downs).norm()
    cores = [(left.T @ up) @ (down @ right) for up, down in zip(ups, downs, strict=True)]
    return left, [core * (core.abs() > least) for core in cores], right.T


def _basis(columns: Tensor) -> Tensor:
    basis = linalg.thin_svd_of_product(columns, torch.eye(columns.shape[1], dtype=torch.float64))[0]
    return basis * linalg.orientation(basis)
