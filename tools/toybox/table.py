"""One table of recipes: `python table.py MEASURED.json=ADAPTERS/SPLIT ...`, a row each, in Markdown.

MEASURED.json is of `measure.py`, ADAPTERS/SPLIT the folder with the `report.json` of `adapters.py`. Scores stand with their 95 %
interval, and the controls (trigger without an adapter, class word, somebody else's adapter) beside them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

COLUMNS = (
    "recipe", "steps", "seconds", "KB", "identity", "trigger only", "class word", "wrong adapter", "right person", "prompt",
    "ToyFace accepts", "text", "image",
)  # fmt: skip
CONTROLS = ("base, trigger only", "base, class word only", "wrong adapter, own trigger")


def share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def spread(found: Any) -> str:
    """A mean with its interval, or nothing where it was not measured."""
    return f"{share(found[0])} ({share(found[1])} - {share(found[2])})" if found else "-"


def line(measured: Mapping[str, Any], trained: Mapping[str, Mapping[str, Any]]) -> list[str]:
    own, rows = measured["single adapter"], list(trained.values())
    recipes = sorted({row["recipe"] for row in rows})
    face, clip = measured.get("toyface, single adapter", {}), measured.get("toyclip, single adapter", {})
    return [
        ", ".join(recipes),
        ", ".join(sorted({str(row["steps"]) for row in rows})),
        f"{mean(row['seconds'] for row in rows):.0f}",
        f"{mean(row['bytes'] for row in rows) / 1000:.0f}",
        spread([own["identity"], *own["identity_interval"]]),
        *(share(measured[control]["identity"]) for control in CONTROLS),
        share(own["named"]),
        share(own["told"]),
        spread(face.get("true accepts, mean reference")),
        spread(clip.get("text")),
        spread(clip.get("image")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", metavar="MEASURED.json=FOLDER")
    arguments = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for pair in arguments.pairs:
        measured, _, folder = pair.partition("=")
        cells = line(json.loads(Path(measured).read_text()), json.loads((Path(folder) / "report.json").read_text()))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
