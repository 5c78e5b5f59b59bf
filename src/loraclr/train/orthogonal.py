"""Orthogonal Adaptation: adapters that may be summed, because each listens to directions that no other listens to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from loraclr.adapter import Adapter, LoraLayer
from loraclr.methods.options import Option
from loraclr.train.edlora import TOYBOX_TOKENS, EdLora
from loraclr.train.lora import Alpha, Rank, TextAlpha, TextRank
from loraclr.train.recipe import TOYBOX
from loraclr.train.student import Student, text_attention, unet_attention

_HALVED = 0.5  # the released trainer divides the rows by 2
_BASIS_SEED = 2312_02432  # everybody's: two trainings are orthogonal only in the same basis


class SharedRowsWarning(UserWarning):
    """Two adapters of Orthogonal Adaptation listen to the same directions."""


@dataclass(frozen=True)
class Orthogonal(EdLora):
    """ED-LoRA with frozen downs: rows of one orthogonal matrix per width, which adapters to be merged by summing must not share.

    Orthogonal Adaptation (arXiv 2312.02432). The released trainer draws the rows at random, and random rows collide (rank 32 of 320: 3
    shared rows on average). So here rows come in blocks by `index`: give every concept its own number, and nothing is shared as long
    as (index + 1) * rank is at most the width; beyond that rows are random, with a warning. `rows=random` is the released way,
    `rows=gaussian` random directions instead of rows of the basis.
    """

    name: ClassVar[str] = "orthogonal"
    summary: ClassVar[str] = "Orthogonal Adaptation: ED-LoRA with frozen downs, disjoint by concept index"
    reference: ClassVar[str] = "Orthogonal Adaptation, arXiv 2312.02432"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType(
        {"toybox": {**TOYBOX, **TOYBOX_TOKENS, "rank": 4, "alpha": 4.0, "text_rank": 4, "text_alpha": 4.0, "lr": 3e-3}}
    )

    rank: Rank = 32
    alpha: Alpha = 32.0
    text_rank: TextRank = 32
    text_alpha: TextAlpha = 32.0
    index: Annotated[int, Option("the concept's number, from 0; every concept that will be merged needs its own", 0)] = 0
    rows: Annotated[Literal["blocks", "random", "gaussian"], Option("how the frozen downs are chosen")] = "blocks"

    def attach_loras(self, student: Student) -> None:
        parts = [(unet_attention(student.pipeline), self.rank, self.alpha, self.lr)]
        if self.text_rank:
            parts.append((text_attention(student.pipeline), self.text_rank, self.text_alpha, self.text_lr))
        for names, rank, alpha, lr in parts:
            widths = {name: student.pipeline.base_weight(name).shape[1] for name in names}
            if self.rows == "blocks" and (small := sorted({width for width in widths.values() if (self.index + 1) * rank > width})):
                warnings.warn(
                    f"index {self.index} at rank {rank} is beyond layers of width {', '.join(map(str, small))}, which hold "
                    f"{small[0] // rank} concepts: their rows are drawn at random and may collide; lower the rank or the index",
                    SharedRowsWarning,
                    stacklevel=2,
                )
            downs = {name: self.down(width, rank, student.generator) for name, width in widths.items()}
            student.add_lora(names, rank=rank, alpha=alpha, lr=lr, downs=downs)

    def down(self, width: int, rank: int, generator: torch.Generator) -> Tensor:
        """(rank, width): the frozen rows of one layer, orthogonal and of length 1/2 (gaussian: on average)."""
        if self.rows == "gaussian":
            return torch.randn(rank, width, generator=generator) * (_HALVED / math.sqrt(width))
        first = self.index * rank
        block = self.rows == "blocks" and first + rank <= width
        chosen = torch.arange(first, first + rank) if block else torch.randperm(width, generator=generator)[:rank]
        rows: Tensor = basis(width)[chosen]
        return rows.float() * _HALVED


@cache
def basis(width: int) -> Tensor:
    """(width, width) float64, orthogonal: the Q of a seeded Gaussian matrix, signs fixed so that every machine has the same."""
    generator = torch.Generator().manual_seed(_BASIS_SEED + width)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    turned: Tensor = q * r.diagonal().sign()
    return turned


def shared_rows(first: Adapter, second: Adapter) -> dict[str, float]:
    """Layer -> how many directions both adapters listen to: ||Qa Qb^T||_F^2 of orthonormal bases of their downs' rows.

    From 0 (orthogonal) to the smaller rank (one within the other); random ones share rank^2 / in on average. Only layers that both
    have as a LoRA are there.
    """
    found = {}
    for name in sorted(first.layers.keys() & second.layers.keys()):
        pair = first.layers[name], second.layers[name]
        if all(isinstance(layer, LoraLayer) for layer in pair):
            one, other = (torch.linalg.qr(layer.down.flatten(1).double().T)[0] for layer in pair if isinstance(layer, LoraLayer))
            found[name] = float((one.T @ other).square().sum())
    return found


def warn_of_shared_rows(adapter: Adapter, others: Sequence[Adapter]) -> None:
    """A SharedRowsWarning for every one of `others` with which `adapter` shares half a direction or more in some layer."""
    for other in others:
        if hit := {name: count for name, count in shared_rows(adapter, other).items() if count >= 0.5}:
            worst = max(hit, key=lambda name: hit[name])
            warnings.warn(
                f"{adapter.name} and {other.name} share directions in {len(hit)} layers ({worst}: {hit[worst]:.1f}), so that their sum "
                "mixes them; train one again with another index",
                SharedRowsWarning,
                stacklevel=2,
            )
