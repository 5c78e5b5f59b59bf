"""How concepts meet in a merge: strength and cross-talk, from Grams alone and without a picture.

On the features X_i of concept i, inner products of what changes do, tr(D_k G_i D_l^T), hold all of it. Layers of different size are made
comparable by dividing concept i's products by tr(D_i G_i D_i^T); then layers add up, and the total is one fit over all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.methods.problem import LayerProblem
from loraclr.statistics import Moments


@dataclass(frozen=True, eq=False)
class CrossTalk:
    """Of one layer, or, added up, of many. Row i is on the features of concept i; without an action of its own there it is NaN."""

    concepts: tuple[str, ...]
    among: Tensor  # (N, N, N): [i, k, l] = tr(D_k G_i D_l^T) / tr(D_i G_i D_i^T), summed over layers
    merged: Tensor  # (N, N): [i, k] = tr(D G_i D_k^T) / tr(D_i G_i D_i^T), likewise

    def __add__(self, other: CrossTalk) -> CrossTalk:
        return CrossTalk(self.concepts, self.among + other.among, self.merged + other.merged)

    @property
    def acting(self) -> Tensor:
        """(N,): whether the concept changes anything at all."""
        return self.among.diagonal(dim1=1, dim2=2).diagonal() > 0

    @property
    def before(self) -> Tensor:
        """(N, N): ||X_i D_k^T|| / ||X_i D_i^T||, how loud the adapter of k is on concept i, beside its own; 1 on the diagonal."""
        loud = self.among.diagonal(dim1=1, dim2=2).clamp(min=0)
        return (loud / loud.diagonal()[:, None]).sqrt().where(self.acting[:, None], torch.nan)

    @property
    def after(self) -> Tensor:
        """(N, N): joint least-squares coefficients of X_i D^T on all X_i D_k^T. The diagonal is each concept's strength.

        Projecting pair by pair would invent cross-talk where adapters are alike. Of coefficients that no features tell apart, the least.
        """
        rows = [torch.linalg.pinv(a, hermitian=True) @ b for a, b in zip(self.among, self.merged, strict=True)]
        return torch.stack(rows).where(self.acting[:, None], torch.nan)

    @property
    def heard(self) -> Tensor:
        """(N, N): |after| * before, how loud k still is on concept i in the merge; the strength on the diagonal."""
        return self.after.abs() * self.before

    def tables(self) -> dict[str, list[list[float]]]:
        """`before` and `after`, row by row."""
        return {"before": self.before.tolist(), "after": self.after.tolist()}

    def report(self) -> dict[str, object]:
        """All of it, for a receipt."""
        return {**self.summary(), "concepts": self.concepts, "tables": self.tables()}

    def summary(self) -> dict[str, float]:
        """Means: `strength` over the diagonal of `after`, `before` and `after` over what others are heard of `before` and `heard`."""
        off = ~torch.eye(len(self.concepts), dtype=torch.bool)
        return {
            "strength": float(self.after.diagonal().nanmean()),
            "before": float(self.before[off].nanmean()),
            "after": float(self.heard[off].nanmean()),
        }


def inner_products(changes: Sequence[tuple[Tensor, Tensor]], seen: Iterable[Moments | None]) -> list[Tensor]:
    """One (n, n), float64, for each G of `seen`: tr(D_k G D_l^T) for D_k = up_k @ down_k, ups (out, r_k), downs (r_k, in).

    No D is multiplied out. Without moments tr(D_k D_l^T), of the weights themselves.
    """
    ups, downs = torch.cat([up for up, _ in changes], 1), torch.cat([down for _, down in changes])
    among = ups.T @ ups
    sizes = [up.shape[1] for up, _ in changes]
    owner = torch.repeat_interleave(torch.arange(len(changes)), torch.tensor(sizes))
    tables = []
    for moments in seen:
        products = (downs @ downs.T if moments is None else moments.inner(downs)).mul_(among)
        half = torch.stack([part.sum(0) for part in torch.split_with_sizes(products, sizes)])
        tables.append(half.new_zeros(len(changes), len(changes)).index_add_(1, owner, half))
    return tables


def meeting(tables: Sequence[Tensor], concepts: Sequence[str], merged: int) -> CrossTalk:
    """Of `inner_products` of [D_1 ... D_N, and merged changes], one table per concept's features; `merged` is which of the changes is D."""
    number = len(concepts)
    among, mixed = torch.zeros(number, number, number, dtype=torch.float64), torch.zeros(number, number, dtype=torch.float64)
    for i, table in enumerate(tables):
        if float(table[i, i]) > 0:
            among[i], mixed[i] = table[:number, :number] / table[i, i], table[:number, merged] / table[i, i]
    return CrossTalk(tuple(concepts), among, mixed)


def residuals_of(tables: Sequence[Tensor], concepts: Sequence[str], merged: int) -> dict[str, float]:
    """||X_i (D - D_i)^T|| / ||X_i D_i^T|| of each concept that acts, from the same tables."""
    found = {}
    for i, (concept, table) in enumerate(zip(concepts, tables, strict=False)):
        if (own := float(table[i, i])) > 0:
            found[concept] = (max(float(table[merged, merged] - 2 * table[merged, i]) + own, 0.0) / own) ** 0.5
    return found


def tables_of(problem: LayerProblem, up: Tensor, down: Tensor) -> list[Tensor]:
    """`inner_products` of all concepts' changes and the merged one, up (out, k) @ down (k, in), on what each concept's layer saw."""
    return inner_products([*problem.factors, (up.double(), down.double())], problem.moments())


def cross_talk(problem: LayerProblem, up: Tensor, down: Tensor) -> CrossTalk:
    """Of the merged change up @ down, (out, k) and (k, in), on the features that `problem` was collected on."""
    return meeting(tables_of(problem, up, down), problem.concepts, len(problem.concepts))
