"""Writes the tables of docs/results.md from the rows of `results.py`: `python report.py EVIDENCE docs/results.md [--against NEW.json]`.

EVIDENCE is the folder with table1.json and the figures' files. What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is made here,
and so are the plots in figures/ beside the page. `--against` says instead whether rows drawn anew lie within the intervals of EVIDENCE's
table1.json; if not, it exits with 1.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from claims import Evidence, claims
from entries import TABLE, WHOLE, orders
from plots import STYLE, Point, chart, panel
from rows import OWN, SHOWN, Known, beside, difference, differences, group_values, header, mean_of, number, present, spread, values

from loraclr.evaluate import Estimate, estimate, paired
from loraclr.evaluate.subjects import read_prompts
from loraclr.toybox import open_toybox

SCORES = ("identity", "image", "text")


def table1(known: Known) -> str:
    """Every entry against its adapters alone: means of the same pictures, and the paired difference with its interval."""
    lines = [
        "| merge of 12 | inputs | seeds | text | | image | | identity | | attributes | | leakage | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| | | | alone, merged | difference | alone, merged | difference | alone, merged | difference | alone, merged | difference | | |",
    ]
    for name in TABLE:
        if name not in known:
            continue
        row, alone = known[name], known[f"alone, {known[name]['recipe']}"]
        cells = [name, row["recipe"], str(row["seeds"])]
        for measure in SHOWN:
            cells.append(", ".join(map(number, beside(row, alone, measure))))
            cells.append(spread(difference(row, alone, measure), signed=True))
        cells += [number(mean_of(row, "leakage").mean), f"{row['merge_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def controls(known: Known) -> str:
    lines = ["| what | text | image | identity | attributes | leakage |", "|---|---|---|---|---|---|"]
    for name, row in known.items():
        if row["kind"] != "merged":
            lines.append(f"| {name} | {' | '.join(spread(mean_of(row, measure)) for measure in (*SHOWN, 'leakage'))} |")
    return "\n".join(lines)


def groups(known: Known) -> str:
    """Identity and text by the group of prompts: recipes alone, and below each what is merged of it by us."""
    kinds = list(read_prompts(open_toybox().prompts_path).values())  # of each of a row's prompts
    names = list(dict.fromkeys(kinds))
    lines = header("identity, text", *names)
    ours = [name for name in TABLE if name.startswith("loraclr (ours)") and name in known]
    for recipe in dict.fromkeys(known[name]["recipe"] for name in ours):
        labels = (f"alone, {recipe}", *(name for name in ours if known[name]["recipe"] == recipe))
        seeds = min(known[label]["seeds"] for label in labels)  # that all of them have
        for label in labels:
            shown = {measure: values(known[label], measure)[:, :, :seeds].nanmean(dim=(0, 2)) for measure in ("identity", "text")}
            cells = []
            for name in names:
                chosen = [index for index, kind in enumerate(kinds) if kind == name]
                cells.append(", ".join(number(float(shown[measure][chosen].mean())) for measure in ("identity", "text")))
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paper(known: Known) -> str:
    """The published numbers beside ours: single -> merged, and the difference. Only differences may be compared."""
    lines = ["| row | | text | image | identity |", "|---|---|---|---|---|"]
    for name, entry in TABLE.items():
        if name in known and entry.paper:
            pairs = [entry.paper[k : k + 2] for k in (0, 2, 4)]
            lines.append(f"| {name} | paper | {' | '.join(f'{number(a)} -> {number(b)} ({b - a:+.3f})' for a, b in pairs)} |")
            row, alone = known[name], known[f"alone, {known[name]['recipe']}"]
            ours = [beside(row, alone, measure) for measure in ("text", "image", "identity")]
            lines.append(f"| | here | {' | '.join(f'{number(a)} -> {number(b)} ({b - a:+.3f})' for a, b in ours)} |")
    return "\n".join(lines)


def memory(known: Known) -> str:
    """What merging and drawing take."""
    lines = header("merge of 12", "merging, s of a core", "merging, MB above the loaded base", "a picture, s of a core")
    for name in TABLE:
        if name in known:
            row = known[name]
            pictures = len(row["concepts"]) * row["prompts"] * row["seeds"]
            held, drawing = row.get("merge_megabytes"), row["drawing_seconds"]  # None where pictures were there already
            each = "-" if drawing is None else f"{drawing / pictures:.2f}"
            cells = (f"{row['merge_seconds']:.0f}", "-" if held is None else str(held), each)
            lines.append(f"| {' | '.join((name, *cells))} |")
    return "\n".join(lines)


def counted(known: Known, table: Known) -> dict[tuple[int, str], list[Estimate]]:
    """(concepts, method) -> the paired difference to each adapter alone, over the orders, measure by measure: all, and the first two.

    With all twelve there is one merge, whose first two are those of every order.
    """
    merged: dict[tuple[int, str], list[tuple[Known, Mapping[str, Any], Sequence[str]]]] = {}
    for name, row in known.items():
        if row["kind"] == "merged":
            count, _, method = name.split(", ")
            merged.setdefault((int(count.split()[0]), method), []).append((known, row, row["concepts"][:2]))
    for method, name in WHOLE.items():
        if name in table:
            row = table[name]
            merged[len(row["concepts"]), method] = [(table, row, order[:2]) for order in orders(row["concepts"])]
    found: dict[tuple[int, str], list[Estimate]] = {}
    for key, rows in sorted(merged.items(), key=lambda item: (item[0][0], list(WHOLE).index(item[0][1]))):
        every = list({id(row): (row, where["alone, edlora"], row["concepts"]) for where, row, _ in rows}.values())  # one merge, or three
        first = [(row, where["alone, edlora"], pair) for where, row, pair in rows]
        found[key] = [differences(part, measure) for measure in SCORES for part in (every, first)]
    return found


def counts(known: Known, table: Known) -> str:
    lines = header("concepts", "method", *(f"{measure}, {who}" for measure in SCORES for who in ("all", "the first two")))
    for (count, method), told in counted(known, table).items():
        lines.append(f"| {count} | {method} | {' | '.join(spread(one, signed=True) for one in told)} |")
    return "\n".join(lines)


def counts_plot(known: Known, table: Known) -> str:
    """Fig. 5: the three measures over the number of concepts, of all that are merged."""
    found = counted(known, table)
    numbers, panels = sorted({count for count, _ in found}), []
    for k, measure in enumerate(SCORES):
        values = {method: [_point(found.get((count, method)), 2 * k) for count in numbers] for method in WHOLE}
        ends = [end for points in values.values() for point in points if point for end in point]
        low, top = math.floor(10 * min(ends)) / 10, math.ceil(10 * max(ends)) / 10
        panels.append(panel(k, f"{measure}, to each adapter alone", values, low, top, [str(count) for count in numbers]))
    return chart("identity, image and text alignment over the number of concepts", panels, list(WHOLE))


def _point(told: Sequence[Estimate] | None, place: int) -> Point | None:
    return (told[place].mean, told[place].low, told[place].high) if told else None


def beyond(known: Known, table: Known) -> str:
    """More people than Table 1 has; the difference to each adapter alone."""
    titles = [f"{measure}{what}" for measure in SCORES for what in ("", ", to alone")]
    lines = header("identities", "method", *titles, "merging, s of a core")
    for name, row in known.items():
        if row["kind"] == "merged":
            (count, method), alone, told = name.split(", "), known[f"alone, {row['recipe']}"], []
            for measure in SCORES:
                told += [number(beside(row, alone, measure)[1]), spread(difference(row, alone, measure), signed=True)]
            lines.append(f"| {' | '.join([count.split()[0], method, *told, format(row['merge_seconds'], '.0f')])} |")
    return "\n".join(lines)


def margins(known: Known, table: Known) -> str:
    """Each setting, and the paired difference to no contrast."""
    lines = header("merge", "identity", "to no contrast", "attributes", "text", "layers with an active hinge")
    for name, row in known.items():
        if row["kind"] == "merged":
            none = known.get(f"{name.split(', ')[0]}, no contrast", row)
            told = [number(mean_of(row, "identity").mean), "" if none is row else spread(difference(row, none, "identity"), signed=True)]
            told += [number(mean_of(row, measure).mean) for measure in ("attributes", "text")]
            lines.append(f"| {name} | {' | '.join(told)} | {'-' if row.get('hinge') is None else number(row['hinge'])} |")
    return "\n".join(lines)


def margins_map(known: Known, table: Known) -> str:
    """Fig. 8: identity by margin and lambda, 5 and 12 concepts, the more the darker."""
    found = {name: mean_of(row, "identity").mean for name, row in known.items() if row["kind"] == "merged"}
    counts = sorted({int(name.split()[0]) for name in found})
    settings = list(dict.fromkeys(name.split(", ", 1)[1] for name in found))
    least, most = min(found.values()), max(found.values())
    parts = [f"<style>{STYLE}</style>"]
    for column, count in enumerate(counts):
        parts.append(f'<text x="{270 + 110 * column}" y="20" text-anchor="middle">{count} concepts</text>')
    for line, setting in enumerate(settings):
        parts.append(f'<text x="200" y="{49 + 28 * line}" text-anchor="end">{setting}</text>')
        for column, count in enumerate(counts):
            value = found.get(f"{count} concepts, {setting}")
            if value is not None:
                deep = (value - least) / (most - least) if most > least else 1.0
                x, y = 216 + 110 * column, 30 + 28 * line
                parts.append(f'<rect x="{x}" y="{y}" width="108" height="26" fill="#0f766e" fill-opacity="{0.08 + 0.6 * deep:.2f}"/>')
                parts.append(f'<text x="{x + 54}" y="{y + 18}" text-anchor="middle">{number(value)}</text>')
    head = f'viewBox="0 0 {220 + 110 * len(counts)} {40 + 28 * len(settings)}" role="img" aria-label="identity by margin and lambda"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head}>{"".join(parts)}</svg>\n'


def inputs(known: Known, table: Known) -> str:
    """How far a merge depends on what goes in; the fully trained rows are those of Table 1."""
    lines = header("inputs", *(f"{one}: {what}" for one in ("identity", "attributes") for what in ("alone", "merged", "difference")))
    whole = {"all of the steps, lora": "loraclr (ours), 1 round, DB-LoRA inputs", "all of the steps, edlora": "loraclr (ours), 1 round"}
    rows = [(name, row, known) for name, row in known.items() if row["kind"] == "merged"]
    rows += [(label, table[name], table) for label, name in whole.items() if name in table]
    for name, row, where in rows:
        alone, cells = where[f"alone, {row['recipe']}"], []
        for measure in ("identity", "attributes"):
            apart = difference(row, alone, measure)
            cells += [spread(mean_of(alone, measure)), spread(mean_of(row, measure)), spread(apart, signed=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tuning(known: Known, table: Known) -> str:
    """Settings of other methods on the people on whom choices are made; the difference is to each adapter alone."""
    lines = header("merge of 12", *(f"{measure}{what}" for measure in SHOWN for what in ("", ", to alone")))
    for name, row in known.items():
        if row["kind"] == "merged":
            alone, cells = known[f"alone, {row['recipe']}"], []
            for measure in SHOWN:
                cells += [number(beside(row, alone, measure)[1]), spread(difference(row, alone, measure), signed=True)]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def scenes(known: Known, table: Known) -> str:
    """Presence by number of people, all of them with its interval; seconds of one core a picture of two."""
    known = {name: row for name, row in known.items() if row["kind"] != "free"}
    places = sorted({(one["people"], not one["alike"]) for row in known.values() for one in row["rows"]})
    titles = [f"{count}{'' if any_kind else ' of a kind'}: present, all" for count, any_kind in places]
    lines = header("how they are kept apart", *titles, "all numbers: present", "taken for another", "attributes", "s, two people")
    for name, row in known.items():
        told = {(one["people"], not one["alike"]): one for one in row["rows"]}
        cells = [f"{number(told[at]['present'])}, {number(told[at]['all present'])}" if at in told else "-" for at in places]
        attributes = [value for one in row["rows"] if not one["alike"] for scene in one["attributes"] for value in scene]
        strangers = mean(one["taken for another"] for one in row["rows"] if not one["alike"])
        cells += [spread(present(row)), number(strangers), number(mean(attributes)), format(told[2, True]["seconds"], ".1f")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def unplaced(known: Known) -> str:
    """Scenes of two without regions, by who is named first: presence, ToyFace's closeness, attributes, with intervals over scenes."""
    lines = header(
        "two people by one prompt", *(f"{who}: {what}" for who in ("first", "second") for what in ("present", "closeness", "attributes"))
    )
    for name, row in known.items():
        if row["kind"] == "free":
            faces, attributes = (torch.tensor([scene for one in row["rows"] for scene in one[what]]) for what in ("faces", "attributes"))
            limit = row["rows"][0]["limit"]
            cells = [spread(estimate(told[:, who])) for who in (0, 1) for told in ((faces >= limit).float(), faces, attributes)]
            lines.append(f"| {' | '.join([name.removesuffix(', no regions'), *cells])} |")
    return "\n".join(lines)


