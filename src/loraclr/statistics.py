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


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of some feature rows: `rows` (count, in) while count < in, else `square` = X^T X (in, in), float64."""

    width: int
    count: int
    rows: Tensor | None
    square: Tensor | None

    @staticmethod
    def of(rows: Tensor) -> Moments:
        """Of rows (count, in) of any float type. Moments add: streaming is a running sum. Raises FormatError on NaN or infinity."""
        rows = rows.detach().to(torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise FormatError("features hold NaN or infinity: run the base in float32")
        count, width = rows.shape
        few = count < width
        return Moments(width, count, rows.cpu() if few else None, None if few else linalg.gram(rows).cpu())

    @staticmethod
    def empty(width: int) -> Moments:
        return Moments(width, 0, torch.zeros(0, width, dtype=torch.float64), None)

    def gram(self) -> Tensor:
        """X^T X, (in, in) float64."""
        if self.square is not None:
            return self.square
        assert self.rows is not None
        return linalg.gram(self.rows)

    def energy(self, delta: Tensor) -> float:
        """||X D^T||_F^2 for a delta D (out, in)."""
        delta = delta.to(torch.float64)
        if self.rows is not None:
            return float((self.rows @ delta.T).square().sum())
        return float(((delta @ self.gram()) * delta).sum())

    def scaled(self, factor: float) -> Moments:
        """Every row multiplied by sqrt(factor): X^T X times factor, the count unchanged."""
        rows = None if self.rows is None else self.rows * factor**0.5
        return Moments(self.width, self.count, rows, None if self.square is None else self.square * factor)

    def __add__(self, other: Moments) -> Moments:
        if self.width != other.width:
            raise ValueError(f"moments of width {self.width} and {other.width} do not add")
        count = self.count + other.count
        if self.rows is not None and other.rows is not None:
            rows = torch.cat([self.rows, other.rows])
            return Moments(self.width, count, rows, None) if count < self.width else Moments(self.width, count, None, linalg.gram(rows))
        return Moments(self.width, count, None, self.gram() + other.gram())


@dataclass(frozen=True, eq=False)
class LayerStats:
    """One layer's statistics for all concepts.

    `fit` is what a method may learn from; `held_out` comes from other prompts and only judges; `preserve` is from prompts
    without any concept, where the merged model should stay the base; `sample` holds a few rows per concept, *paired*: row k of
    every concept comes from the same prompt template, position and timestep.
    """

    layer: str
    fit: Mapping[str, Moments]
    held_out: Mapping[str, Moments] = field(default_factory=dict)
    preserve: Moments | None = None
    sample: Mapping[str, Tensor] = field(default_factory=dict)  # concept -> (rows, in)

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(self.fit)

    @property
    def width(self) -> int:
        return next(iter(self.fit.values())).width

    def __add__(self, other: LayerStats) -> LayerStats:
        """Statistics of two runs sum; the paired sample is the first run's."""
        if self.layer != other.layer:
            raise ValueError(f"statistics of {self.layer} and {other.layer} do not add")
        preserve = [m for m in (self.preserve, other.preserve) if m is not None]
        return LayerStats(
            self.layer,
            _sum(self.fit, other.fit),
            _sum(self.held_out, other.held_out),
            preserve[0] + preserve[1] if len(preserve) == 2 else (preserve[0] if preserve else None),
            self.sample or other.sample,
        )


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
        tensors[f"{key}/{'rows' if moments.rows is not None else 'gram'}"] = (
            moments.rows if moments.rows is not None else moments.gram()
        ).clone()  # layers may share one tensor, which safetensors refuses
        counts[key] = str(moments.count)

    for name, stats in statistics.items():
        for kind in ("fit", "held_out"):
            for concept, moments in getattr(stats, kind).items():
                put(f"{name}/{kind}/{concept}", moments)
        if stats.preserve is not None:
            put(f"{name}/preserve/", stats.preserve)
        for concept, rows in stats.sample.items():
            tensors[f"{name}/sample/{concept}/rows"] = rows.contiguous()
    with disk.whole(path) as part:
        try:
            save_file(tensors, str(part), metadata=counts)
        except SafetensorError as error:
            raise WriteError(f"{path}: cannot be written ({error}); make room, or give a folder that can be written to") from error


def load_statistics(path: str | Path) -> dict[str, LayerStats]:
    """What `save_statistics` wrote."""
    parts: dict[str, dict[str, dict[str, Moments]]] = {}
    samples: dict[str, dict[str, Tensor]] = {}
    with safe_open(str(path), "pt") as file:
        counts = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118
            name, kind, rest = key.split("/", 2)
            concept, form = rest.rsplit("/", 1)
            tensor = file.get_tensor(key)
            layer = parts.setdefault(name, {"fit": {}, "held_out": {}, "preserve": {}})
            if kind == "sample":
                samples.setdefault(name, {})[concept] = tensor
                continue
            if form not in ("rows", "gram") or f"{name}/{kind}/{concept}" not in counts:
                raise FormatError(f"{path}: {key!r} is not a statistics key; collect the statistics again")
            count = int(counts[f"{name}/{kind}/{concept}"])
            rows, square = (tensor, None) if form == "rows" else (None, tensor)
            layer[kind][concept] = Moments(tensor.shape[1], count, rows, square)
    return {
        name: LayerStats(name, layer["fit"], layer["held_out"], layer["preserve"].get(""), samples.get(name, {}))
        for name, layer in parts.items()
    }
