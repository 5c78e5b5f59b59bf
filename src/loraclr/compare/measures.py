"""What merges do on every concept's own features: one yardstick for all methods.

A method's own receipt is measured on what it collected: other prompts, and behind its own merged text encoder. Here every stage sees the
concept under its own adapter, so that all methods are measured on the very same features, collected once, one concept at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.adapter import Adapter, DenseLayer, Layer, LoraLayer
from loraclr.collect import Collection, Concept, collect
from loraclr.methods.crosstalk import CrossTalk, inner_products, meeting, residuals_of
from loraclr.pipeline import Pipeline
from loraclr.scratch import Scratch


@dataclass(frozen=True, eq=False)
class Measure:
    """One merge on all concepts' own features. A residual is as in `methods.residuals`; layers that a concept leaves alone have none."""

    fit: Mapping[str, Mapping[str, float]]  # layer -> concept -> residual on the prompts that merges learn from by default
    held_out: Mapping[str, Mapping[str, float]]
    layers: Mapping[str, CrossTalk]

    @property
    def cross_talk(self) -> CrossTalk:
        """Over all layers."""
        first, *others = self.layers.values()
        return sum(others, first)

    def residual(self, kind: str = "held_out", *, concept: str | None = None) -> float:
        """The mean over layers and concepts, or of one concept; NaN without any."""
        by_layer: Mapping[str, Mapping[str, float]] = getattr(self, kind)
        values = [value for row in by_layer.values() for name, value in row.items() if concept in (None, name)]
        return sum(values) / len(values) if values else float("nan")


def measure(
    pipeline: Pipeline,
    concepts: Sequence[Concept],
    merges: Mapping[str, Adapter],
    *,
    settings: Collection | None = None,
    progress: Callable[[str, float], None] | None = None,
    scratch: str | Path | None = None,
) -> dict[str, Measure]:
    """All merges by label. Only inner products are kept of the features; statistics of one concept and stage wait in a scratch file."""
    settings = replace(settings or Collection(), preserve=(), sample=0)
    names = sorted({layer.name for concept in concepts for layer in concept.adapter})
    tables: dict[str, dict[str, list[Tensor]]] = {kind: {name: [] for name in names} for kind in ("fit", "held_out")}
    for index, concept in enumerate(concepts):
        earlier: dict[str, Layer] = {}
        for stage in pipeline.stages(names):
            with Scratch(scratch) as room:
                statistics = collect(pipeline, [concept], stage, settings=settings, merged=earlier, scratch=room)
                for name in stage:
                    shape = pipeline.base_weight(name).flatten(1).shape
                    changes = [_factors(one.adapter.layers.get(name), one.weight, shape) for one in concepts]
                    changes += [_factors(adapter.layers.get(name), 1.0, shape) for adapter in merges.values()]
                    for kind, found in tables.items():
                        seen = getattr(statistics[name], kind)
                        found[name] += inner_products(changes, [seen[concept.name]] if concept.name in seen else [])
            own = {name: layer for name in stage if (layer := concept.adapter.layers.get(name)) is not None}
            earlier |= {name: _weighed(layer, concept.weight) for name, layer in own.items()}
        if progress:
            progress(f"measuring: {concept.name}", (index + 1) / len(concepts))
    called = [concept.name for concept in concepts]
    return {
        label: Measure(
            {name: residuals_of(found, called, place) for name, found in tables["fit"].items()},
            {name: residuals_of(found, called, place) for name, found in tables["held_out"].items()},
            {name: meeting(found, called, place) for name, found in tables["fit"].items()},
        )
        for place, label in enumerate(merges, start=len(concepts))
    }


def _factors(layer: Layer | None, weight: float, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """weight * D as up and down, float64; a dense one beside an identity, which costs nothing."""
    if layer is None:
        return torch.zeros(shape[0], 0, dtype=torch.float64), torch.zeros(0, shape[1], dtype=torch.float64)
    if isinstance(layer, LoraLayer):
        return layer.up.flatten(1).double(), layer.down.flatten(1).double() * (layer.scale * weight)
    return linalg.identity_factors(layer.delta(torch.float64).flatten(1) * weight)


def _weighed(layer: Layer, weight: float) -> Layer:
    if isinstance(layer, LoraLayer):
        return replace(layer, scale=layer.scale * weight)
    return layer if weight == 1 else DenseLayer(layer.name, layer.delta() * weight)
