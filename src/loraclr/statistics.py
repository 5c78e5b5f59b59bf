"""What a layer saw, as sufficient statistics: X^T X of its inputs, per concept, streamed.

The positive part of the LoRACLR objective, its gradient and its optimum need nothing else (docs/method.md). A layer that saw
fewer rows than it has input features keeps the rows themselves: they are smaller, and the dual solve needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraclr import disk, linalg
from loraclr.errors import FormatError, WriteError

WIDEST = 5120  # input features up to which Grams are exact: 0.2 GB. Wider are only the 3x3 convolutions of large UNets
SKETCH = 512  # rows that stand for all rows of a wider layer


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of some feature rows: `rows` (count, in) while count < in, else `square` = X^T X (in, in), float64.

    With more than WIDEST inputs and more than SKETCH rows, `rows` are a `sketched` stand-in (SKETCH, in): each is a sum of randomly
    chosen rows with random signs (Charikar et al. 2002), so that X^T X is right on average and ||X d|| to about sqrt(1 / (2 SKETCH)), 3 %.
    """

    width: int
    count: int
    rows: Tensor | None
    square: Tensor | None
    sketched: bool = False

    @staticmethod
    def of(rows: Tensor) -> Moments:
        """Of rows (count, in) of any float type. Moments add: streaming is a running sum. Raises FormatError on NaN or infinity."""
        if not bool(torch.isfinite(rows).all()):
            raise FormatError("features hold NaN or infinity: run the base in float32")
        count, width = rows.shape
        if width > WIDEST and count > SKETCH:
            return Moments(width, count, _sketch(rows, 0), None, True)
        rows = rows.detach().to(torch.float64)
        few = count < width
        return Moments(width, count, rows.cpu() if few else None, None if few else linalg.gram(rows).cpu())

    @staticmethod
    def empty(width: int) -> Moments:
        return Moments(width, 0, torch.zeros(0, width, dtype=torch.float64), None)

    @property
    def few(self) -> bool:
        """Whether it is rows that are kept."""
        return self.rows is not None

    @property
    def kept(self) -> int:
        """How many rows are kept, or went into the Gram."""
        return self.count if (rows := self.rows) is None else len(rows)

    def extended(self, rows: Tensor) -> Moments:
        """With more rows (count, in) of the same run: as `+`, in less memory. A sketch does not grow, as a sum of two does."""
        if not bool(torch.isfinite(rows).all()):
            raise FormatError("features hold NaN or infinity: run the base in float32")
        count, own = self.count + len(rows), self.rows
        if self.width > WIDEST and count > SKETCH:
            before = _present(own) if self.sketched else _sketch(_present(own), 0)
            return Moments(self.width, count, before + _sketch(rows, self.count), None, True)
        if own is None:
            return HalfMoments(self.width, count, linalg.half_gram(rows, self.half()))
        if count < self.width:
            return self + Moments.of(rows)
        return HalfMoments(self.width, count, linalg.half_gram(rows, linalg.half_gram(own)))

    def half(self) -> Tensor:
        """The half of X^T X that says it all, in one piece."""
        return linalg.half(self.gram())

    def loaded(self) -> Moments:
        """The same in memory: itself, but for moments on disk (scratch.py). One at a time is what keeps a solve small."""
        return self

    def gram(self) -> Tensor:
        """X^T X, (in, in) float64."""
        return linalg.gram(rows) if (rows := self.rows) is not None else _present(self.square)

    def energy(self, delta: Tensor) -> float:
        """||X D^T||_F^2 for a delta D (out, in)."""
        delta = delta.to(torch.float64)
        if (rows := self.rows) is not None:
            return float((rows @ delta.T).square().sum())
        return float(((delta @ self.gram()) * delta).sum())

    def inner(self, down: Tensor) -> Tensor:
        """A G A^T (k, k) for a float64 A (k, in): ||X (B A)^T||^2 is the sum of it times B^T B, without any (out, in)."""
        if (rows := self.rows) is not None:
            seen = rows @ down.T
            return seen.T @ seen
        return (down @ self.gram()) @ down.T

    def scaled(self, factor: float) -> Moments:
        """Every row multiplied by sqrt(factor): X^T X times factor, the count unchanged."""
        if (rows := self.rows) is not None:
            return Moments(self.width, self.count, rows * factor**0.5, None, self.sketched)
        return Moments(self.width, self.count, None, self.gram() * factor, self.sketched)

    def __add__(self, other: Moments) -> Moments:
        if self.width != other.width:
            raise ValueError(f"moments of width {self.width} and {other.width} do not add")
        count = self.count + other.count
        if self.few and other.few:
            rows, sketched = torch.cat([_present(self.rows), _present(other.rows)]), self.sketched or other.sketched
            few = len(rows) < self.width
            return Moments(self.width, count, rows if few else None, None if few else linalg.gram(rows), sketched)
        return Moments(self.width, count, None, self.gram() + other.gram(), self.sketched or other.sketched)


