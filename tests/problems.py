"""Small merge problems for the tests: paired features with a shared part, low-rank adapters, a base weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraclr.adapter import LoraLayer
from loraclr.methods import LayerProblem
from loraclr.statistics import LayerStats, Moments

NAME = "unet.mid_block.attn2.to_k"


def make_problem(
    concepts: int = 3,
    *,
    out: int = 8,
    width: int = 6,
    rows: int = 20,
    rank: int = 2,
    shared: float = 1.0,
    features: Sequence[Tensor] | None = None,
    layers: Sequence[LoraLayer | None] | None = None,
    weights: Sequence[float] | None = None,
    preserve: int = 30,
    base: Tensor | None = None,
    seed: int = 0,
) -> LayerProblem:
    """All rows of every concept are its paired sample too, so that nothing is approximate."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    common = draw(rows, width) * shared
    seen = [common + draw(rows, width) for _ in range(concepts)] if features is None else list(features)
    drawn = [LoraLayer(NAME, draw(rank, width), draw(out, rank), 0.5) for _ in range(concepts)]
    names = tuple(f"c{index}" for index in range(concepts))
    held_out = {name: Moments.of(draw(rows, width)) for name in names}
    statistics = LayerStats(
        NAME,
        {name: Moments.of(x) for name, x in zip(names, seen, strict=True)},
        held_out,
        Moments.of(draw(preserve, width)) if preserve else None,
        dict(zip(names, seen, strict=True)),
    )
    return LayerProblem(
        NAME,
        (out, width),
        names,
        tuple(drawn if layers is None else layers),
        tuple([1.0] * concepts if weights is None else weights),
        draw(out, width) if base is None else base,
        statistics,
        torch.Generator().manual_seed(0),
    )


def features(problem: LayerProblem) -> list[Tensor]:
    return [problem.statistics.sample[name] for name in problem.concepts]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