def mixture(known: Known, table: Known) -> str:
    """Means of every kind of concept, and the difference to the own adapters; text, image, and ToyFace's cosine where there are faces."""
    lines = header("kind", "measure", *(name for name in known if name != OWN), OWN)
    for kind in ("people", "things", "styles", "people in a style"):
        for measure in ("text", "image", "face_cosine"):
            if measure in known[OWN]["groups"][kind]:
                own, factors = group_values(known[OWN], kind, measure)
                cells = []
                for name, row in known.items():
                    found = group_values(row, kind, measure)[0]
                    if name != OWN:
                        cells.append(f"{number(float(found.nanmean()))}, {spread(paired(found, own, factors=factors), signed=True)}")
                lines.append(f"| {' | '.join([kind, measure.replace('_', ' '), *cells, spread(estimate(own, factors=factors))])} |")
    return "\n".join(lines)


def development(known: Known, table: Known) -> str:
    """The same as Table 1 and its controls, of the people on whom choices are made."""
    return "\n\n".join((table1(known), controls(known), groups(known)))


def rounds(table: Known, chosen_on: Known) -> str:
    """What the second round adds to our merge: of two rows at the same prompts and seeds, with it minus without."""
    lines = header("people", "inputs", *SHOWN, "merging, s of a core")
    for people, known in (("development", chosen_on), ("test", table)):
        for name in TABLE:
            after = name.replace(", 1 round", "")
            if name != after and name in known and after in known:
                cells = [spread(difference(known[after], known[name], measure), signed=True) for measure in SHOWN]
                seconds = f"{known[name]['merge_seconds']:.0f}, {known[after]['merge_seconds']:.0f}"
                lines.append(f"| {' | '.join((people, known[name]['recipe'], *cells, seconds))} |")
    return "\n".join(lines)