class HalfMoments(Moments):
    """Moments whose Gram is kept as its half: what a run sums up. The whole is made when it is asked for, each time anew."""

    def __init__(self, width: int, count: int, half: Tensor) -> None:
        object.__setattr__(self, "width", width)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "_half", half)
        self._half: Tensor

    @property
    def rows(self) -> Tensor | None:
        return None

    @property
    def square(self) -> Tensor | None:
        return linalg.whole(self._half, self.width)

    def half(self) -> Tensor:
        return self._half

    def loaded(self) -> Moments:
        return Moments(self.width, self.count, None, self.square)


@dataclass(frozen=True, eq=False)
class Gap:
    """What is missing behind a layer, E (count, out), beside the layer's inputs X' (count, in), row for row, as sums in float64:
    `square` X'^T X', `cross` E^T X', `size` the sum of all squares of E."""

    count: int
    square: Tensor
    cross: Tensor
    size: float

    @staticmethod
    def of(missing: Tensor, rows: Tensor) -> Gap:
        """Of E and X', of any float type. Raises FormatError on NaN or infinity."""
        if not bool(torch.isfinite(missing).all() and torch.isfinite(rows).all()):
            raise FormatError("features hold NaN or infinity: run the base in float32")
        missing, rows = (part.detach() if part.device.type != "mps" else part.detach().cpu() for part in (missing, rows))  # no float64
        missing, rows = missing.double(), rows.double()
        return Gap(len(rows), linalg.gram(rows).cpu(), (missing.T @ rows).cpu(), float(missing.square().sum()))

    def __add__(self, other: Gap) -> Gap:
        return Gap(self.count + other.count, self.square + other.square, self.cross + other.cross, self.size + other.size)


@dataclass(frozen=True, eq=False)
class LayerStats:
    """One layer's statistics for all concepts.

    `fit` is what a method may learn from; `held_out` comes from other prompts and only judges; `preserve` is from prompts
    without any concept, where the merged model should stay the base; `sample` holds a few rows per concept, *paired*: row k of
    every concept comes from the same prompt template, position and timestep. Where all rows were asked for and texts of different
    length leave some of them without a partner, `rows` holds all of every concept.
    """

    layer: str
    fit: Mapping[str, Moments]
    held_out: Mapping[str, Moments] = field(default_factory=dict)
    preserve: Moments | None = None
    sample: Mapping[str, Tensor] = field(default_factory=dict)  # concept -> (rows, in)
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # concept -> (its rows, in)

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(self.fit)

    @property
    def width(self) -> int:
        return next(iter(self.fit.values())).width

    def __add__(self, other: LayerStats) -> LayerStats:
        """Statistics of two runs sum; the rows are the first run's."""
        if self.layer != other.layer:
            raise ValueError(f"statistics of {self.layer} and {other.layer} do not add")
        preserve = [m for m in (self.preserve, other.preserve) if m is not None]
        return LayerStats(
            self.layer,
            _sum(self.fit, other.fit),
            _sum(self.held_out, other.held_out),
            preserve[0] + preserve[1] if len(preserve) == 2 else (preserve[0] if preserve else None),
            self.sample or other.sample,
            self.rows or other.rows,
        )


