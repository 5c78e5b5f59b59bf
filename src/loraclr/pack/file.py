"""One file of a pack: what it says of itself, an adapter exactly as it was read, and the moments of some layers.

A safetensors file. Its header holds one JSON text; tensors are read one at a time, when they are asked for. Moments that several layers
share are stored once, and of a symmetric X^T X one half.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraclr import disk, linalg
from loraclr.adapter import Adapter, DenseLayer, Layer, LoraLayer
from loraclr.collect import Concept
from loraclr.errors import FormatError
from loraclr.formats.base import FLOATS
from loraclr.formats.files import about as named
from loraclr.statistics import SKETCH, WIDEST, HalfMoments, Moments

MARK = "loraclr.pack"
VERSION = 2
KINDS = ("fit", "held_out", "preserve")
# What every file says of itself. Of a file with more layers of a concept `adapter` is None, of prompts without any `concept`, too.
HELD = ("base", "collection", "versions", "concept", "fingerprint", "call", "input", "texts", "adapter", "layers", "moments")
_WORDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


class Entry(NamedTuple):
    """A tensor to be written: what the header says of it, and how to make it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> Entry:
        return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor)


class PackFile:
    """A file of a pack. `about` is what it says of itself."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError for a file that no pack can hold."""
        self.path = path
        with named(path):
            try:
                with safe_open(path, "pt") as file:
                    about = json.loads((file.metadata() or {})[MARK])
                if about["version"] != VERSION:
                    raise FormatError(f"is of version {about['version']} of packs, and this loraclr makes {VERSION}; make the pack anew")
                self.about: dict[str, Any] = {key: about[key] for key in HELD}
                self._moments: dict[str, dict[str, list[int]]] = {kind: about["moments"][kind] for kind in KINDS}
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise FormatError("is no file of a pack; take it out of the folder") from error

    @property
    def concept(self) -> str | None:
        """Whose it is; None: the statistics of prompts without any concept."""
        name: str | None = self.about["concept"]
        return name

    @property
    def layers(self) -> Mapping[str, str]:
        """Of which layers it has statistics, or would have if there were prompts for them, and their stage: text, keys or spatial."""
        layers: dict[str, str] = self.about["layers"]
        return layers

    @property
    def adapted(self) -> tuple[str, ...]:
        """The layers that the adapter in it changes."""
        said = self.about["adapter"] or {"scales": (), "dense": ()}
        return *said["scales"], *said["dense"]

    def moments(self, kind: str, layer: str) -> Moments | None:
        """What the layer saw; None if nothing was collected. Raises FormatError for a damaged file."""
        entry = self._moments[kind].get(layer)
        if entry is None:
            return None
        number, width, count = entry
        tensor = self._tensor(f"moments/{number}")
        few = tensor.ndim == 2
        sketched = few and width > WIDEST and count > SKETCH
        expected = (SKETCH if sketched else count, width) if few else (linalg.half_size(width),)
        if tuple(tensor.shape) != expected or tensor.dtype != torch.float64 or not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{self.path}: the statistics of {layer} are damaged; remove this concept and add it again")
        return Moments(width, count, tensor, None, sketched) if few else HalfMoments(width, count, tensor)

    def restored(self) -> Concept:
        """The concept: its adapter, to the last bit as it was added, and its call."""
        said = self.about["adapter"]
        layers: dict[str, Layer] = {}
        for name, scale in said["scales"].items():
            down, up = (self._tensor(f"adapter/{name}/{part}") for part in ("down", "up"))
            layers[name] = LoraLayer(name, down, up, scale)
        for name in said["dense"]:
            layers[name] = DenseLayer(name, self._tensor(f"adapter/{name}/change"))
        adapter = Adapter(
            layers,
            name=str(self.concept),
            tokens={token: self._tensor(f"token/{token}") for token in said["tokens"]},
            triggers=tuple(said["triggers"]),
            family=said["family"],
            metadata=said["metadata"],
        )
        return Concept(adapter, self.about["call"])

    def _tensor(self, key: str) -> Tensor:
        with named(self.path):
            try:
                with safe_open(self.path, "pt") as file:
                    tensor: Tensor = file.get_tensor(key)
                    return tensor.clone()  # not a view of the file, which may be removed
            except SafetensorError as error:
                raise FormatError(f"lacks {key} ({error}); remove this concept and add it again") from error


def adapter_entries(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Entry]]:
    """What the header says of an adapter, and its tensors. A change that is a product of factors (LoHa, LoKr) is stored multiplied out."""
    entries: dict[str, Entry] = {f"token/{token}": Entry.of(rows) for token, rows in adapter.tokens.items()}
    scales: dict[str, float] = {}
    for layer in adapter:
        if isinstance(layer, LoraLayer):
            scales[layer.name] = layer.scale
            entries |= {f"adapter/{layer.name}/down": Entry.of(layer.down), f"adapter/{layer.name}/up": Entry.of(layer.up)}
        else:
            change = layer.change
            entries[f"adapter/{layer.name}/change"] = Entry(change.dtype, layer.shape, partial(_change, layer))
    said = {
        "scales": scales,
        "dense": [layer.name for layer in adapter if not isinstance(layer, LoraLayer)],
        "tokens": list(adapter.tokens),
        "triggers": list(adapter.triggers),
        "family": adapter.family,
        "metadata": dict(adapter.metadata),
    }
    return said, entries


def moments_entries(found: Mapping[str, Mapping[str, Moments]]) -> tuple[dict[str, dict[str, list[int]]], dict[str, Entry]]:
    """The header's table kind -> layer -> [number of the tensor, width, count], and the tensors, equal ones once."""
    entries: dict[str, Entry] = {}
    numbers: dict[tuple[int, str], int] = {}
    table: dict[str, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for layer, moments in sorted(found.get(kind, {}).items()):
            tensor = moments.half() if moments.rows is None else moments.rows
            key = moments.width, hashlib.sha256(_bytes(tensor)).hexdigest()
            if key not in numbers:
                numbers[key] = len(numbers)
                entry = Entry.of(tensor) if moments.rows is not None else Entry(tensor.dtype, tuple(tensor.shape), moments.half)
                entries[f"moments/{numbers[key]}"] = entry
            table[kind][layer] = [numbers[key], moments.width, moments.count]
    return table, entries


def fingerprint(said: object, entries: Mapping[str, Entry]) -> str:
    """SHA-256 of these values and tensors."""
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for key, entry in sorted(entries.items()):
        found.update(json.dumps([key, str(entry.dtype), entry.shape]).encode())
        found.update(_bytes(entry.make()))
    return found.hexdigest()


def write(path: Path, about: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """The file at `path`, whole or not at all, one tensor in memory at a time. Equal content, equal bytes.

    Raises WriteError for what the system refuses.
    """
    header: dict[str, Any] = {"__metadata__": {MARK: json.dumps({"version": VERSION, **about}, sort_keys=True, allow_nan=False)}}
    ordered = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))  # which keeps every tensor aligned
    start = 0
    for key in ordered:
        entry = entries[key]
        if entry.dtype not in _WORDS:
            raise FormatError(f"{path}: {key} is of {entry.dtype}; a pack keeps {', '.join(FLOATS)}: convert the adapter first")
        stop = start + math.prod(entry.shape) * entry.dtype.itemsize
        header[key] = {"dtype": _WORDS[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with disk.whole(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            file.write(_bytes(entries[key].make()))


def _change(layer: Layer) -> Tensor:
    assert isinstance(layer, DenseLayer)
    return layer.change


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
