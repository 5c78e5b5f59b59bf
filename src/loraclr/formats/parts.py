"""Tensors gathered by module until each module is complete, and modules that a file has in one piece taken apart and put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraclr.adapter import DenseLayer, Layer, LoraLayer, ProductLayer
from loraclr.errors import FormatError
from loraclr.formats import kinds
from loraclr.formats.base import BaseWeights
from loraclr.formats.kinds import Scale


@dataclass(frozen=True)
class Place:
    """Where a module of a file lies in the model.

    Its output is cut into `of` equal parts, and each of `rows`, (canonical name, begin, end), says which of them are a layer's; a name
    may come more than once, and its parts then follow one another.
    """

    rows: tuple[tuple[str, int, int], ...]
    of: int

    @property
    def name(self) -> str:
        """What errors call it."""
        return " + ".join(dict.fromkeys(name for name, _, _ in self.rows))

    def order(self, out: int) -> dict[str, Tensor]:
        """Layer -> its rows among the `out` of the fused module."""
        if out % self.of:
            raise FormatError(f"{self.name}: {out} output rows cannot be cut into {self.of} equal parts; the file is damaged")
        size, found = out // self.of, dict[str, list[Tensor]]()
        for name, begin, end in self.rows:
            found.setdefault(name, []).append(torch.arange(begin * size, end * size))
        return {name: torch.cat(pieces) for name, pieces in found.items()}


def fused(place: Place, layers: Mapping[str, Layer]) -> Layer:
    """The one layer, called `place.name`, whose pieces `layers` are; rows of layers that are missing do not change. Exact.

    Low-rank pieces with one and the same down share it, others are put side by side. Raises FormatError for pieces of unequal parts.
    """
    share = {name: sum(end - begin for other, begin, end in place.rows if other == name) for name in layers}
    sizes = {layer.shape[0] / share[name] for name, layer in layers.items()}
    shapes = {layer.shape[1:] for layer in layers.values()}
    if len(sizes) > 1 or len(shapes) > 1:
        seen = ", ".join(f"{name} {layer.shape}" for name, layer in layers.items())
        raise FormatError(f"{seen}: are no pieces of one matrix in the original model; write format 'diffusers'")
    out, inner = int(sizes.pop() * place.of), shapes.pop()
    order = place.order(out)
    low = [layer for layer in layers.values() if isinstance(layer, LoraLayer)]
    if len(low) < len(layers):
        change = torch.zeros(out, *inner)
        for name, layer in layers.items():
            change[order[name]] = layer.delta()
        return DenseLayer(place.name, change)
    shared = all(torch.equal(layer.down, low[0].down) for layer in low)
    downs = [low[0].down] if shared else [layer.down for layer in low]
    up, start = torch.zeros(out, sum(len(down) for down in downs), dtype=torch.float64), 0
    for layer in low:
        up[order[layer.name], start : start + layer.rank] = layer.up.flatten(1).double() * layer.scale
        start += 0 if shared else layer.rank
    return LoraLayer(place.name, torch.cat([down.double() for down in downs]), up)


class Parts:
    """`put` every tensor of a file, then take the `layers`."""

    def __init__(self) -> None:
        self._parts: dict[str | Place, dict[str, Tensor]] = {}

    def put(self, place: str | Place, part: str, tensor: Tensor) -> None:
        """`place` is a canonical name, or where the pieces of a fused module go; `part` is one of `kinds.PARTS`."""
        mine = self._parts.setdefault(place, {})
        if part in mine:
            name = place if isinstance(place, str) else place.name
            raise FormatError(f"{name}: two keys give its {part!r}; keep one of the two naming schemes")
        mine[part] = tensor

    def without(self, part: str) -> list[str]:
        """The names of modules that lack this part."""
        return sorted(place if isinstance(place, str) else place.name for place, parts in self._parts.items() if part not in parts)

    def layers(self, scale: Scale, base: BaseWeights | None = None) -> dict[str, Layer]:
        """Every module as its layer or layers; each is a change of `base`, which only some kinds need."""
        found: dict[str, Layer] = {}
        for place, parts in self._parts.items():
            for layer in _layers(place, parts, scale, base):
                if layer.name in found:
                    raise FormatError(f"{layer.name}: two modules of the file give it; keep one of the two naming schemes")
                found[layer.name] = layer
        return found


def _layers(place: str | Place, parts: dict[str, Tensor], scale: Scale, base: BaseWeights | None) -> list[Layer]:
    if isinstance(place, str):
        return [kinds.build(place, parts, scale, None if base is None else lambda: base.base_weight(place))]
    fused = kinds.build(place.name, parts, scale, None if base is None else lambda: _fused_weight(place, base))
    return [_taken(fused, name, rows) for name, rows in place.order(fused.shape[0]).items()]


def _fused_weight(place: Place, base: BaseWeights) -> Tensor:
    weights = {name: base.base_weight(name).detach().cpu() for name, _, _ in place.rows}
    whole = torch.cat(list(weights.values()))
    fused = torch.empty_like(whole)
    for name, rows in place.order(len(whole)).items():
        fused[rows] = weights[name]
    return fused


def _taken(fused: Layer, name: str, rows: Tensor) -> Layer:
    """The layer that has these rows of a fused one: its own up, the shared down.

    Rank columns that are zero in these rows are left out: trainers that keep queries, keys and values apart store the three side by side.
    """
    if isinstance(fused, LoraLayer):
        up = fused.up[rows]
        used = up.flatten(2).ne(0).any(dim=2).any(dim=0) if up.ndim == 4 else up.ne(0).any(dim=0)
        if not used.any():
            used[0] = True
        return LoraLayer(name, fused.down[used], up[:, used], fused.scale)
    if isinstance(fused, ProductLayer):
        shape = (len(rows), *fused.shape[1:])
        return ProductLayer(name, shape, lambda dtype: fused.delta(dtype)[rows])
    assert isinstance(fused, DenseLayer)
    return DenseLayer(name, fused.change[rows])
