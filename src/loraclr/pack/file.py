"""One file of a pack: what it says of itself, an adapter exactly as it was read, and the moments of some layers.

A safetensors file. Its header holds one JSON text; tensors are read one at a time, when they are asked for. Moments that several layers
share are stored once, and of a symmetric X^T X one half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraclr import linalg
from loraclr.adapter import STAGES, Adapter, DenseLayer, Layer, LoraLayer
from loraclr.collect import Concept
from loraclr.errors import FormatError
from loraclr.formats.base import FLOATS
from loraclr.formats.files import Entry, Stored, body, write_large
from loraclr.formats.files import about as named
from loraclr.statistics import SKETCH, WIDEST, HalfMoments, Moments

MARK = "loraclr.pack"
VERSION = 2
KINDS = ("fit", "held_out", "preserve")
_TEXT, _TEXTS, _NUMBER = (str, None), [str], (int, float)
# What every file says of itself, and of what type it is (`_fits`). Of a file with more layers of a concept `adapter` is None, of prompts
# without any `concept`, too.
HELD: dict[str, Any] = {
    "base": {"source": str, "sha256": str},
    "collection": {str: object},
    "versions": {str: str},
    "concept": _TEXT,
    "fingerprint": _TEXT,
    "call": _TEXT,
    "input": ({"file": _TEXT, "sha256": _TEXT}, None),
    "texts": int,
    "adapter": (
        {"scales": {str: _NUMBER}, "dense": _TEXTS, "tokens": _TEXTS, "triggers": _TEXTS, "family": _TEXT, "metadata": {str: str}},
        None,
    ),
    "layers": {str: frozenset(STAGES)},
    "moments": {kind: {str: [int]} for kind in KINDS},
}


_REMEDY = "remove this concept and add it again"


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
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise FormatError("is no file of a pack; take it out of the folder") from error
            self.about: dict[str, Any] = {key: about.get(key) for key in HELD}
            named_ones = [self.about[key] for key in ("concept", "fingerprint", "call", "input")]
            damaged = [key for key, form in HELD.items() if not _fits(self.about[key], form)]
            if damaged or self.about["texts"] < 1 or (self.about["adapter"] is not None and None in named_ones):
                raise FormatError(f"is damaged in what it says of itself ({', '.join(damaged) or 'its concept'}); {_REMEDY}")
            self._moments: dict[str, dict[str, list[int]]] = self.about["moments"]

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
        number, width, count = entry if len(entry) == 3 else (-1, 0, 0)
        tensor = self._tensor(f"moments/{number}")
        few = tensor.ndim == 2
        sketched = few and width > WIDEST and count > SKETCH
        expected = (SKETCH if sketched else count, width) if few else (linalg.half_size(min(width, tensor.numel() + 1)),)
        if tuple(tensor.shape) != expected or tensor.dtype != torch.float64 or not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{self.path}: the statistics of {layer} are damaged; {_REMEDY}")
        return Moments(width, count, tensor, None, sketched) if few else HalfMoments(width, count, tensor)

    def restored(self) -> Concept:
        """The concept: its adapter, to the last bit as it was added, and its call. Raises FormatError for a damaged file."""
        said = self.about["adapter"]
        layers: dict[str, Layer] = {}
        for name, scale in said["scales"].items():
            down, up = (self._tensor(f"adapter/{name}/{part}") for part in ("down", "up"))
            with named(self.path):
                layers[name] = LoraLayer(name, down, up, scale)
        for name in said["dense"]:
            change = self._tensor(f"adapter/{name}/change")
            with named(self.path):
                layers[name] = DenseLayer(name, change)
        tokens = {token: self._tensor(f"token/{token}") for token in said["tokens"]}
        with named(self.path):
            adapter = Adapter(
                layers,
                name=str(self.concept),
                tokens=tokens,
                triggers=tuple(said["triggers"]),
                family=said["family"],
                metadata=said["metadata"],
            )
            again, entries = adapter_entries(adapter)
            if fingerprint([again, self.about["call"]], entries) != self.about["fingerprint"]:
                raise FormatError(f"its adapter is not what was added; {_REMEDY}")
        return Concept(adapter, self.about["call"])

    def _tensor(self, key: str) -> Tensor:
        with named(self.path):
            try:
                with safe_open(self.path, "pt") as file:
                    tensor: Tensor = file.get_tensor(key).clone()  # not a view of the file, which may be removed
            except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise FormatError(f"lacks {key} ({error}); {_REMEDY}") from error
            return tensor


def _fits(value: object, form: Any) -> bool:
    """Whether a value of JSON is of a form: a type; any of a tuple of forms; one of a set; a list or, under `str`, an object of
    values of one form; an object with at least these keys."""
    if isinstance(form, tuple):
        return any(_fits(value, one) for one in form)
    if isinstance(form, frozenset):
        return isinstance(value, str) and value in form
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(one, form[0]) for one in value)
    if isinstance(form, dict):
        inner = dict.fromkeys(value, form[str]) if isinstance(value, dict) and str in form else form
        return isinstance(value, dict) and all(key in value and _fits(value[key], one) for key, one in inner.items())
    return value is None if form is None else form is object or type(value) is form  # True is no number


def adapter_entries(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Stored]]:
    """What the header says of an adapter, and its tensors. A change that is a product of factors (LoHa, LoKr) is stored multiplied out."""
    entries: dict[str, Stored] = {f"token/{token}": rows for token, rows in adapter.tokens.items()}
    scales: dict[str, float] = {}
    for layer in adapter:
        if isinstance(layer, LoraLayer):
            scales[layer.name] = layer.scale
            entries |= {f"adapter/{layer.name}/down": layer.down, f"adapter/{layer.name}/up": layer.up}
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


def moments_entries(found: Mapping[str, Mapping[str, Moments]]) -> tuple[dict[str, dict[str, list[int]]], dict[str, Stored]]:
    """The header's table kind -> layer -> [number of the tensor, width, count], and the tensors, equal ones once."""
    entries: dict[str, Stored] = {}
    numbers: dict[tuple[int, str], int] = {}
    table: dict[str, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for layer, moments in sorted(found.get(kind, {}).items()):
            tensor = moments.half() if moments.rows is None else moments.rows
            key = moments.width, hashlib.sha256(body(tensor)).hexdigest()
            if key not in numbers:
                numbers[key] = len(numbers)
                entry = Entry(tensor.dtype, tuple(tensor.shape), moments.half)
                entries[f"moments/{numbers[key]}"] = entry if moments.rows is None else tensor
            table[kind][layer] = [numbers[key], moments.width, moments.count]
    return table, entries


def fingerprint(said: object, entries: Mapping[str, Stored]) -> str:
    """SHA-256 of these values and tensors."""
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for key, entry in sorted(entries.items()):
        found.update(json.dumps([key, str(entry.dtype), entry.shape]).encode())
        found.update(body(entry))
    return found.hexdigest()


def write(path: Path, about: Mapping[str, Any], entries: Mapping[str, Stored]) -> None:
    """The file at `path`, whole or not at all, one tensor in memory at a time. Equal content, equal bytes.

    Raises WriteError for what the system refuses.
    """
    for key, entry in entries.items():
        if entry.dtype not in FLOATS.values():
            raise FormatError(f"{path}: {key} is of {entry.dtype}; a pack keeps {', '.join(FLOATS)}: convert the adapter first")
    write_large(entries, {MARK: json.dumps({"version": VERSION, **about}, sort_keys=True, allow_nan=False)}, path)


def _change(layer: DenseLayer) -> Tensor:
    return layer.change
