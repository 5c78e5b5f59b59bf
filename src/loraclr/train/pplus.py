"""P+, extended textual inversion: one new word with an embedding of its own for every cross-attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from loraclr.train.edlora import TokenLr
from loraclr.train.recipe import TOYBOX, Batch, Steps
from loraclr.train.textual_inversion import TextualInversion


@dataclass(frozen=True)
class PPlus(TextualInversion):
    """Textual Inversion with as many embeddings as the UNet has cross-attention layers, trained together (arXiv 2303.09522)."""

    name: ClassVar[str] = "pplus"
    summary: ClassVar[str] = "one new word with an embedding per cross-attention layer"
    reference: ClassVar[str] = "P+, arXiv 2303.09522"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType({"toybox": {**TOYBOX, "token_lr": 5e-3}})
    layerwise: ClassVar[bool] = True

    steps: Steps = 500
    batch: Batch = 8
    token_lr: TokenLr = 5e-3
