"""Writes the tables of docs/results.md from the rows of `results.py`: `python report.py EVIDENCE docs/results.md [--against NEW.json]`.

EVIDENCE is the folder with table1.json and the figures' files. What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is made here.
`--against` says instead whether rows drawn anew lie within the intervals of EVIDENCE's table1.json; if not, it exits with 1.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from claims import Evidence, claims
from results import TABLE, WHOLE, orders
from rows import OWN, SHOWN, Known, difference, header, lost, mean_of, number, spread


def table1(known: Known) -> str:
    """Every entry against its adapters alone: means, and below them the paired difference with its interval."""
    lines = [
        "| merge of 12 | inputs | text | | image | | identity | | attributes | | leakage | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| | | alone, merged | difference | alone, merged | difference | alone, merged | difference | alone, merged | difference | | |",
    ]
    for name in TABLE:
        if name not in known:
            continue
        row, alone = known[name], known[f"alone, {known[name]['recipe']}"]
        cells = [name, row["recipe"]]
        for measure in SHOWN:
            cells.append(f"{number(mean_of(alone, measure).mean)}, {number(mean_of(row, measure).mean)}")
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


def paper(known: Known) -> str:
    """The published numbers beside ours: single -> merged, and the difference. Only differences may be compared."""
    lines = ["| row | | text | image | identity |", "|---|---|---|---|---|"]
    for name, entry in TABLE.items():
        if name in known and entry.paper:
            pairs = [entry.paper[k : k + 2] for k in (0, 2, 4)]
            lines.append(f"| {name} | paper | {' | '.join(f'{number(a)} -> {number(b)} ({b - a:+.3f})' for a, b in pairs)} |")
            row, alone = known[name], known[f"alone, {known[name]['recipe']}"]
            ours = [(mean_of(alone, measure).mean, mean_of(row, measure).mean) for measure in ("text", "image", "identity")]
            lines.append(f"| | here | {' | '.join(f'{number(a)} -> {number(b)} ({b - a:+.3f})' for a, b in ours)} |")
    return "\n".join(lines)


def counts(known: Known, table: Known) -> str:
    """Mean difference to each adapter alone, over the orders: of all merged concepts, and of the first two of each order.

    With all twelve, there is one merge whose first two are those of every order.
    """
    lines = header("concepts", "method", "identity, all", "attributes, all", "attributes, the first two", "image, all", "text, all")
    merged: dict[tuple[int, str], list[tuple[Known, Mapping[str, Any], Sequence[str]]]] = {}
    for name, row in known.items():
        if row["kind"] == "merged":
            count, _, method = name.split(", ")
            merged.setdefault((int(count.split()[0]), method), []).append((known, row, row["concepts"][:2]))
    for method, name in WHOLE.items():
        if name in table:
            row = table[name]
            merged[len(row["concepts"]), method] = [(table, row, order[:2]) for order in orders(row["concepts"])]
    for (count, method), rows in sorted(merged.items(), key=lambda item: (item[0][0], list(WHOLE).index(item[0][1]))):
        told = []
        for measure, first in (("identity", False), ("attributes", False), ("attributes", True), ("image", False), ("text", False)):
            told.append(mean(lost(row, where["alone, edlora"], measure, pair if first else row["concepts"]) for where, row, pair in rows))
        lines.append(f"| {count} | {method} | {' | '.join(f'{value:+.3f}' for value in told)} |")
    return "\n".join(lines)


def margins(known: Known, table: Known) -> str:
    lines = header("merge", "identity", "attributes", "text", "layers with an active hinge")
    for name, row in known.items():
        if row["kind"] == "merged":
            told = [spread(mean_of(row, measure)) for measure in ("identity", "attributes", "text")]
            lines.append(f"| {name} | {' | '.join(told)} | {'-' if row.get('hinge') is None else number(row['hinge'])} |")
    return "\n".join(lines)


def inputs(known: Known, table: Known) -> str:
    """How far a merge depends on what goes in; the fully trained rows are those of Table 1."""
    lines = header("inputs", *(f"{one}: {what}" for one in ("identity", "attributes") for what in ("alone", "merged", "difference")))
    whole = {"all of the steps, lora": "loraclr (ours), DB-LoRA inputs", "all of the steps, edlora": "loraclr (ours)"}
    rows = [(name, row, known) for name, row in known.items() if row["kind"] == "merged"]
    rows += [(label, table[name], table) for label, name in whole.items() if name in table]
    for name, row, where in rows:
        alone, cells = where[f"alone, {row['recipe']}"], []
        for measure in ("identity", "attributes"):
            apart = difference(row, alone, measure)
            cells += [spread(mean_of(alone, measure)), spread(mean_of(row, measure)), spread(apart, signed=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scenes(known: Known, table: Known) -> str:
    """Presence by number of people; seconds of one core a picture of two."""
    counts = sorted({one["people"] for row in known.values() for one in row["rows"]})
    lines = header("how they are kept apart", *(f"{count} people: present, all present" for count in counts), "s, two people")
    for name, row in known.items():
        told = {one["people"]: one for one in row["rows"]}
        cells = [f"{number(told[n]['present'])}, {number(told[n]['all present'])}" if n in told else "-" for n in counts]
        lines.append(f"| {' | '.join([name, *cells, format(told[2]['seconds'], '.1f')])} |")
    return "\n".join(lines)


def mixture(known: Known, table: Known) -> str:
    """Means of every kind of concept, and the difference to the own adapters; text, image, and ToyFace's cosine where there are faces."""
    kinds = ("people", "things", "styles", "people in a style")
    own = known[OWN]["groups"]
    lines = header("one model of 18", *(f"{kind}: text, image{', face' if 'people' in kind else ''}" for kind in kinds))
    for name, row in known.items():
        cells = []
        for kind in kinds:
            told = [(mean(values), mean(own[kind][measure])) for measure, values in row["groups"][kind].items()]
            cells.append(
                ", ".join(number(value) if row["kind"] == "alone" else f"{number(value)} ({value - was:+.3f})" for value, was in told)
            )
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


FIGURES = {"counts": counts, "margins": margins, "inputs": inputs, "scenes": scenes, "mixture": mixture}


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
    blocks |= {"table1": table1(table), "controls": controls(table), "paper": paper(table), "claims": claims(Evidence(table, figures))}
    arguments.page.write_text(written(arguments.page.read_text(), blocks))


if __name__ == "__main__":
    main()
