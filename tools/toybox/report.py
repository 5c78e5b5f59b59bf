"""Writes the tables of docs/results.md from the rows of `results.py`: `python report.py EVIDENCE docs/results.md [--against NEW.json]`.

EVIDENCE is the folder with table1.json and the figures' files. What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is made here.
`--against` says instead whether rows drawn anew lie within the intervals of EVIDENCE's table1.json; if not, it exits with 1.
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
from results import TABLE
from torch import Tensor

from loraclr.evaluate import Estimate, estimate, paired

Known = Mapping[str, Mapping[str, Any]]
SHOWN = ("text", "image", "identity", "attributes")


def values(row: Mapping[str, Any], measure: str, names: Sequence[str] = ()) -> Tensor:
    """(concepts, prompts, seeds) values of a row, NaN where there is none; of `names` only."""
    whole = torch.tensor([math.nan if value is None else value for value in row["values"][measure]], dtype=torch.float64)
    shaped = whole.view(len(row["concepts"]), row["prompts"], row["seeds"])
    return shaped[[row["concepts"].index(name) for name in names]] if names else shaped


def factors(shaped: Tensor) -> list[list[int]]:
    """Concept, prompt and seed of each value, all three drawn anew by intervals."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in shaped.shape))
    return [column.tolist() for column in places.view(-1, 3).unbind(1)]


def mean_of(row: Mapping[str, Any], measure: str) -> Estimate:
    shaped = values(row, measure)
    return estimate(shaped.flatten(), factors=factors(shaped))


def difference(row: Mapping[str, Any], alone: Mapping[str, Any], measure: str) -> Estimate:
    """Merged minus alone, over the pictures that both have."""
    ours, theirs = values(row, measure), values(alone, measure, row["concepts"])
    seeds = min(ours.shape[2], theirs.shape[2])
    ours, theirs = ours[:, :, :seeds], theirs[:, :, :seeds]
    return paired(ours.flatten(), theirs.flatten(), factors=factors(ours))


def number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def spread(found: Estimate, *, signed: bool = False) -> str:
    told = [f"{value:+.3f}".replace("0.", ".", 1) if signed else number(value) for value in (found.mean, found.low, found.high)]
    return f"{told[0]} ({told[1]} to {told[2]})"


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


def header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def counts(known: Known, table: Known) -> str:
    """Mean difference to each adapter alone, over the orders: of all merged concepts, and of the first two of each order."""
    lines = header("concepts", "method", "identity, all", "attributes, all", "attributes, the first two", "image, all", "text, all")
    merged: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for name, row in known.items():
        if row["kind"] == "merged":
            count, _, method = name.split(", ")
            merged.setdefault((int(count.split()[0]), method), []).append(row)
    for (count, method), rows in sorted(merged.items()):
        told = []
        for measure, part in (("identity", 12), ("attributes", 12), ("attributes", 2), ("image", 12), ("text", 12)):
            told.append(mean([lost(row, known["alone, edlora"], measure, row["concepts"][:part]) for row in rows]))
        lines.append(f"| {count} | {method} | {' | '.join(f'{value:+.3f}' for value in told)} |")
    return "\n".join(lines)


def lost(row: Mapping[str, Any], alone: Mapping[str, Any], measure: str, names: Sequence[str]) -> float:
    return float(values(row, measure, names).nanmean() - values(alone, measure, names).nanmean())


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


FIGURES = {"counts": counts, "margins": margins, "inputs": inputs, "scenes": scenes}


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
    blocks = {"table1": table1(table), "controls": controls(table), "paper": paper(table)}
    for name, render in FIGURES.items():
        if (file := arguments.evidence / f"{name}.json").exists():
            blocks[name] = render(json.loads(file.read_text()), table)
    arguments.page.write_text(written(arguments.page.read_text(), blocks))


if __name__ == "__main__":
    main()
