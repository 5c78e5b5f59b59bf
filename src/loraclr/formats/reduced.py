"""An adapter cut to a rank, for formats and tools that hold low-rank changes alone; and what a rank can keep of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def kept(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """By adapter, the share of its change, squared, that the best rank 1, 2, ... of all changes side by side keeps.

    Direction k is the k-th left singular vector of [D_1 ... D_N]. With D_i = L_i Q_i^T, Q_i orthonormal, and L = [L_1 ... L_N], let V_k be
    the k-th eigenvector of L^T L: then direction k keeps its eigenvalue times |V_k|^2 over L_i's part of D_i.
    """
    curves: dict[str, Tensor] = {adapter.name: torch.zeros(0, dtype=torch.float64) for adapter in adapters}
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        left = {adapter.name: _left(adapter.layers[name]) for adapter in adapters if name in adapter.layers}
        stacked = torch.cat(list(left.values()), dim=1)
        values, vectors = torch.linalg.eigh(stacked.T @ stacked)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        start = 0
        for adapter, part in left.items():
            mine = values * vectors[start : start + part.shape[1]].square().sum(0)
            start += part.shape[1]
            sums, before = mine.cumsum(0), curves[adapter]
            length = max(len(sums), len(before))
            curves[adapter] = _stretched(before, length) + _stretched(sums, length)
    return {name: curve / curve[-1] for name, curve in curves.items() if len(curve) and curve[-1] > 0}


def _stretched(curve: Tensor, length: int) -> Tensor:
    last = curve[-1:] if len(curve) else torch.zeros(1, dtype=torch.float64)
    return torch.cat([curve, last.expand(length - len(curve))])


def _left(layer: Layer) -> Tensor:
    """L (out, k) with D = L Q^T, Q orthonormal."""
    if isinstance(layer, DenseLayer):
        upper: Tensor = torch.linalg.qr(layer.delta(torch.float64).flatten(1).T, mode="r").R
        return upper.T
    upper = torch.linalg.qr(layer.down.flatten(1).double().T, mode="r").R
    return layer.up.flatten(1).double() @ upper.T * layer.scale


def lost(curve: Tensor, rank: int) -> float:
    """The relative loss at a rank, by an adapter's curve of `kept`."""
    return float((1 - curve[min(rank, len(curve)) - 1]).clamp(min=0).sqrt())
