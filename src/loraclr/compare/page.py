"""The comparison as one page: numbers, heat maps and pictures in a file that asks for nothing from outside."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

from PIL import Image

from loraclr import disk
from loraclr.compare.comparison import Comparison, Entry
from loraclr.compare.measures import Measure
from loraclr.methods.crosstalk import CrossTalk
from loraclr.page import STYLE, img

INTRODUCTION = """<p>All merges are measured on the same features: those of each concept's own adapter, collected once. The <i>residual</i> is how far
a merged layer's output is from the adapter's own, on the merge's usual prompts and on prompts held out of them: 0 is the adapter, 1 the base.
<i>Strength</i> is how much of each adapter is left at scale 1. <i>Cross-talk</i> is how loud another concept still is on a concept's features, beside
its own adapter; unmerged, the adapters themselves are at <b>{before}</b>.</p>"""
COSTS = """<p>Lost is the most that the cut to its rank took from a layer, as a share of what the method solved for. Memory is the peak over what was
in use before.</p>"""
TALK = """<h2>Who is heard on whose features</h2>
<p>Row by row, the features of one concept. <span class="key own"></span> on the diagonal: its strength in the merge, full colour at 1.
<span class="key"></span> elsewhere: how loud each other concept is there, beside the row's own adapter. Hover for names and numbers.</p>
<div class="maps">{maps}</div>
<h2>Concept by concept</h2>
<p>Residual on held-out prompts, the mean over layers.</p>
<div class="wrap"><table class="num"><thead><tr><th></th>{names}</tr></thead><tbody>{rows}</tbody></table></div>"""
CELL, LABEL = 10, 30  # of a heat map: a square, and the room for names


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """The page, whole or not at all."""
    merged, inputs = comparison.merged, comparison.settings["inputs"]
    files = ", ".join(f"{html.escape(str(one['name']))} <code>{html.escape(str(one['call'] or '-'))}</code>" for one in inputs)
    measured = any(entry.measure for entry in merged)
    columns = ["residual, held out", "residual, usual", "strength", "cross-talk"] if measured else []
    heads = ["method", *columns, "rank", "lost", "file", "seconds", "memory"]
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    disk.write(
        path,
        page.substitute(
            style=STYLE,
            methods=len(merged),
            count=len(inputs),
            inputs=files,
            introduction=(INTRODUCTION.format(before=_number(comparison.before)) if measured else "") + COSTS,
            heads="".join(f"<th>{head}</th>" for head in heads),
            rows="".join(_row(entry, merged, measured) for entry in merged),
            skipped=_skipped(comparison),
            measured=_measured(merged) if measured else "",
            pictures=_scores(comparison) + _pictures(comparison) if comparison.pictures else "",
            settings=_settings(comparison),
        ),
    )
    return Path(path)


def _row(entry: Entry, merged: Sequence[Entry], measured: bool) -> str:
    cells = []
    if measured:
        best = min((one.residual for one in merged if not math.isnan(one.residual)), default=math.nan)
        own = entry.measure
        value = entry.residual
        shown = f"<b>{_number(value)}</b>" if value == best else _number(value)
        bar = "" if math.isnan(value) else f'<span class="bar" style="width:{min(value, 2) * 50:.0f}%"></span>'
        talk = own.cross_talk.summary() if own else {}
        cells = [
            shown + bar,
            _number(own.residual("fit") if own else math.nan),
            _number(talk.get("strength", math.nan)),
            _number(talk.get("after", math.nan)),
        ]
    low, high = entry.ranks
    memory = "–" if math.isnan(entry.megabytes) else f"{entry.megabytes:.0f} MB"
    cells += [
        str(low) if low == high else f"{low}–{high}",
        _share(entry.lost),
        f"{entry.size / 1e6:.1f} MB",
        f"{entry.seconds:.1f}",
        memory,
    ]
    return f"<tr><td>{html.escape(entry.label)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _skipped(comparison: Comparison) -> str:
    reasons = "".join(f"<li><b>{html.escape(', '.join(of))}</b>: {html.escape(why)}</li>" for why, of in comparison.reasons().items())
    return f"<h2>Not merged</h2><ul>{reasons}</ul>" if reasons else ""


def _measured(merged: Sequence[Entry]) -> str:
    measures: list[tuple[str, Measure]] = [(entry.label, entry.measure) for entry in merged if entry.measure]
    talk = measures[0][1].cross_talk
    maps = _map("before merging: the adapters themselves", talk, before=True)
    maps += "".join(_map(label, measure.cross_talk) for label, measure in measures)
    rows = ""
    for label, measure in measures:
        cells = "".join(f"<td>{_number(measure.residual(concept=name))}</td>" for name in talk.concepts)
        rows += f"<tr><td>{html.escape(label)}</td>{cells}</tr>"
    return TALK.format(maps=maps, names="".join(f"<th>{html.escape(name)}</th>" for name in talk.concepts), rows=rows)


def _map(label: str, talk: CrossTalk, *, before: bool = False) -> str:
    """(N, N) squares. Before a merge the diagonal is 1 by definition."""
    values, strength = (talk.before if before else talk.heard).tolist(), talk.after.diagonal().tolist()
    names, side, shapes = [html.escape(name) for name in talk.concepts], CELL * len(talk.concepts), ""
    for i, row in enumerate(values):
        shapes += f'<text x="-2" y="{i * CELL + 6.5}" text-anchor="end">{html.escape(talk.concepts[i][:9])}</text>'
        for j, value in enumerate(row):
            shown = strength[i] if i == j and not before else value
            if math.isnan(shown):
                continue
            what = f"{names[i]}: strength {shown:.2f}" if i == j else f"on {names[i]}, {names[j]} is heard at {shown:.2f}"
            place = f'x="{j * CELL}" y="{i * CELL}" width="{CELL - 1}" height="{CELL - 1}" rx="1"'
            own = ' class="own"' if i == j else ""
            shapes += f'<rect {place}{own} fill-opacity="{min(abs(shown), 1):.2f}"><title>{what}</title></rect>'
    return f'<figure><svg viewBox="{-LABEL} -1 {side + LABEL + 1} {side + 1}" role="img">{shapes}</svg><figcaption>{html.escape(label)}</figcaption></figure>'


def _scores(comparison: Comparison) -> str:
    found = comparison.scores()
    if not found:
        return ""
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    body = ""
    for label, values in found.items():
        cells = ""
        for name in names:
            one = values.get(name)
            cells += f"<td>{one.mean:.2f}<br><small>{one.low:.2f} – {one.high:.2f}</small></td>" if one else "<td></td>"
        body += f"<tr><td>{html.escape(label)}</td>{cells}</tr>"
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return (
        "<h2>Scores of pictures</h2><p>At equal prompts and seeds; below each mean its 95 % bootstrap interval over concepts, prompts and seeds.</p>"
        f'<div class="wrap"><table class="num"><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _pictures(comparison: Comparison) -> str:
    """One prompt and seed of each concept; all pictures are in the folder."""
    assert comparison.pictures is not None and comparison.folder is not None
    rows = [row for row in comparison.pictures.rows if row.files]
    first, body = rows[0], ""
    for name in dict.fromkeys(first.concepts):
        place = first.concepts.index(name)
        cells = ""
        for row in rows:
            with Image.open(comparison.folder / row.files[place]) as image:
                cells += f"<td>{img(image.convert('RGB'), 128, title=html.escape(f'{name}, {row.label}', quote=True))}</td>"
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    heads = "".join(f"<th>{html.escape(row.label)}</th>" for row in rows)
    said = f"Prompt <code>{html.escape(first.prompts[0])}</code>, seed {first.seeds[0]}."
    return (
        f"<h2>Pictures at equal seeds</h2><p>{said}</p>"
        f'<div class="wrap"><table class="faces"><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _settings(comparison: Comparison) -> str:
    settings, collected = comparison.settings, comparison.settings["collection"]
    parts = [f"base {settings['base'] or 'none: merged from the files alone'}", f"seed {settings['seed']}"]
    if settings["rank"] is not None:
        parts.append(f"at most rank {settings['rank']}")
    if collected:
        count = len(collected["fit"])
        parts.append(f"measured on {count} usual and {len(collected['held_out'])} held-out prompts, {collected['steps']} denoising steps")
    parts += [f"{name} {number}" for name, number in settings["versions"].items()]
    return html.escape(f"{'; '.join(parts)}.")


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.1%}" if value >= 5e-4 else "&lt;0.1%"
