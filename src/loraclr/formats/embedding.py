"""Textual Inversion: one learned token and no layers, as a file that A1111, ComfyUI and diffusers load.

One tensor named after its token, `{"<rhea>": (1, dim)}`: diffusers takes the name from the key, A1111 and ComfyUI from the file. Read are
also A1111's `emb_params`, and several vectors, which become the tokens `NAME`, `NAME_1`, ... as in diffusers. A token with one row per
cross-attention layer (P+, arXiv 2303.09522) is sixteen tensors under the names of kohya's XTI trainer, for UNets with sixteen such layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from loraclr.adapter import Adapter
from loraclr.errors import FormatError
from loraclr.formats import header, sidecar
from loraclr.formats.base import BaseWeights, Content, Storage

id: str = "embedding"
storage: Storage = "file"
holds_tokens: bool = True

NAMELESS = ""  # what a token is called until the file's name is known
LAYERS = (*("IN01", "IN02", "IN04", "IN05", "IN07", "IN08"), "MID", *(f"OUT{number:02d}" for number in range(3, 12)))  # down, mid, up
_A1111 = "emb_params"
_TWO = {"clip_l", "clip_g"}
_TOKEN = re.compile(r"<[^<>\s]+>")


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    found = set(keys)
    if not found or sidecar.MARK in metadata:
        return False
    one = len(found) == 1 and any(key == _A1111 or _TOKEN.fullmatch(key) for key in found)
    return one or found <= set(LAYERS) or found <= _TWO


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    """A token whose name is in the file neither as a key nor as the trigger is called NAMELESS: it goes by the file's name."""
    tensors = content.tensors
    if tensors.keys() <= _TWO:
        raise FormatError("holds an embedding for the text encoders of SDXL; learned tokens are kept for Stable Diffusion 1 and 2 alone")
    stated = next(iter(header.triggers(content.metadata)), NAMELESS)
    token = stated if _TOKEN.fullmatch(stated) else NAMELESS
    if tensors.keys() <= set(LAYERS):
        if missing := [key for key in LAYERS if key not in tensors]:
            raise FormatError(f"holds embeddings of some layers, but not of {', '.join(missing)}; fetch the file again")
        rows = [_rows(key, tensors[key]) for key in LAYERS]
        if any(len(one) > 1 for one in rows):
            raise FormatError("has several vectors for each layer, which no prompt here can hold; train it with one")
        return Adapter({}, tokens={token: torch.cat(rows)})
    ((key, tensor),) = tensors.items()
    token = token if key == _A1111 else key
    return Adapter({}, tokens={f"{token}_{number}" if number else token: row[None] for number, row in enumerate(_rows(key, tensor))})


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    if len(adapter):
        raise FormatError(f"the adapter has {len(adapter)} layers, and {id} files hold a learned token alone; write format 'edlora'")
    if len(adapter.tokens) != 1:
        raise FormatError(f"an {id} file holds one token, and there are {', '.join(adapter.tokens)}; write format 'edlora'")
    ((token, rows),) = adapter.tokens.items()
    if len(rows) == 1:
        if not _TOKEN.fullmatch(token):
            raise FormatError(f"the token {token!r} has no angle brackets, without which {id} files are not told from others; rename it")
        return Content({token: rows.float()})
    check_layers(len(rows))
    return Content({key: row[None].float() for key, row in zip(LAYERS, rows, strict=True)})


def check_layers(count: int) -> None:
    """Raises FormatError unless tokens with `count` rows have a place."""
    if count not in (1, len(LAYERS)):
        raise FormatError(f"a token with {count} layers has no names in {id} files, which know {len(LAYERS)}; end the name in .pth")


def _rows(key: str, tensor: Tensor) -> Tensor:
    rows = tensor if tensor.ndim > 1 else tensor[None]
    if rows.ndim != 2 or 0 in rows.shape:
        raise FormatError(f"{key} has shape {tuple(tensor.shape)}; expected (vectors, dim), so the file is damaged")
    return rows