def _sketch(rows: Tensor, first: int) -> Tensor:
    """(SKETCH, in) float64: every row, with a random sign, added to a random one. `first` is the place of rows[0] in the stream, which
    decides both: rows at other places get independent ones."""
    draw = torch.Generator().manual_seed(first)
    places = torch.randint(SKETCH, (len(rows),), generator=draw)
    signs = torch.randint(2, (len(rows), 1), generator=draw) * 2.0 - 1.0
    sums = torch.zeros(SKETCH, rows.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), SKETCH):  # a part at a time: what is wide is large
        part = slice(start, start + SKETCH)
        sums.index_add_(0, places[part], rows[part].detach().cpu().double() * signs[part])
    return sums


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _sum(a: Mapping[str, Moments], b: Mapping[str, Moments]) -> dict[str, Moments]:
    summed = dict(a)
    for key, moments in b.items():
        summed[key] = summed[key] + moments if key in summed else moments
    return summed


def save_statistics(statistics: Mapping[str, LayerStats], path: str | Path) -> None:
    """All layers' statistics into one safetensors file, whole or not at all. Raises WriteError where the system refuses."""
    tensors: dict[str, Tensor] = {}
    counts: dict[str, str] = {}

    def put(key: str, moments: Moments) -> None:
        tensor = _present(moments.rows) if moments.few else moments.gram()
        tensors[f"{key}/{'rows' if moments.few else 'gram'}"] = tensor.clone()  # layers may share one tensor, which safetensors refuses
        counts[key] = f"{moments.count} sketched" if moments.sketched else str(moments.count)

    for name, stats in statistics.items():
        for kind in ("fit", "held_out"):
            for concept, moments in getattr(stats, kind).items():
                put(f"{name}/{kind}/{concept}", moments)
        if stats.preserve is not None:
            put(f"{name}/preserve/", stats.preserve)
        for kind in ("sample", "rows"):
            for concept, rows in getattr(stats, kind).items():
                tensors[f"{name}/{kind}/{concept}/rows"] = rows.contiguous()
    with disk.whole(path) as part:
        try:
            save_file(tensors, str(part), metadata=counts)
        except SafetensorError as error:
            raise WriteError(f"{path}: cannot be written ({error}); make room, or give a folder that can be written to") from error


def load_statistics(path: str | Path) -> dict[str, LayerStats]:
    """What `save_statistics` wrote."""
    parts: dict[str, dict[str, dict[str, Moments]]] = {}
    loose: dict[str, dict[str, dict[str, Tensor]]] = {"sample": {}, "rows": {}}
    with safe_open(str(path), "pt") as file:
        counts = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118
            name, kind, rest = key.split("/", 2)
            concept, form = rest.rsplit("/", 1)
            tensor = file.get_tensor(key)
            layer = parts.setdefault(name, {"fit": {}, "held_out": {}, "preserve": {}})
            if kind in loose:
                loose[kind].setdefault(name, {})[concept] = tensor
                continue
            if form not in ("rows", "gram") or f"{name}/{kind}/{concept}" not in counts:
                raise FormatError(f"{path}: {key!r} is not a statistics key; collect the statistics again")
            count, _, sketched = counts[f"{name}/{kind}/{concept}"].partition(" ")
            rows, square = (tensor, None) if form == "rows" else (None, tensor)
            layer[kind][concept] = Moments(tensor.shape[1], int(count), rows, square, bool(sketched))
    return {
        name: LayerStats(name, layer["fit"], layer["held_out"], layer["preserve"].get(""), *(rows.get(name, {}) for rows in loose.values()))
        for name, layer in parts.items()
    }
