"""What a smaller rank costs: `python rank_plot.py STUDY.json [OUT.svg]`, from the rows `rank ...` and `loraclr` of study.py.

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

from study import RANKS

WIDTH, HEIGHT, LEFT, TOP, SIDE = 720, 320, 46, 44, 270  # of the drawing; a panel's corner and its width
DEEP = 210  # a panel's height
KINDS = {"": ("#0f766e", "activation-aware"), ", plain SVD": ("#c2410c", "plain SVD")}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1c1e26}.soft{fill:#5d6472}.line{stroke:#dfe2e8}path{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#eceef2}.soft{fill:#a3aab8}.line{stroke:#343944}}"
)


def panel(title: str, left: float, values: Mapping[str, list[tuple[float, float, float] | None]], top: float, labels: list[str]) -> str:
    """One drawing of kind -> (mean, low, high) by place; the axis runs from 0 to `top`."""

    def y(value: float) -> float:
        return TOP + DEEP * (1 - min(max(value, 0), top) / top)

    step = SIDE / (len(labels) - 1)
    parts = [f'<text x="{left}" y="{TOP - 14}" font-weight="600">{title}</text>']
    for k in range(5):
        at = top * k / 4
        parts.append(f'<line class="line" x1="{left}" x2="{left + SIDE}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>')
        parts.append(f'<text class="soft" x="{left - 8}" y="{y(at) + 4:.1f}" text-anchor="end">{at:g}</text>')
    for k, label in enumerate(labels):
        parts.append(f'<text class="soft" x="{left + k * step:.1f}" y="{TOP + DEEP + 20}" text-anchor="middle">{label}</text>')
    for shift, (kind, found) in zip((-3, 3), values.items(), strict=True):
        colour, places = KINDS[kind][0], [(left + k * step + shift, one) for k, one in enumerate(found) if one is not None]
        parts.append(f'<path stroke="{colour}" d="M{" L".join(f"{x:.1f} {y(one[0]):.1f}" for x, one in places)}"/>')
        for x, (mean, low, high) in places:
            parts.append(f'<line stroke="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>')
            parts.append(f'<circle fill="{colour}" cx="{x:.1f}" cy="{y(mean):.1f}" r="3"><title>{mean:.3f}</title></circle>')
    return "".join(parts)


def draw(study: Mapping[str, Mapping[str, Any]]) -> str:
    ranks = [rank for rank in RANKS if any(f"rank {rank}{kind}" in study for kind in KINDS)]
    labels = [*map(str, ranks), "full"]
    rows = {kind: [*(study.get(f"rank {rank}{kind}") for rank in ranks), study.get("loraclr")] for kind in KINDS}
    identity = {kind: [(row["identity"], *row["identity_interval"]) if row else None for row in found] for kind, found in rows.items()}
    residual = {kind: [(row["held_out"],) * 3 if row else None for row in found] for kind, found in rows.items()}
    top = max(one[0] for found in residual.values() for one in found if one)
    legend = ""
    for k, (colour, words) in enumerate(KINDS.values()):
        legend += f'<circle fill="{colour}" cx="{LEFT + 150 * k}" cy="{HEIGHT - 14}" r="4"/>'
        legend += f'<text x="{LEFT + 10 + 150 * k}" y="{HEIGHT - 10}">{words}</text>'
    second = LEFT + SIDE + 80
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="identity and residual over rank">'
        f"<style>{STYLE}</style>{panel('identity, 95 % interval', LEFT, identity, 1.0, labels)}"
        f"{panel('residual, held-out prompts', second, residual, round(0.4 * math.ceil(top / 0.4), 1), labels)}{legend}</svg>\n"
    )


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[2] / "docs" / "rank.svg"
    target.write_text(draw(found))
    print(f"written: {target}")


if __name__ == "__main__":
    main()
