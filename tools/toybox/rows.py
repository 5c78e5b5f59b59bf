"""Rows of evidence: their values, means and differences with intervals, and how these are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraclr.evaluate import Estimate, estimate, paired

Known = Mapping[str, Mapping[str, Any]]
SHOWN = ("text", "image", "identity", "attributes")
OWN = "own adapters, a style's added"  # what the other rows of the mixture are compared with


def values(row: Mapping[str, Any], measure: str, names: Sequence[str] = ()) -> Tensor:
    """(concepts, prompts, seeds) values of a row, NaN where there is none; of `names` only."""
    whole = torch.tensor([math.nan if value is None else value for value in row["values"][measure]], dtype=torch.float64)
    shaped = whole.view(len(row["concepts"]), row["prompts"], row["seeds"])
    return shaped[[row["concepts"].index(name) for name in names]] if names else shaped


def factors(shaped: Tensor) -> list[list[int]]:
    """Concept, prompt and seed of each value, all three drawn anew by intervals."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in shaped.shape))
    return [column.tolist() for column in places.view(-1, 3).unbind(1)]


def mean_of(row: Mapping[str, Any], measure: str) -> Estimate:
    shaped = values(row, measure)
    return estimate(shaped.flatten(), factors=factors(shaped))


def difference(row: Mapping[str, Any], alone: Mapping[str, Any], measure: str) -> Estimate:
    """Merged minus alone, over the pictures that both have."""
    ours, theirs = values(row, measure), values(alone, measure, row["concepts"])
    seeds = min(ours.shape[2], theirs.shape[2])
    ours, theirs = ours[:, :, :seeds], theirs[:, :, :seeds]
    return paired(ours.flatten(), theirs.flatten(), factors=factors(ours))


def number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def spread(found: Estimate, *, signed: bool = False) -> str:
    told = [f"{value:+.3f}".replace("0.", ".", 1) if signed else number(value) for value in (found.mean, found.low, found.high)]
    return f"{told[0]} ({told[1]} to {told[2]})"


def header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def lost(row: Mapping[str, Any], alone: Mapping[str, Any], measure: str, names: Sequence[str]) -> float:
    return float(values(row, measure, names).nanmean() - values(alone, measure, names).nanmean())
