"""Embeddings that OneTrainer and others put into a LoRA file: `bundle_emb.PLACEHOLDER.ENCODER`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loraclr.errors import FormatError

PREFIX = "bundle_emb."
_CLIP_L = (".string_to_param.*", ".clip_l")  # the first text encoder, as A1111 and as the newer tools call it


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The other tensors of a file, and its bundled tokens, each (1, dim).

    A placeholder may hold dots, so it ends where the encoder's name at the very end begins. One of several vectors becomes the tokens
    `NAME`, `NAME_1`, ..., as diffusers has it. Raises FormatError for embeddings of other text encoders than the first.
    """
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}
    tokens: dict[str, Tensor] = {}
    for key in sorted(tensors.keys() - rest.keys()):
        encoder = next((suffix for suffix in _CLIP_L if key.endswith(suffix)), None)
        placeholder = key.removeprefix(PREFIX).removesuffix(encoder or "")
        if encoder is None or not placeholder:
            raise FormatError(
                f"{key}: learned tokens are kept for the first text encoder alone (string_to_param or clip_l); "
                "save this embedding by itself and take it out of the file"
            )
        rows = tensors[key] if tensors[key].ndim > 1 else tensors[key][None]
        if rows.ndim != 2 or 0 in rows.shape:
            raise FormatError(f"{key} has shape {tuple(rows.shape)}; expected (vectors, dim), so the file is damaged")
        for index, row in enumerate(rows):
            token = f"{placeholder}_{index}" if index else placeholder
            if token in tokens:
                raise FormatError(f"{key}: a second embedding called {token!r}; rename one of the two")
            tokens[token] = row[None]
    return rest, tokens
