"""Full differences: a kohya file in which every layer is `.diff`, the change itself: large, and nothing to get wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from loraclr.adapter import Adapter, ProductLayer
from loraclr.formats import kohya
from loraclr.formats.base import BaseWeights, Content, Storage

id: str = "diff"
storage: Storage = "file"
holds_tokens: bool = False


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Never: its files are kohya files."""
    return False


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    return kohya.read(content, base)


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    return kohya.write(adapter.with_(layers={layer.name: ProductLayer(layer.name, layer.shape, layer.delta) for layer in adapter}), dtype)
