"""Task singular vectors (TSV-M): the adapters' singular vectors, turned just so far that no two of them overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from loraclr import linalg
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class Tsv(Checked):
    """D = scale * U' diag(S_1 ... S_N) V'^T, with w_i D_i = U_i S_i V_i^T and U', V' the nearest matrices with orthonormal columns to
    U = [U_1 ... U_N] and V = [V_1 ... V_N].

    From the factors alone. Orthogonal adapters are summed; of what overlaps, copies of one adapter are that adapter once. The paper keeps
    1 / N of each adapter's min(out, in) singular triples, so that N side by side have room, where N are those that change this layer. That
    is the default here, at least one; it cuts nothing of LoRAs of up to that rank, nor does Core Space's TSV. `kept` says another number.
    The receipt's `lost` is of all triples together. Where U has more columns than rows, U' has orthonormal rows. Vectors that are the same
    up to single precision count as one; the least difference beyond that is made a direction of its own: give no two versions of one
    concept. An adapter without this layer adds nothing.
    """

    kept: Annotated[int | None, Option("leading singular triples kept of each adapter; None: min(out, in) / N", 1)] = None
    scale: Annotated[float, Option("multiplies the whole merge")] = 1.0

    name: ClassVar[str] = "tsv"
    summary: ClassVar[str] = "sum of the deltas after their singular vectors are made orthogonal to each other's"
    when: ClassVar[str] = "different concepts whose deltas overlap a little; not versions of one concept"
    aliases: ClassVar[tuple[str, ...]] = ("tsv-m",)
    reference: ClassVar[str] = "Gargiulo et al. 2025, arXiv 2412.00081"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        triples = [linalg.thin_svd_of_product(up, down) for up, down in problem.factors]
        number = sum(len(s) > 0 for _, s, _ in triples)
        kept = self.kept or max(min(problem.out, problem.width) // max(number, 1), 1)
        u = torch.cat([u[:, :kept] for u, _, _ in triples], 1)
        s = torch.cat([s[:kept] for _, s, _ in triples])
        v = torch.cat([vh[:kept] for _, _, vh in triples]).T
        cut = torch.cat([s[kept:] for _, s, _ in triples]).norm()
        lost = float(cut / torch.hypot(cut, s.norm())) if float(cut) else 0.0
        up, down = linalg.orthonormalised(u) * (s * self.scale), linalg.orthonormalised(v).T
        return LayerSolution.cut(up, down, lost)
