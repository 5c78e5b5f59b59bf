"""An adapter cut to a rank, for formats and tools that hold low-rank changes alone."""

from __future__ import annotations

import torch

from loraclr import linalg
from loraclr.adapter import Adapter, DenseLayer, Layer, LoraLayer


def reduced(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
    """Every layer at most of rank `rank`, the nearest in the Frobenius norm (Eckart-Young), and how much of each cut one was lost.

    Layers of that rank or less stay as they are. Losses are relative, 0..1, by name.
    """
    layers: list[Layer] = []
    lost: dict[str, float] = {}
    for layer in adapter:
        if not isinstance(layer, DenseLayer) and layer.rank <= rank:
            layers.append(layer)
            continue
        if isinstance(layer, DenseLayer):
            factors = linalg.identity_factors(layer.delta(torch.float64).flatten(1))
        else:
            factors = layer.up.flatten(1).double() * layer.scale, layer.down.flatten(1).double()
        up, down, lost[layer.name] = linalg.truncate(*factors, rank)
        kernel = layer.shape[1:]
        layers.append(LoraLayer(layer.name, down.float().view(-1, *kernel), up.float().view(*up.shape, *[1] * (len(kernel) - 1))))
    return adapter.with_(layers={layer.name: layer for layer in layers}), lost