FIGURES = {
    "development": development, "counts": counts, "beyond": beyond, "margins": margins, "inputs": inputs, "scenes": scenes,
    "mixture": mixture, "tuning": tuning,
}  # fmt: skip

PLOTS = {"counts": counts_plot, "margins": margins_map}


def apart(known: Known, new: Known) -> list[str]:
    """Rows of `new` whose mean is outside the known interval, and those that are not known."""
    found = [f"{name}: not among the committed rows" for name in new if name not in known]
    for name, measure in ((name, measure) for name in new if name in known for measure in SHOWN):
        was, now = mean_of(known[name], measure), mean_of(new[name], measure)
        if not was.low - 1e-9 <= now.mean <= was.high + 1e-9:
            found.append(f"{name}: {measure} {now.mean:.3f}, committed {spread(was)}")
    return found


def written(text: str, blocks: Mapping[str, str]) -> str:
    """`text` with each block in its place. Raises SystemExit if there is none."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name}\b[^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"there is no <!-- {name} --> ... <!-- end of {name} --> to write to")
        text = pattern.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evidence", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--against", type=Path, metavar="NEW.json")
    arguments = parser.parse_args()
    table = json.loads((arguments.evidence / "table1.json").read_text())
    if arguments.against:
        problems = apart(table, json.loads(arguments.against.read_text()))
        print("\n".join(problems) or "all rows lie within the committed intervals")
        raise SystemExit(bool(problems))
    figures = {path.stem: json.loads(path.read_text()) for path in arguments.evidence.glob("*.json") if path.stem in FIGURES}
    blocks = {name: FIGURES[name](known, table) for name, known in figures.items()}
    if "scenes" in figures:
        blocks["unplaced"] = unplaced(figures["scenes"])
    for name, drawn in PLOTS.items():
        if name in figures:
            (arguments.page.parent / "figures").mkdir(exist_ok=True)
            (arguments.page.parent / "figures" / f"{name}.svg").write_text(drawn(figures[name], table))
    blocks |= {made.__name__: made(table) for made in (table1, controls, groups, paper, memory)}
    if "development" in figures:
        blocks["rounds"] = rounds(table, figures["development"])
    blocks["claims"] = claims(Evidence(table, figures))
    arguments.page.write_text(written(arguments.page.read_text(), blocks))


if __name__ == "__main__":
    main()
