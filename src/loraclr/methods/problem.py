"""What every merge method is given and what it gives back. One layer at a time, tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.adapter import DenseLayer, Layer
from loraclr.errors import MergeError
from loraclr.statistics import LayerStats, Moments


class Siblings:
    """What layers that were handed the very same rows (queries, keys and values of one attention; all keys and values of one text) need
    but once. It is kept until a layer comes that saw others.
    """

    def __init__(self) -> None:
        self._seen: tuple[Moments, ...] = ()
        self._made: dict[Hashable, Any] = {}

    def of(self, seen: Sequence[Moments]) -> dict[Hashable, Any]:
        """What was made of these very moments so far, to look into and to add to."""
        if len(seen) != len(self._seen) or any(one is not other for one, other in zip(seen, self._seen, strict=True)):
            self._seen, self._made = tuple(seen), {}
        return self._made


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer of N concepts. `layers[i]` is None where concept i does not adapt this layer: its target there is no change."""

    layer: str
    shape: tuple[int, ...]  # of the module's weight: (out, in) or (out, channels, kh, kw)
    concepts: tuple[str, ...]
    layers: tuple[Layer | None, ...]
    weights: tuple[float, ...]  # one per concept
    base: Tensor | None = None  # (out, in), the frozen weight W, flattened
    statistics: LayerStats | None = None
    generator: torch.Generator | None = None
    siblings: Siblings = field(default_factory=Siblings)

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        """Flattened input features."""
        return int(torch.Size(self.shape[1:]).numel())

    def delta(self, index: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """weight_i * D_i, (out, in); zeros where the concept does not adapt this layer."""
        layer = self.layers[index]
        if layer is None:
            return torch.zeros(self.out, self.width, dtype=dtype)
        return layer.delta(dtype).flatten(1) * self.weights[index]

    def deltas(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [self.delta(index, dtype) for index in range(len(self.concepts))]

    @cached_property
    def factors(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """weight_i * D_i as up (out, rank_i) and down (rank_i, in), float64; weight and scale in down; rank 0 where there is no layer."""
        return tuple(map(self._factors, self.layers, self.weights))

    def _factors(self, layer: Layer | None, weight: float) -> tuple[Tensor, Tensor]:
        if layer is None:
            return torch.zeros(self.out, 0, dtype=torch.float64), torch.zeros(0, self.width, dtype=torch.float64)
        if isinstance(layer, DenseLayer):
            up, down = linalg.factor(layer.delta(torch.float64).flatten(1))
            return up, down * weight
        return layer.up.flatten(1).double(), layer.down.flatten(1).double() * (layer.scale * weight)

    def moments(self) -> list[Moments]:
        """What each concept's layer saw, in the order of `concepts`. Raises MergeError where nothing was collected."""
        fit = {} if self.statistics is None else self.statistics.fit
        missing = [concept for concept in self.concepts if concept not in fit or fit[concept].count == 0]
        if missing:
            raise MergeError(f"{self.layer}: no feature rows of {', '.join(missing)}; collect statistics for every adapter of the merge")
        if wrong := {fit[concept].width for concept in self.concepts} - {self.width}:
            raise MergeError(f"{self.layer}: features of width {wrong.pop()} for {self.width} inputs; collect them again on this base")
        return [fit[concept] for concept in self.concepts]

    def sample(self) -> Tensor:
        """The paired rows (concepts, rows, in), float64. Raises MergeError where they are missing or not paired."""
        sample = {} if self.statistics is None else self.statistics.sample
        missing = [concept for concept in self.concepts if concept not in sample or len(sample[concept]) == 0]
        if missing:
            raise MergeError(f"{self.layer}: no paired rows of {', '.join(missing)}; collect a paired sample, or set margin=0")
        counts = [len(sample[concept]) for concept in self.concepts]
        if len(set(counts)) > 1:
            raise MergeError(
                f"{self.layer}: the paired rows are not paired: {counts}; collect all concepts with the same prompts and seeds"
            )
        return torch.stack([sample[concept].double() for concept in self.concepts])

    def rows(self) -> list[Tensor]:
        """All rows (rows_i, in) of each concept, paired or not, float64; the paired ones where no others were kept."""
        if self.statistics is None or not self.statistics.rows:
            return list(self.sample())
        return [self.statistics.rows[concept].double() for concept in self.concepts]

    def weight(self) -> Tensor:
        """The base weight W (out, in), float64. Raises MergeError without one."""
        if self.base is None:
            raise MergeError(f"{self.layer}: outputs need the base weight; give the merge a base model, or set space='delta'")
        return self.base.flatten(1).double()


@dataclass(frozen=True, eq=False)
class Distances:
    """Exact distances of all pairs of concepts under one merged change: Frobenius norms over `rows` paired rows, or `per_row`; float64."""

    found: Tensor  # (N, N): ||Y_i - Yhat_j||, target i and prediction j
    natural: Tensor  # (N, N): ||Y_i - Y_j||
    rows: int

    def per_row(self) -> Distances:
        """Divided by sqrt(rows)."""
        return Distances(self.found / self.rows**0.5, self.natural / self.rows**0.5, self.rows)


@dataclass(frozen=True, eq=False)
class Claim:
    """What a second pass over all rows can settle: the distances in `space` of each of `changes` (up, down), and what follows."""

    space: str  # "output" or "delta"
    changes: tuple[tuple[Tensor, Tensor], ...]
    settle: Callable[[tuple[Distances, ...]], LayerSolution]


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """Either `up` (out, rank) and `down` (rank, in), exact, or a dense `change` (out, in). Flattened; float64 or float32.

    `status` is one word ("optimal", "refined", "regularised", ...), `advice` a sentence when something deserves attention,
    `diagnostics` plain numbers for the receipt. `metric` makes the curvature (in, in) of the method's own objective, in which a cut to
    a smaller rank is then least; without it a cut is made in the mean Gram of the collected rows. A `claim` is what exact distances
    over all rows can settle, `distances` those it was settled by. `lost` is the relative error of what the method itself cut off, 0..1.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    change: Tensor | None = None
    status: str = "ok"
    advice: str = ""
    diagnostics: Mapping[str, float | str | bool] = field(default_factory=dict)
    metric: Callable[[], Tensor] | None = None
    claim: Claim | None = None
    distances: Distances | None = None
    lost: float = 0.0

    def delta(self) -> Tensor:
        """(out, in)."""
        if self.change is not None:
            return self.change
        assert self.up is not None
        assert self.down is not None
        return self.up @ self.down

    @staticmethod
    def cut(up: Tensor, down: Tensor, lost: float, *, advice: str = "") -> LayerSolution:
        """`of_factors` of what a method's own cut left; `lost`, 0..1, is the relative error of that cut."""
        whole = LayerSolution.of_factors(up, down, status="truncated" if lost > 1e-6 else "ok", advice=advice)
        return replace(whole, lost=lost)

    @staticmethod
    def of_factors(up: Tensor, down: Tensor, *, status: str = "ok", advice: str = "", **diagnostics: float | str | bool) -> LayerSolution:
        """Of up (out, k) and down (k, in): as they are, or multiplied out (beside an identity) where k is more than any rank needs."""
        if up.shape[1] > min(up.shape[0], down.shape[1]):
            up, down = linalg.identity_factors(up @ down)
        return LayerSolution(up, down, None, status, advice, diagnostics)


@dataclass(frozen=True, eq=False)
class ModelProblem:
    """All layers of N concepts at once, for methods that judge the whole model. `layers` carry no statistics."""

    concepts: tuple[str, ...]
    layers: Mapping[str, LayerProblem]
    loss: Callable[[Mapping[str, Tensor], int | None], Tensor]  # `Predictions.loss` of deltas (out, in) by layer
    score: Callable[[Mapping[str, Tensor]], float] | None = None  # the user's, of the same; higher is better
    seed: int = 0


NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "base": "the base's weights",
        "statistics": "what each layer saw on each concept's prompts",
        "sample": "paired rows of that",
        "rows": "all rows, on the released code's few prompts",
        "short": "the released code's few unpadded prompts",
        "held_out": "the same on held-out prompts",
        "preserve": "statistics of concept-free prompts",
        "predictions": "the model's noise predictions under each adapter (Stable Diffusion 1 and 2 only)",
        "gaps": "what the merged model misses behind each block, beside each adapter's own run",
        "lockstep": "exact distances between all concepts, from a second pass that runs them side by side",
        "score": "a score of yours, if you have one",
        "generator": "a seed",
    }
)


@runtime_checkable
class LayerMethod(Protocol):
    """A frozen dataclass whose fields are its hyper-parameters."""

    name: ClassVar[str]
    summary: ClassVar[str]  # the idea, in a line
    when: ClassVar[str]  # to use it
    reference: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What these parameters ask for: the keys of `NEEDS`."""

    def solve(self, problem: LayerProblem) -> LayerSolution: ...


@runtime_checkable
class AdapterMethod(Protocol):
    """As LayerMethod, but solves all layers together, by what the whole model does."""

    name: ClassVar[str]
    summary: ClassVar[str]
    when: ClassVar[str]
    reference: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]: ...

    def solve_model(self, problem: ModelProblem) -> dict[str, LayerSolution]:
        """One solution for each of `problem.layers`."""


Method = LayerMethod | AdapterMethod


def residuals(problem: LayerProblem, delta: Tensor | tuple[Tensor, Tensor], kinds: Sequence[str] = ("fit", "held_out")) -> dict[str, float]:
    """||X_i (D - D_i)^T|| / ||X_i D_i^T|| of each concept, for any D (out, in) or its factors: keys `fit/CONCEPT` and `held_out/CONCEPT`.

    0 is the adapter's own behaviour, 1 the base's. Concepts that do not change this layer's outputs have none.
    """
    if problem.statistics is None:
        return {}
    up, down = linalg.identity_factors(delta.double()) if isinstance(delta, Tensor) else (delta[0].double(), delta[1].double())
    rank, square, found = up.shape[1], up.T @ up, {}
    mixed = torch.split_with_sizes(
        up.T @ torch.cat([own for own, _ in problem.factors], 1), [own.shape[1] for own, _ in problem.factors], 1
    )
    for concept, cross, (own_up, own_down) in zip(problem.concepts, mixed, problem.factors, strict=True):
        own, both = own_up.T @ own_up, torch.cat([down, own_down])
        for kind in kinds:
            moments: Mapping[str, Moments] = getattr(problem.statistics, kind)
            if concept not in moments or not own.shape[1]:
                continue
            inner = moments[concept].inner(both)  # of [D, D_i]; what is measured is D - D_i
            if (energy := float((own * inner[rank:, rank:]).sum())) > 0:
                apart = float((square * inner[:rank, :rank]).sum() - 2 * (cross * inner[:rank, rank:]).sum()) + energy
                found[f"{kind}/{concept}"] = (max(apart, 0.0) / energy) ** 0.5
    return found
