"""What a smaller rank costs: `python rank_plot.py STUDY.json [OUT.svg]`, from the rows `rank ...` and `1 round` of study.py.

Identity with its 95 % interval, and the mean residual on held-out prompts, over the rank that the merge was cut to: in the metric of its
own objective, and by plain SVD.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plots import chart, panel
from study import RANKS

KINDS = {"": "activation-aware", ", plain SVD": "plain SVD"}


def draw(study: Mapping[str, Mapping[str, Any]]) -> str:
    ranks = [rank for rank in RANKS if any(f"rank {rank}{kind}" in study for kind in KINDS)]
    labels = [*map(str, ranks), "full"]
    rows = {kind: [*(study.get(f"rank {rank}{kind}") for rank in ranks), study.get("1 round")] for kind in KINDS}
    identity = {kind: [(row["identity"], *row["identity_interval"]) if row else None for row in found] for kind, found in rows.items()}
    residual = {kind: [(row["held_out"],) * 3 if row else None for row in found] for kind, found in rows.items()}
    top = round(0.4 * math.ceil(max(one[0] for found in residual.values() for one in found if one) / 0.4), 1)
    panels = [
        panel(0, "identity, 95 % interval", identity, 0, 1, labels),
        panel(1, "residual, held-out prompts", residual, 0, top, labels),
    ]
    return chart("identity and residual over rank", panels, list(KINDS.values()))


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[2] / "docs" / "figures" / "rank.svg"
    target.write_text(draw(found))
    print(f"written: {target}")


if __name__ == "__main__":
    main()
