"""Textual Inversion: learned tokens as A1111, ComfyUI and diffusers keep them, the 16 rows of P+ (XTI), and those bundled in LoRA files.

`emb_params` (vectors, dim) is one token of one or more vectors, called as the file is; so is A1111's older `.pt` (`string_to_param`).
SDXL's has `clip_l` and `clip_g`, what its two text encoders read; here a row is the two one after the other, as the UNet reads them.
diffusers' `learned_embeds` has the token as its key. P+ has a tensor for each cross-attention layer, `IN01` ... `MID` ... `OUT11`, in the
order down, mid, up. OneTrainer puts them into LoRA files: `bundle_emb.PLACEHOLDER.ENCODER`.
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
BUNDLE = "bundle_emb."
_ENCODERS = {".string_to_param.*": "clip_l", ".clip_l": "clip_l", ".clip_g": "clip_g"}  # as A1111 and as the newer tools call them
_WIDTHS = (768, 1280)  # of SDXL's two text encoders
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
    if "t5xxl" in tensors:
        raise FormatError("has embeddings of t5xxl; learned tokens are kept for CLIP text encoders alone")
    if "clip_g" in tensors:
        return Adapter({}, tokens=_tokens(NAMELESS, _joined("", tensors.get("clip_l"), tensors["clip_g"])))
    if tensors.keys() == set(XTI):
        rows = [_rows(key, tensors[key]) for key in XTI]
        if len({part.shape for part in rows}) > 1:
            raise FormatError("its layers have different numbers of vectors; the file is damaged")
        return Adapter({}, tokens={_numbered(NAMELESS, index): row for index, row in enumerate(torch.stack(rows).unbind(1))})
    tokens: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tokens |= _tokens(NAMELESS if key in (ONE, "clip_l") or key == f"{TORCH}*" else key.removeprefix(TORCH), _rows(key, tensor))
    return Adapter({}, tokens=tokens)


def unbundled(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The other tensors of a file, and its bundled tokens, each (1, dim).

    A placeholder may hold dots, so it ends where the encoder's name at the very end begins. One of several vectors becomes the tokens
    `NAME`, `NAME_1`, ..., as diffusers has it. Raises FormatError for embeddings of other text encoders than CLIP's.
    """
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(BUNDLE)}
    found: dict[str, dict[str, str]] = {}  # placeholder -> encoder -> key
    for key in sorted(tensors.keys() - rest.keys()):
        suffix = next((suffix for suffix in _ENCODERS if key.endswith(suffix)), None)
        placeholder = key.removeprefix(BUNDLE).removesuffix(suffix or "")
        if suffix is None or not placeholder:
            raise FormatError(
                f"{key}: learned tokens are kept for CLIP text encoders alone (string_to_param, clip_l, clip_g), as what these read; "
                "save this embedding by itself and take it out of the file"
            )
        mine = found.setdefault(placeholder, {})
        if _ENCODERS[suffix] in mine:
            raise FormatError(f"{key}: a second embedding called {placeholder!r}; rename one of the two")
        mine[_ENCODERS[suffix]] = key
    tokens: dict[str, Tensor] = {}
    for placeholder, keys in found.items():
        first, second = (tensors[keys[part]] if part in keys else None for part in ("clip_l", "clip_g"))
        what = next(iter(keys.values()))
        rows = _rows(what, tensors[what]) if second is None else _joined(f"{BUNDLE}{placeholder}.", first, second)
        mine_too = _tokens(placeholder, rows)
        if twice := sorted(tokens.keys() & mine_too.keys()):
            raise FormatError(f"{what}: a second embedding called {twice[0]!r}; rename one of the two")
        tokens |= mine_too
    return rest, tokens


def bundled(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: tensors for a LoRA file. Raises FormatError for tokens with an embedding per layer."""
    found: dict[str, Tensor] = {}
    done: set[str] = set()
    for token, rows in sorted(tokens.items(), key=lambda item: (len(item[0]), item[0])):
        if len(rows) != 1:
            said = f"{token} has embeddings for {len(rows)} layers, which no tool reads out of a LoRA file"
            raise FormatError(f"{said}; write format 'kohya'")
        if token in done:
            continue
        vectors = [rows]  # with those that it becomes again: NAME_1, NAME_2, ...
        while (more := tokens.get(_numbered(token, len(vectors)))) is not None and more.shape == rows.shape:
            done.add(_numbered(token, len(vectors)))
            vectors.append(more)
        parts = split(torch.cat(vectors).float())
        found |= {f"{BUNDLE}{token}.{encoder}": part.contiguous() for encoder, part in parts.items()}
    return found


def split(rows: Tensor) -> dict[str, Tensor]:
    """Rows (vectors, dim) by the text encoder that reads them. Only SDXL has two, and a second that may have rows alone."""
    if rows.shape[1] == sum(_WIDTHS):
        return dict(zip(("clip_l", "clip_g"), torch.split(rows, list(_WIDTHS), dim=1), strict=True))
    return {"clip_g" if rows.shape[1] == _WIDTHS[1] else "clip_l": rows}


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
        parts = split(torch.cat(rows).to(dtype))
        parts = parts if "clip_g" in parts else {ONE: parts["clip_l"]}
        return Content({key: part.contiguous() for key, part in parts.items()}, {TOKEN: first})
    if {len(part) for part in rows} == {len(XTI)}:
        return Content({key: torch.stack([part[n] for part in rows]).to(dtype) for n, key in enumerate(XTI)}, {TOKEN: first})
    raise FormatError(f"{first} has embeddings for {len(rows[0])} layers; embedding files have 1, or the {len(XTI)} of SD1.x")


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _tokens(name: str, rows: Tensor) -> dict[str, Tensor]:
    return {_numbered(name, index): row[None] for index, row in enumerate(rows)}


def _joined(prefix: str, first: Tensor | None, second: Tensor) -> Tensor:
    """(vectors, dim) of SDXL, whose first text encoder may have none."""
    parts = {} if first is None else {"clip_l": _rows(f"{prefix}clip_l", first)}
    parts["clip_g"] = _rows(f"{prefix}clip_g", second)
    for part, rows in parts.items():
        if rows.shape != (len(parts["clip_g"]), _WIDTHS[part == "clip_g"]):
            count, wanted = len(parts["clip_g"]), _WIDTHS[part == "clip_g"]
            raise FormatError(
                f"{prefix}{part} has shape {tuple(rows.shape)}; beside SDXL's clip_g of {count} vectors ({count}, {wanted}) fits"
            )
    return torch.cat(list(parts.values()), dim=1)


def _rows(key: str, tensor: Tensor) -> Tensor:
    rows = tensor if tensor.ndim > 1 else tensor[None]
    if rows.ndim != 2 or 0 in rows.shape or len(rows) > _MOST:
        raise FormatError(f"{key} has shape {tuple(tensor.shape)}; expected (vectors, dim), so the file is damaged")
    return rows
