"""What a comparison found: one entry a method, ready for JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraclr import disk
from loraclr.compare.measures import Measure
from loraclr.evaluate import Estimate, Evaluation
from loraclr.merge import MergeResult

SHOWN = ("identity", "right person", "leakage", "image", "text", "prompt")  # what is shown of the judges' values


@dataclass(frozen=True, eq=False)
class Entry:
    """One method. `why` says what kept it from merging; then there is no result."""

    label: str  # as asked for: `sum`, `loraclr:exact`, `sum:scale=0.15`
    why: str = ""
    result: MergeResult | None = None
    size: int = 0  # bytes of its file
    seconds: float = float("nan")
    megabytes: float = float("nan")  # the most above what was in use before (`memory.py` says how nearly); NaN where unknown
    measure: Measure | None = None  # without a base there is none

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank of its layers; (0, 0) without any."""
        found = [layer.rank for layer in self.result.layers] if self.result else []
        return (min(found), max(found)) if found else (0, 0)

    @property
    def lost(self) -> float:
        """The most that a layer lost where it was cut to its rank, as `LayerReceipt.lost`; 0 without any."""
        return max((layer.lost for layer in self.result.layers), default=0.0) if self.result else 0.0

    @property
    def residual(self) -> float:
        """On held-out prompts; NaN where it was not measured."""
        return self.measure.residual() if self.measure else float("nan")


@dataclass(frozen=True, eq=False)
class Comparison:
    """All methods on the same adapters. Entries stand in the order asked for."""

    entries: tuple[Entry, ...]
    settings: Mapping[str, Any]  # base, seed, rank, inputs, collection, versions
    pictures: Evaluation | None = None  # rows by label at equal seeds; scores where there was a judge
    folder: Path | None = None  # that the rows' files are in

    @property
    def merged(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.result is not None)

    def reasons(self) -> dict[str, list[str]]:
        """Why methods did not merge -> their labels, those together to which the same happened."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.result is None:
                found.setdefault(entry.why.removeprefix(f"{entry.label.partition(':')[0]} "), []).append(entry.label)
        return found

    def scores(self) -> dict[str, dict[str, Estimate]]:
        """Row of pictures, controls included -> metric of `SHOWN` -> its mean and interval; nothing where there was no judge."""
        found = {row.label: row.estimates() for row in self.pictures.rows} if self.pictures else {}
        kept = {label: {name: values[name] for name in SHOWN if name in values and values[name].count} for label, values in found.items()}
        return kept if any(kept.values()) else {}

    @property
    def before(self) -> float:
        """How loud another concept's adapter is on a concept's features beside its own, on the average; the same for all methods."""
        return next((entry.measure.cross_talk.summary()["before"] for entry in self.merged if entry.measure), float("nan"))

    def report(self) -> dict[str, Any]:
        """Everything, ready for JSON; what was not measured is None."""
        whole: dict[str, Any] = disk.plain(
            {
                "settings": self.settings,
                "methods": [_entry(entry) for entry in self.entries],
                "pictures": self.pictures.report() if self.pictures else None,
            },
            digits=4,
        )
        return whole

    def save(self, path: str | Path) -> Path:
        """The report, whole or not at all."""
        disk.write(path, json.dumps(self.report(), indent=1, allow_nan=False) + "\n")
        return Path(path)


def _entry(entry: Entry) -> dict[str, Any]:
    if entry.result is None:
        return {"label": entry.label, "why": entry.why}
    found: dict[str, Any] = {
        "label": entry.label,
        "method": entry.result.method,
        "parameters": entry.result.parameters,
        "rank": entry.ranks,
        "lost": entry.lost,
        "bytes": entry.size,
        "seconds": round(entry.seconds, 2),
        "phases": entry.result.seconds,
        "megabytes": round(entry.megabytes, 1),
    }
    if (measure := entry.measure) is not None:
        talk = measure.cross_talk
        found |= {
            "residual": {kind: measure.residual(kind) for kind in ("fit", "held_out")},
            "by_concept": {name: measure.residual(concept=name) for name in talk.concepts},
            "cross_talk": talk.report(),
            "layers": {
                name: {"fit": measure.fit[name], "held_out": measure.held_out[name], "tables": layer.tables()}
                for name, layer in measure.layers.items()
            },
        }
    return found
