"""Custom Diffusion's merge: each concept's own tokens exactly, everything else changed as little as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.adapter import stage_of
from loraclr.errors import MergeError
from loraclr.methods.average import Average
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution

COINCIDE = 1e-4  # relative distance of two rows that are the same text: the begin mark, "photo of a"


@dataclass(frozen=True)
class CustomDiffusion(Checked):
    """Cross-attention keys and values: min ||K D^T||^2 + mu ||D||^2 subject to T_i D^T = T_i (w_i D_i)^T for every concept i.

    K are the rows of concept-free captions, T_i those of concept i's prompts. With C = K^T K + mu I and E the stacked right-hand sides,
    D = E^T (T C^-1 T^T)^+ T C^-1. Rows that two concepts have in common, but not what they want there, bind nobody and are left out.
    More rows than the layer has inputs, or contradictions among them, are met in the sense of least squares. Rank at most sum_i r_i.
    Concepts with nearly the same words make T nearly singular and D large, which the advice says. The published merge has 200 captions
    and next to no ridge; with the few here that hides the change in directions no caption uses, at many times the adapters' size.

    The method knows no other layers. `others` is what becomes of them: the mean of the deltas, or nothing. An adapter without this
    layer is held to no change on its own rows.
    """

    ridge: Annotated[float, Option("mu, in mean diagonals of K^T K: decides what few captions leave open", 0)] = 1e-2
    others: Annotated[
        Literal["average", "none"], Option("layers that are not cross-attention keys and values: their mean, or no change")
    ] = "average"

    name: ClassVar[str] = "custom-diffusion"
    summary: ClassVar[str] = "constrained closed form on keys and values: own words exactly, other captions least changed"
    when: ClassVar[str] = "few concepts with distinct words, adapters of cross-attention keys and values"
    reference: ClassVar[str] = "Kumari et al. 2023, arXiv 2212.04488"
    needs: ClassVar[frozenset[str]] = frozenset({"statistics", "preserve", "short"})

    def solve(self, problem: LayerProblem) -> LayerSolution:
        if stage_of(problem.layer) != "keys":
            if self.others == "average":
                return Average().solve(problem)
            none = torch.zeros(problem.out, 0, dtype=torch.float64), torch.zeros(0, problem.width, dtype=torch.float64)
            return LayerSolution(*none, status="untouched", advice="this method leaves the layer as it is in the base")
        captions = None if problem.statistics is None else problem.statistics.preserve
        if captions is None or captions.count == 0:
            raise MergeError(f"{problem.layer}: no statistics of concept-free captions; collect some preservation prompts")
        ups, downs = zip(*problem.factors, strict=True)
        rows, owner = _rows(problem)
        wanted = torch.cat([(rows[owner == index] @ down.T) @ up.T for index, (up, down) in enumerate(problem.factors)])
        binding = _binding(rows, wanted, owner)
        rows, owner = rows[binding], owner[binding]
        mu = self.ridge * float(captions.gram().trace()) / problem.width
        directions = linalg.ridge_solve(rows, captions.gram(), mu)  # T C^-1
        inner = linalg.block_diagonal([rows[owner == index] @ down.T for index, down in enumerate(downs)])  # E = inner [B_1 ... B_N]^T
        down = inner.T @ torch.linalg.pinv(directions @ rows.T, rtol=linalg.NULL, hermitian=True) @ directions
        up = torch.cat(ups, 1)
        largest = max(float((u @ d).norm()) for u, d in problem.factors)
        growth = float((up @ down).norm()) / largest if largest > 0 else 0.0
        met = float(((rows @ down.T) @ up.T - wanted[binding]).norm() / wanted[binding].norm().clamp(min=1e-300))
        said = []
        if growth > 3:
            said.append(
                f"the delta is {growth:.1f} times the largest adapter's: words too alike or too few captions; raise `ridge`, use `loraclr`"
            )
        if met > 1e-3:
            said.append(f"the constraints contradict each other: {met:.0%} of them is not met")
        return LayerSolution.of_factors(
            up,
            down,
            status="constrained",
            advice="; ".join(said),
            constraints=len(rows),
            left_out=int((~binding).sum()),
            unmet=met,
            growth=growth,
        )


def _rows(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """All concepts' rows (q, in), and whose each is (q,). Where only a Gram was kept, rows with that Gram stand for them."""
    parts = []
    for moments in problem.moments():
        if (rows := moments.rows) is not None:
            parts.append(rows)
        else:
            values, vectors = torch.linalg.eigh(moments.gram())
            parts.append(values.clamp(min=0).sqrt()[:, None] * vectors.T)
    return torch.cat(parts), torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])


def _binding(rows: Tensor, wanted: Tensor, owner: Tensor) -> Tensor:
    """(q,) bool: false for rows that coincide with another concept's row but not in what is wanted there."""
    size = rows.norm(dim=1).mean().clamp(min=1e-300)
    same = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") < COINCIDE * size
    differ = torch.cdist(wanted, wanted, compute_mode="donot_use_mm_for_euclid_dist") > COINCIDE * wanted.norm(dim=1).max()
    binding: Tensor = ~(same & differ & (owner[:, None] != owner)).any(1)
    return binding
