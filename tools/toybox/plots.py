"""Line charts as SVG that follow the reader's light or dark colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1c1e26}.soft{fill:#5d6472}.line{stroke:#dfe2e8}path{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#eceef2}.soft{fill:#a3aab8}.line{stroke:#343944}}"
)
LEFT, TOP, SIDE, DEEP, GAP = 46, 44, 270, 210, 80  # the first panel's corner, a panel's width and height, and what is between two
COLOURS = ("#0f766e", "#c2410c", "#6d28d9")

Point = tuple[float, float, float]  # a mean and its interval


def panel(number: int, title: str, values: Mapping[str, Sequence[Point | None]], low: float, top: float, labels: Sequence[str]) -> str:
    """One drawing of kind -> points by place, None where there is none; the axis runs from `low` to `top`."""
    left = LEFT + number * (SIDE + GAP)

    def y(value: float) -> float:
        return TOP + DEEP * (1 - (min(max(value, low), top) - low) / (top - low))

    step = SIDE / (len(labels) - 1)
    parts = [f'<text x="{left}" y="{TOP - 14}" font-weight="600">{title}</text>']
    for k in range(5):
        at = low + (top - low) * k / 4
        parts.append(f'<line class="line" x1="{left}" x2="{left + SIDE}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>')
        parts.append(f'<text class="soft" x="{left - 8}" y="{y(at) + 4:.1f}" text-anchor="end">{at:.3g}</text>')
    for k, label in enumerate(labels):
        parts.append(f'<text class="soft" x="{left + k * step:.1f}" y="{TOP + DEEP + 20}" text-anchor="middle">{label}</text>')
    for k, (found, colour) in enumerate(zip(values.values(), COLOURS, strict=False)):
        shift = 6 * (k - (len(values) - 1) / 2)
        places = [(left + place * step + shift, one) for place, one in enumerate(found) if one is not None]
        parts.append(f'<path stroke="{colour}" d="M{" L".join(f"{x:.1f} {y(one[0]):.1f}" for x, one in places)}"/>')
        for x, (mean, least, most) in places:
            parts.append(f'<line stroke="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y(least):.1f}" y2="{y(most):.1f}"/>')
            parts.append(f'<circle fill="{colour}" cx="{x:.1f}" cy="{y(mean):.1f}" r="3"><title>{mean:.3f}</title></circle>')
    return "".join(parts)


def chart(told: str, panels: Sequence[str], kinds: Sequence[str]) -> str:
    """Panels side by side over a legend; `told` says to those who cannot see it what it shows."""
    width, height = LEFT + len(panels) * (SIDE + GAP), TOP + DEEP + 66
    legend = ""
    for k, (kind, colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        legend += f'<circle fill="{colour}" cx="{LEFT + 190 * k}" cy="{height - 14}" r="4"/>'
        legend += f'<text x="{LEFT + 10 + 190 * k}" y="{height - 10}">{kind}</text>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{told}">'
    return f"{head}<style>{STYLE}</style>{''.join(panels)}{legend}</svg>\n"
