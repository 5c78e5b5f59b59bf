"""Pictures of pictures: `python grids.py BASE OUT.webp [LORAS ...] [--names NAME ...]`, the base's own, or a row for every adapter.

Several folders RECIPE/SPLIT take turns: NAME by each recipe, then the next NAME. A row begins with one of the concept's references.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from base import LOOK, LOOK_WIDE
from PIL import Image
from sheets import sheet
from shown import pictures

from loraclr.formats import load_adapter
from loraclr.pipeline import Pipeline
from loraclr.toybox import open_toybox

TEMPLATES = (
    "a photo of a {}", "a {} on a beach", "a picture of a {} in the snow", "a {} in a forest", "a photo of a {} at night",
    "a {} on a blue background", "a portrait of a {} in a room", "a {} in a city",
)  # fmt: skip
STYLED = (
    "a smiling woman with long red hair in {}", "a dog in the snow in {}", "a man with a black afro in a city in {}",
    "a chair in a room in {}", "a woman on a beach in {}", "an angry man in a forest in {}", "a car in the desert in {}",
    "a house at night in {}",
)  # fmt: skip
ENDINGS = (".safetensors", ".pth")


def prompts(call: str) -> list[str]:
    return [template.format(call) for template in (STYLED if call.endswith(" style") else TEMPLATES)]


def found(folders: Sequence[Path], names: Sequence[str]) -> list[tuple[str, Path]]:
    """Recipe (empty where there is one folder) and file of every row. Raises SystemExit where a folder has none of that name."""
    files = [{f.stem: f for f in sorted(folder.iterdir()) if f.suffix in ENDINGS and ".tokens." not in f.name} for folder in folders]
    rows = []
    for name in names or list(files[0]):
        for folder, some in zip(folders, files, strict=True):
            if name not in some:
                raise SystemExit(f"{folder}: no adapter of the name {name!r}; there are {', '.join(some) or 'none'}")
            rows.append((folder.parent.name if len(folders) > 1 else "", some[name]))
    return rows


def base_rows(pipeline: Pipeline) -> dict[str, list[Image.Image]]:
    single = pictures(pipeline, LOOK)
    wide = pictures(pipeline, LOOK_WIDE, size=(64, 128))
    return {"one person or thing": single[:8], "and names, styles, no words": single[8:], "two people": wide}


def adapter_rows(pipeline: Pipeline, files: Sequence[tuple[str, Path]]) -> dict[str, list[Image.Image]]:
    box, rows = open_toybox(), {}
    for recipe, file in files:
        adapter = load_adapter(file)
        with pipeline.applied(adapter):
            label = ": ".join(part for part in (recipe, file.stem) if part)
            rows[label] = [box.references(file.stem)[0], *pictures(pipeline, prompts(adapter.call))]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("loras", type=Path, nargs="*")
    parser.add_argument("--names", nargs="+", default=[], help="of these concepts only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = found(arguments.loras, arguments.names) if arguments.loras else []
    pipeline = Pipeline.load(arguments.base)
    rows = adapter_rows(pipeline, files) if files else base_rows(pipeline)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(arguments.out, quality=88)


if __name__ == "__main__":
    main()
