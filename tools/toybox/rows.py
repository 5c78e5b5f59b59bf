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


def beside(row: Mapping[str, Any], other: Mapping[str, Any], measure: str) -> tuple[float, float]:
    """The means of the other and of the row over the pictures that both have: what `difference` is between."""
    names = [name for name in row["concepts"] if name in other["concepts"]]
    both = [values(one, measure, names) for one in (other, row)]
    seeds = min(one.shape[2] for one in both)
    theirs, ours = (float(one[:, :, :seeds].nanmean()) for one in both)
    return theirs, ours


def difference(row: Mapping[str, Any], other: Mapping[str, Any], measure: str, names: Sequence[str] = ()) -> Estimate:
    """Row minus other, over the pictures that both have, of `names` only."""
    return differences([(row, other, names)], measure)


def differences(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Sequence[str]]], measure: str) -> Estimate:
    """One mean over all pairs of rows; a concept that is in several of them is drawn with all its pictures at once, and so is a prompt."""
    found: list[Tensor] = []
    levels: list[list[Any]] = [[], [], []]
    for row, other, names in pairs:
        chosen = list(names or (name for name in row["concepts"] if name in other["concepts"]))
        ours, theirs = values(row, measure, chosen), values(other, measure, chosen)
        seeds = min(ours.shape[2], theirs.shape[2])
        apart = ours[:, :, :seeds] - theirs[:, :, :seeds]
        concepts, prompts, numbers = factors(apart)
        found.append(apart.flatten())
        for level, more in zip(levels, ([chosen[k] for k in concepts], prompts, numbers), strict=True):
            level.extend(more)
    return estimate(torch.cat(found), factors=levels)


def presence(row: Mapping[str, Any], *, alike: bool = False) -> tuple[Tensor, list[str]]:
    """Of a row of scenes: 1 for every person who is in the own place, else 0, and which scene that is."""
    found, scenes = [], []
    for one in row["rows"]:
        for number, faces in enumerate(one["faces"] if one["alike"] == alike else ()):
            found += [float(face >= one["limit"]) for face in faces]
            scenes += [f"{one['people']}/{number}"] * len(faces)
    return torch.tensor(found, dtype=torch.float64), scenes


def present(row: Mapping[str, Any], *, alike: bool = False) -> Estimate:
    found, scenes = presence(row, alike=alike)
    return estimate(found, factors=[scenes])


def present_apart(row: Mapping[str, Any], other: Mapping[str, Any], *, alike: bool = False) -> Estimate:
    """The same scenes of both."""
    (ours, scenes), (theirs, _) = presence(row, alike=alike), presence(other, alike=alike)
    return paired(ours, theirs, factors=[scenes])


def group_values(row: Mapping[str, Any], kind: str, measure: str) -> tuple[Tensor, list[list[str]]]:
    """Of one kind of concepts in a mixture: the values, and the concept and the prompt of each."""
    told = row["groups"][kind]
    whole = torch.tensor([math.nan if value is None else value for value in told[measure]], dtype=torch.float64)
    return whole, [told["concepts"], told["prompts"]]


def number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def spread(found: Estimate, *, signed: bool = False) -> str:
    told = [f"{value:+.3f}".replace("0.", ".", 1) if signed else number(value) for value in (found.mean, found.low, found.high)]
    return f"{told[0]} ({told[1]} to {told[2]})"


def header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
