"""What a file is, in one record, for people and for the command line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraclr.adapter import Adapter, DenseLayer, LoraLayer
from loraclr.formats import header, names
from loraclr.formats.provenance import LICENSE


@dataclass(frozen=True)
class FileReport:
    """One adapter file. `layers` counts by component, `ranks` and `scales` count low-rank layers, `dense` counts full differences."""

    path: Path
    format: str
    family: str | None
    layers: Mapping[str, int]
    dense: int
    ranks: Mapping[int, int]
    scales: Mapping[float, int]
    dtypes: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    triggers: tuple[str, ...]
    licence: str  # as its header states, or its page at Civitai forbids; empty without any
    size: int  # bytes, without a tokens sidecar
    sha256: str  # hex; of a folder, over its members; Civitai's AutoV2 is how it begins
    tensor_sha256: str | None  # of a .safetensors file without its header; A1111's hash and Civitai's AutoV3 are how it begins
    trigger_source: str  # who says the triggers; empty without any
    warnings: tuple[str, ...]


def report(
    adapter: Adapter,
    *,
    path: Path,
    format: str,
    dtypes: tuple[str, ...],
    size: int,
    sha256: str,
    tensor_sha256: str | None,
    trigger_source: str,
) -> FileReport:
    """The record of `adapter`, read from `path`, whose tensors are of the types `dtypes`."""
    low = [layer for layer in adapter if isinstance(layer, LoraLayer)]
    dense = [layer for layer in adapter if isinstance(layer, DenseLayer)]
    return FileReport(
        path=path,
        format=format,
        family=adapter.family,
        layers=dict(sorted(Counter(layer.name.split(".", 1)[0] for layer in adapter).items())),
        dense=len(dense),
        ranks=dict(sorted(Counter(layer.rank for layer in low).items())),
        scales=dict(sorted(Counter(layer.scale for layer in low).items())),
        dtypes=dtypes,
        tokens={token: tuple(rows.shape) for token, rows in adapter.tokens.items()},
        triggers=adapter.triggers,
        licence=adapter.metadata.get(LICENSE, ""),
        size=size,
        sha256=sha256,
        tensor_sha256=tensor_sha256,
        trigger_source=trigger_source,
        warnings=tuple(_warnings(adapter, low, format)),
    )


def _warnings(adapter: Adapter, low: list[LoraLayer], format: str) -> list[str]:
    notes = []
    if format == "kohya" and "transformer" not in adapter.components and len({round(layer.scale * layer.rank, 4) for layer in low}) > 1:
        notes.append("its layers have different alphas, which diffusers reads wrongly; writing it again with loraclr mends that")
    if header.trained_split(adapter.metadata):
        notes.append(
            "its header says split_qkv: the stored rank is three or four times the trained one at the same alpha, so every tool applies "
            "it at a third or a quarter of the strength it was trained at; give it a larger weight if it is too weak"
        )
    shown = names.guess_family(adapter.shapes)
    if shown and adapter.family and shown != adapter.family:
        notes.append(f"its header says {adapter.family}, its layers are those of {shown} models")
    silent = [layer.name for layer in low if layer.scale == 0 or not layer.up.any() or not layer.down.any()]
    if silent:
        notes.append(f"{len(silent)} layers change nothing, the first is {silent[0]}")
    if not adapter.triggers and not adapter.tokens:
        notes.append("it names no trigger words: state them when merging")
    if adapter.family is None:
        notes.append("it does not say which family of models it is for")
    elif adapter.family != "sd1" and not adapter.family.startswith("toy"):
        notes.append(f"it is for {adapter.family} models")
    return notes
