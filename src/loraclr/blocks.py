"""Weights by block of the UNet ("LBW"): how strongly an adapter acts in each, known from 17 numbers for Stable Diffusion 1.

The numbers are BASE and then one for each attention block of the UNet in the order down, mid, up. For Stable Diffusion 1 that is
BASE, IN01, IN02, IN04, IN05, IN07, IN08, MID, OUT03 ... OUT11. The blocks are those of the base model where one is given; otherwise
Stable Diffusion 1's for 17 numbers, and for another count those that the adapters change.

What is not an attention block takes the number of the last one before it in the same order (of the first, where none is before it): so
do the convolutions and resamplers of a block. BASE is for text encoders and for what belongs to no block.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loraclr.adapter import Adapter, DenseLayer, Layer, ProductLayer
from loraclr.errors import UsageError

Place = tuple[int, int, int]  # 0 down, 1 mid, 2 up; block; position in it

_LAST = 1 << 30  # resamplers stand behind everything else of their block
_PATH = re.compile(r"(?:unet\.)?(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)\.|(?:unet\.)?(mid_block)\.")
SD1 = tuple(
    [(0, block, index) for block in range(3) for index in range(2)]
    + [(1, 0, 0)]
    + [(2, block, index) for block in range(1, 4) for index in range(3)]
)


def place(name: str) -> Place | None:
    """Where in the UNet a layer or module stands; None outside its blocks."""
    match = _PATH.match(name)
    if match is None:
        return None
    side, block, kind, index, middle = match.groups()
    if middle:
        return 1, 0, 0
    return (0 if side == "down" else 2), int(block), _LAST if kind.endswith("samplers") else int(index)


def attention_places(names: Iterable[str]) -> tuple[Place, ...]:
    """The attention blocks among layer names or module paths, in order."""
    found = {at for name in names if ".attentions." in name and (at := place(name)) is not None}
    return tuple(sorted(found))


def multipliers(names: Iterable[str], numbers: Sequence[float], blocks: Sequence[Place]) -> dict[str, float]:
    """Each layer's multiplier. `numbers` is BASE and then one for each of `blocks`."""
    found = {}
    for name in names:
        at = place(name)
        found[name] = numbers[0] if at is None else numbers[1 + max(bisect_right(blocks, at) - 1, 0)]
    return found


def weighted(
    adapters: Sequence[Adapter], numbers: Mapping[str, Sequence[float]], cross_attention: Sequence[str] | None = None
) -> list[Adapter]:
    """The adapters with every layer's change multiplied by its block's number; those that `numbers` does not name as they are.

    `cross_attention` are the paths of the base's cross-attention modules. Raises UsageError with all that does not fit.
    """
    known = [adapter.name for adapter in adapters]
    wrong = [f"block weights were given for {name!r}, but the adapters are {', '.join(known)}" for name in numbers if name not in known]
    changed = []
    for adapter in adapters:
        own = numbers.get(adapter.name)
        if own is None:
            changed.append(adapter)
            continue
        blocks = _blocks(adapters, len(own), cross_attention)
        if len(own) != 1 + len(blocks):
            wrong.append(
                f"{adapter.name} has {len(own)} block weights; {1 + len(blocks)} are needed, BASE and one for each of the "
                f"{len(blocks)} attention blocks of {'the base' if cross_attention is not None else 'the adapters'}"
            )
            continue
        factors = multipliers(adapter.layers, own, blocks)
        changed.append(adapter.with_(layers={name: _times(layer, factors[name]) for name, layer in adapter.layers.items()}))
    if wrong:
        raise UsageError("; ".join(wrong))
    return changed


def _blocks(adapters: Sequence[Adapter], count: int, cross_attention: Sequence[str] | None) -> tuple[Place, ...]:
    if cross_attention is not None:
        return attention_places(cross_attention)
    found = attention_places(name for adapter in adapters for name in adapter.layers)
    return SD1 if count == 1 + len(SD1) and set(found) <= set(SD1) else found


def _times(layer: Layer, factor: float) -> Layer:
    if isinstance(layer, ProductLayer):
        return ProductLayer(layer.name, layer.shape, lambda dtype: layer.delta(dtype) * factor)
    if isinstance(layer, DenseLayer):
        return replace(layer, change=layer.change * factor)
    return replace(layer, scale=layer.scale * factor)
