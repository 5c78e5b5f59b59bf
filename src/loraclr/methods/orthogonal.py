"""Orthogonal Adaptation's merge: the plain sum, of adapters that were trained not to meet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, ClassVar

import torch

from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution

SAME = 1 - 1e-3  # cosine of two rows that are one: half precision keeps it, no two random rows of use reach it


@dataclass(frozen=True)
class Orthogonal(Checked):
    """D = scale * sum_i w_i D_i, after a look at the rows of every `down`.

    Where A_j A_i^T = 0 for all j != i, D A_i^T = scale * w_i D_i A_i^T: each concept acts on its own inputs as it did alone. Training
    draws the rows from one orthogonal matrix, and random draws collide: two adapters with a row in common write to the same inputs,
    which the receipt's advice names. `largest_cosine` is that of the closest inputs of any two, 0 for orthogonal ones and 1 for a
    shared row. An adapter without this layer adds nothing.
    """

    scale: Annotated[float, Option("multiplies the whole sum; released notebooks use 1.5")] = 1.0

    name: ClassVar[str] = "orthogonal"
    summary: ClassVar[str] = "the sum, of adapters trained with orthogonal `down`; names those that share rows"
    when: ClassVar[str] = "adapters trained with `down` frozen to disjoint rows of one orthogonal matrix; for others it is `sum`"
    reference: ClassVar[str] = "Po et al. 2024, arXiv 2312.02432"
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, problem: LayerProblem) -> LayerSolution:
        ups, downs = zip(*problem.factors, strict=True)
        rows = [torch.nn.functional.normalize(down, dim=1) for down in downs]
        spans = [torch.linalg.qr(down.T)[0] for down in downs]
        shared, closest, said = 0, 0.0, []
        for i, j in combinations(range(len(downs)), 2):
            if not (len(rows[i]) and len(rows[j])):
                continue
            same = int(((rows[i] @ rows[j].T).abs() > SAME).any(1).sum())
            closest = max(closest, float(torch.linalg.matrix_norm(spans[i].T @ spans[j], 2)))
            if same:
                shared += same
                said.append(f"{problem.concepts[i]} and {problem.concepts[j]} share {same} rows of `down`")
        remedy = "retrain one with another `--set index=N` (another seed for rows=random), or use `loraclr`"
        advice = f"{'; '.join(said)}: they disturb each other there; {remedy}" if said else ""
        return LayerSolution.of_factors(
            torch.cat(ups, 1),
            torch.cat(downs) * self.scale,
            status="shared" if said else "ok",
            advice=advice,
            shared_rows=shared,
            largest_cosine=closest,
        )
