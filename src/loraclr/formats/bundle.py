"""A kohya file with its learned tokens inside, `bundle_emb.PLACEHOLDER.ENCODER`, as OneTrainer writes and A1111 and Forge read it.

diffusers loads no such file, which is why tokens lie beside files of format 'kohya'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from loraclr.adapter import Adapter
from loraclr.errors import FormatError
from loraclr.formats import embedding, kohya
from loraclr.formats.base import BaseWeights, Content, Storage

id: str = "bundle"
storage: Storage = "file"
holds_tokens: bool = True


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Never: its files are kohya files."""
    return False


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    return kohya.read(content, base)


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    if not len(adapter):
        raise FormatError(f"has learned tokens and no layers, and format {id!r} is a LoRA file with tokens; write format 'embedding'")
    return Content(dict(kohya.write(adapter, dtype).tensors) | embedding.bundled(adapter.tokens))
