"""What TIES, DARE, KnOTS and pruning do entry by entry: keep a part of each delta, and let the entries vote on their signs.

The result of each equals that of `peft.utils.merge_utils` on the same deltas (tests/test_methods_practice.py). It is written out
here because that module costs an optional dependency and seconds of import, draws from the global random state, and holds every
delta several times over; here one delta is in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from loraclr.methods.problem import LayerProblem

Election = Literal["total", "frequency"]


def keep_largest(values: Tensor, density: float) -> Tensor:
    """The int(density * n) entries of largest magnitude, the others set to 0. Entries that tie with the last one kept stay too."""
    kept = int(density * values.numel())
    if kept >= values.numel():
        return values
    if kept == 0:
        return torch.zeros_like(values)
    sizes = values.abs()
    least = sizes.flatten().kthvalue(values.numel() - kept + 1).values
    return values * (sizes >= least)


def drop_random(values: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry is kept with probability `density` and then divided by it, so that the mean over seeds is `values`."""
    if density >= 1:
        return values
    if density == 0:
        return torch.zeros_like(values)
    kept = torch.rand(values.shape, generator=generator) < density
    return values * kept / density


def generator_of(problem: LayerProblem, concept: str) -> torch.Generator:
    """A generator of this layer and concept alone: neither the order of concepts nor earlier draws change what it gives."""
    seed = 0 if problem.generator is None else problem.generator.initial_seed()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{concept}".encode()).digest()[:7], "big"))


def agreeing_mean(values: Iterable[Tensor], election: Election) -> Tensor:
    """Per entry the mean of the values with the elected sign; zeros neither vote nor count, and a tie elects +.

    "total" elects the sign of the sum (TIES), "frequency" that of the majority.
    """
    above = below = ups = downs = torch.zeros((), dtype=torch.float64)
    for one in values:
        above, below = above + one.clamp(min=0), below + one.clamp(max=0)
        ups, downs = ups + (one > 0), downs + (one < 0)
    positive = above + below >= 0 if election == "total" else ups >= downs
    return torch.where(positive, above / ups.clamp(min=1), below / downs.clamp(min=1))
