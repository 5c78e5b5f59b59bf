"""How sure a mean over pictures is: bootstrap intervals that know which pictures share a concept, a prompt or a seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.errors import UsageError

DRAWS = 2000
_AT_ONCE = 1 << 22  # weights held in memory


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values with its 95 % interval; NaN without any value."""

    mean: float
    low: float
    high: float
    count: int


def interval(
    values: Tensor, *, factors: Sequence[Sequence[Hashable]] = (), seed: int = 0, draws: int = DRAWS, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean of (n,) values; NaN is no value and is left out.

    Without `factors` every value is drawn by itself, as if all were independent. Each factor says, value by value, which level it
    belongs to (its concept, its prompt, its seed). The levels of each factor are then drawn anew, and a value counts as often as the
    product of its levels' draws: with one factor this is the cluster bootstrap, with several the pigeonhole bootstrap for crossed
    factors (Owen 2007, arXiv 0712.1111), which errs towards wide. A factor with one level adds nothing: twenty pictures of one
    concept say nothing about other concepts. Raises UsageError for factors of another length.
    """
    wrong = [len(factor) for factor in factors if len(factor) != len(values)]
    if wrong or values.ndim != 1 or draws < 1 or not 0 < level < 1:
        raise UsageError(
            f"an interval of values of shape {tuple(values.shape)} with factors of {wrong or 'that'} length, {draws} draws, level {level}; "
            "give (n,) values, n levels per factor, at least one draw and a level between 0 and 1"
        )
    there = ~values.isnan()
    kept = values[there].double()
    if not len(kept):
        return float("nan"), float("nan")
    columns = [_numbered([level for level, use in zip(factor, there.tolist(), strict=True) if use]) for factor in factors]
    columns = columns or [torch.arange(len(kept))]
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _AT_ONCE // len(kept))
    means = torch.cat([_means(kept, columns, min(step, draws - start), generator) for start in range(0, draws, step)])
    tail = (1 - level) / 2
    low, high = torch.nanquantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype))
    return float(low), float(high)


def estimate(values: Tensor, *, factors: Sequence[Sequence[Hashable]] = (), seed: int = 0, draws: int = DRAWS) -> Estimate:
    """The mean of (n,) values, NaN left out, with `interval`."""
    low, high = interval(values, factors=factors, seed=seed, draws=draws)
    return Estimate(float(values.double().nanmean()), low, high, int((~values.isnan()).sum()))


def paired(ours: Tensor, theirs: Tensor, *, factors: Sequence[Sequence[Hashable]] = (), seed: int = 0, draws: int = DRAWS) -> Estimate:
    """The mean of ours - theirs over pictures of the same concept, prompt and seed; a pair that lacks either is left out.

    Much narrower than the difference of two intervals, because what makes a prompt hard makes it hard for both.
    """
    if ours.shape != theirs.shape:
        raise UsageError(f"{len(ours)} values cannot be paired with {len(theirs)}; give both for the same pictures in the same order")
    return estimate(ours - theirs, factors=factors, seed=seed, draws=draws)


def _numbered(levels: Sequence[Hashable]) -> Tensor:
    numbers = {level: number for number, level in enumerate(dict.fromkeys(levels))}
    return torch.tensor([numbers[level] for level in levels])


def _means(values: Tensor, columns: Sequence[Tensor], draws: int, generator: torch.Generator) -> Tensor:
    """(draws,) weighted means; NaN where no value was drawn at all."""
    weights = torch.ones(draws, len(values), dtype=torch.float64)
    for column in columns:
        levels = int(column.max()) + 1
        drawn = torch.randint(levels, (draws, levels), generator=generator)
        counts = torch.zeros(draws, levels, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        weights *= counts[:, column]
    return (weights @ values) / weights.sum(1)
