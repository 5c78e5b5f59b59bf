"""What a trial found: values per picture, their estimates, and one JSON file that all of it can be made from again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraclr import disk
from loraclr.errors import UsageError
from loraclr.evaluate.intervals import Estimate, estimate, paired

BASE, REFERENCES = "base", "references"  # what the controls are called


@dataclass(frozen=True, eq=False)
class Row:
    """One variant or control. All sequences have one entry per picture."""

    label: str
    concepts: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Mapping[str, Tensor]  # metric -> (n,)
    files: tuple[str, ...] = ()
    confusion: Sequence[Sequence[float]] | None = None  # concept asked x concept passed for
    curve: Sequence[tuple[float, float]] | None = None  # limit, identity alignment there

    @property
    def factors(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
        """What intervals draw anew: concepts, prompts and seeds, each over all the others."""
        return self.concepts, self.prompts, self.seeds

    def estimates(self) -> dict[str, Estimate]:
        return {metric: estimate(values, factors=self.factors) for metric, values in self.values.items()}

    def by_concept(self) -> dict[str, dict[str, float]]:
        """Concept -> metric -> mean."""
        out: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(self.concepts):
            at = [index for index, concept in enumerate(self.concepts) if concept == name]
            out[name] = {metric: float(values[at].nanmean()) for metric, values in self.values.items()}
        return out

    def by_group(self, groups: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Group -> metric -> mean, given the group of every prompt; empty without groups."""
        out: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(groups.values()):
            at = [index for index, prompt in enumerate(self.prompts) if groups.get(prompt) == name]
            if at:
                out[name] = {metric: float(values[at].nanmean()) for metric, values in self.values.items()}
        return out


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Rows: the controls that were asked for, `references` and `base`, then the variants in order."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    drawn: int = 0
    kept: int = 0  # pictures that were there already

    def row(self, label: str) -> Row:
        found = next((row for row in self.rows if row.label == label), None)
        if found is None:
            raise UsageError(f"no row {label!r}; the rows are {', '.join(row.label for row in self.rows)}")
        return found

    def difference(self, label: str, against: str) -> dict[str, Estimate]:
        """Metric -> mean of `label` minus `against`, picture by picture."""
        one, other = self.row(label), self.row(against)
        if one.factors != other.factors:
            raise UsageError(f"{label} and {against} do not show the same concepts, prompts and seeds; they cannot be paired")
        return {
            metric: paired(values, other.values[metric], factors=one.factors)
            for metric, values in one.values.items()
            if metric in other.values
        }

    def differences(self) -> list[tuple[str, str, dict[str, Estimate]]]:
        """Every variant against the base where it is there, and the later ones against the first."""
        labels = [row.label for row in self.rows]
        variants = [label for label in labels if label not in (BASE, REFERENCES)]
        pairs = [(label, BASE) for label in variants if BASE in labels] + [(label, variants[0]) for label in variants[1:]]
        return [(label, against, self.difference(label, against)) for label, against in pairs]

    def report(self) -> dict[str, Any]:
        """Everything, ready for JSON; what does not exist is None."""
        whole = {
            "settings": dict(self.settings),
            "rows": [
                {
                    "label": row.label,
                    "estimates": {metric: asdict(value) for metric, value in row.estimates().items()},
                    "by_concept": row.by_concept(),
                    "by_group": row.by_group(self.settings.get("groups", {})),
                    "confusion": row.confusion,
                    "curve": row.curve,
                    "pictures": [
                        {
                            "concept": row.concepts[k],
                            "prompt": row.prompts[k],
                            "seed": row.seeds[k],
                            **({"file": row.files[k]} if row.files else {}),
                            **{metric: float(values[k]) for metric, values in row.values.items()},
                        }
                        for k in range(len(row.concepts))
                    ],
                }
                for row in self.rows
            ],
            "differences": [
                {"of": label, "against": against, "estimates": {metric: asdict(value) for metric, value in found.items()}}
                for label, against, found in self.differences()
            ],
        }
        plain: dict[str, Any] = disk.plain(whole)
        return plain

    def save(self, path: str | Path) -> Path:
        """Whole or not at all."""
        target = Path(path)
        disk.make_folder(target.parent)
        disk.write(target, json.dumps(self.report(), indent=1, allow_nan=False) + "\n")
        return target
