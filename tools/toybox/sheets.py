"""Pictures of pictures for docs/results.md, from what `results.py` left in WORK: `python sheets.py WORK docs/figures`.

Rows are methods, columns the same people, prompts and seeds. What was not drawn is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from entries import MIXTURES, SCENES, SPLIT
from PIL import Image, ImageDraw, ImageFont
from results import slug
from rows import OWN

from loraclr.toybox import SIDE, open_toybox

TITLES = 256  # pixels for a row's name
GAP = 4
TABLE_ROWS = (
    "alone, edlora", "loraclr (ours)", "LoRACLR, paper", "MoS (gradient fusion)", "MoS (FedAvg)", "sum, tuned", "Orthogonal Adaptation",
    "Custom Diffusion", "P+", "alone, lora", "loraclr (ours), DB-LoRA inputs", "loraclr (ours), 1 round, DB-LoRA inputs",
    "DB-LoRA (FedAvg)", "base, class word",
)  # fmt: skip
PROMPT = "04-0"  # the picture of each person: number of the prompt, seed
SHOWN_SCENES = ("alike/2-0", "2-1", "3-0", "4-0", "5-0", "6-0")  # folder/people-seed
MIXED_ROWS = (OWN, *(name for name in MIXTURES if name != OWN))


def sheet(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """A named row of pictures below the other."""
    font = ImageFont.load_default(13)
    width = max(sum(image.width + GAP for image in row) for row in rows.values())
    out = Image.new("RGB", (TITLES + width, len(rows) * (SIDE + GAP)), "white")
    for number, (name, row) in enumerate(rows.items()):
        x, y = TITLES, number * (SIDE + GAP)
        ImageDraw.Draw(out).text((4, y + SIDE // 2 - 8), name, "black", font)
        for image in row:
            out.paste(image, (x, y))
            x += image.width + GAP
    return out


def opened(paths: Sequence[Path]) -> list[Image.Image]:
    """None at all where one is not there."""
    return [Image.open(path).convert("RGB") for path in paths] if all(path.is_file() for path in paths) else []


def first(folder: Path) -> Path:
    """The first prompt's picture; the folder itself where there is none."""
    return min(folder.glob("*-0.png"), default=folder)


def table(work: Path) -> dict[str, list[Image.Image]]:
    box = open_toybox()
    names = box.names(SPLIT)
    rows = {"one of the references": [box.references(name)[0] for name in names]}
    return rows | {
        label: opened([work / slug(label) / "pictures" / "row" / name / f"{PROMPT}.png" for name in names]) for label in TABLE_ROWS
    }


def scenes(work: Path) -> dict[str, list[Image.Image]]:
    return {label: opened([work / "scenes" / slug(label) / f"{scene}.png" for scene in SHOWN_SCENES]) for label in SCENES}


def mixture(work: Path) -> dict[str, list[Image.Image]]:
    """Two people, the things, the styles, and the two people in each style."""
    box = open_toybox()
    people = box.names(SPLIT)[:2]
    parts = [("people", people, ""), ("things", box.names("objects"), ""), ("styles", box.names("styles"), "")]
    parts += [("people in a style", people, style) for style in box.names("styles")]
    rows = {}
    for label in MIXED_ROWS:
        folders = [(work / slug(f"mixture {label} {group} {style}") / "pictures" / "row", names) for group, names, style in parts]
        rows[label] = opened([first(folder / name) for folder, names in folders for name in names])
    return rows


SHEETS = {"table1": table, "scenes": scenes, "mixture": mixture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, made in SHEETS.items():
        if rows := {label: images for label, images in made(arguments.work).items() if images}:
            sheet(rows).save(arguments.out / f"{name}.webp", quality=88)
            print(f"{arguments.out / name}.webp: {', '.join(rows)}")


if __name__ == "__main__":
    main()
