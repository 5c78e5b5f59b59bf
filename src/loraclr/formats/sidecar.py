"""Learned tokens beside a file whose format has no place for them: `NAME.tokens.safetensors`, one tensor per token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from loraclr import disk
from loraclr.errors import FormatError
from loraclr.formats import embedding, files
from loraclr.formats.base import Content

MARK = embedding.SIDECAR
_ABOUT = {
    MARK: "1",
    "about": "Learned token embeddings of a CLIP text encoder. Each tensor is named after its token: (1, dim) for all layers, "
    "or (layers, dim), one row per cross-attention layer of the UNet in the order down, mid, up.",
}


def path_for(path: Path) -> Path:
    """`dir/name.safetensors` and the folder `dir/name` both have `dir/name.tokens.safetensors`."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".tokens.safetensors")


def read(path: Path) -> dict[str, Tensor]:
    """The tokens beside the adapter at `path`; none if there is no sidecar."""
    beside = path_for(path)
    if not beside.exists():
        return {}
    content = files.read(beside)
    if MARK not in content.metadata:
        raise FormatError(f"{beside.name} lies beside it but holds no tokens; rename that file")
    return dict(content.tensors)


def write(tokens: Mapping[str, Tensor], path: Path) -> None:
    """The tokens of the adapter at `path`; without any, an earlier adapter's go."""
    if tokens:
        files.write(Content({token: rows.float() for token, rows in tokens.items()}, _ABOUT), path_for(path), "file")
    elif read(path):
        disk.remove(path_for(path))
