"""Textual Inversion files: learned tokens without any layer, as A1111, ComfyUI and diffusers keep them, and the 16 rows of P+ (XTI).

`emb_params` (vectors, dim) is one token of one or more vectors, called as the file is; so is A1111's older `.pt`
(`string_to_param`). `clip_l` is the first text encoder's part of SDXL's. diffusers' `learned_embeds` has the
token as its key. P+ has a tensor for each cross-attention layer, `IN01` ... `MID` ... `OUT11`, in the order down, mid, up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from loraclr.adapter import Adapter
from loraclr.errors import FormatError
from loraclr.formats.base import BaseWeights, Content, Storage

id: str = "embedding"
storage: Storage = "file"
holds_tokens: bool = True

NAMELESS = "*"  # a token that is called as its file is
SIDECAR = "loraclr.tokens"  # header entry of the tokens that lie beside an adapter, which are no file of their own
TOKEN = "loraclr.token"  # header entry: what it is called in spite of that
ONE = "emb_params"
XTI = (*(f"IN{n:02}" for n in (1, 2, 4, 5, 7, 8)), "MID", *(f"OUT{n:02}" for n in range(3, 12)))
TORCH = "string_to_param/"  # how `files` hands on an older .pt
LEARNED = "learned_embeds/"  # and any other .pt or .bin of an embedding
_MOST = 1024  # vectors of a token; a prompt has 75


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    keys = list(keys)
    return SIDECAR not in metadata and (known(keys) or any(key.startswith((TORCH, LEARNED)) for key in keys))


def known(keys: Collection[str]) -> bool:
    """Whether these keys alone show an embedding: names that are used for nothing else, or tokens in angle brackets."""
    tokens = all(key.startswith("<") and key.endswith(">") for key in keys)
    return bool(keys) and (tokens or set(keys) <= {ONE, "clip_l", "clip_g", "t5xxl"} or set(keys) == set(XTI))


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    tensors = {key.removeprefix(LEARNED): tensor for key, tensor in content.tensors.items()}
    if other := sorted(tensors.keys() & {"clip_g", "t5xxl"}):
        raise FormatError(f"has embeddings of {' and '.join(other)}; learned tokens are kept for the first text encoder alone")
    if tensors.keys() == set(XTI):
        rows = [_rows(key, tensors[key]) for key in XTI]
        if len({part.shape for part in rows}) > 1:
            raise FormatError("its layers have different numbers of vectors; the file is damaged")
        return Adapter({}, tokens={_numbered(NAMELESS, index): row for index, row in enumerate(torch.stack(rows).unbind(1))})
    tokens: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = NAMELESS if key in (ONE, "clip_l") or key == f"{TORCH}*" else key.removeprefix(TORCH)
        for index, row in enumerate(_rows(key, tensor)):
            tokens[_numbered(name, index)] = row[None]
    return Adapter({}, tokens=tokens)


def named(tokens: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Nameless tokens called `name`."""
    return {
        name + token.removeprefix(NAMELESS) if token == NAMELESS or token.startswith(f"{NAMELESS}_") else token: rows
        for token, rows in tokens.items()
    }


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    if len(adapter):
        raise FormatError(f"the adapter changes {len(adapter)} layers, and format {id!r} holds a learned token alone; write format 'kohya'")
    first = min(adapter.tokens, key=len, default="")
    expected = [_numbered(first, index) for index in range(len(adapter.tokens))]
    if sorted(adapter.tokens) != sorted(expected):
        raise FormatError(f"holds the tokens {', '.join(adapter.tokens)}, and an embedding file has one; write each by itself")
    rows = [adapter.tokens[token] for token in expected]  # (layers, dim) each
    if {len(part) for part in rows} == {1}:
        return Content({ONE: torch.cat(rows).to(dtype).contiguous()}, {TOKEN: first})
    if {len(part) for part in rows} == {len(XTI)}:
        return Content({key: torch.stack([part[n] for part in rows]).to(dtype) for n, key in enumerate(XTI)}, {TOKEN: first})
    raise FormatError(f"{first} has embeddings for {len(rows[0])} layers; embedding files have 1, or the {len(XTI)} of SD1.x")


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _rows(key: str, tensor: Tensor) -> Tensor:
    rows = tensor if tensor.ndim > 1 else tensor[None]
    if rows.ndim != 2 or 0 in rows.shape or len(rows) > _MOST:
        raise FormatError(f"{key} has shape {tuple(tensor.shape)}; expected (vectors, dim), so the file is damaged")
    return rows
