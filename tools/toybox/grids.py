"""Pictures of pictures: `python grids.py BASE OUT.webp [LORAS]`, the base's own, or a row for every adapter in a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from base import LOOK, LOOK_WIDE
from PIL import Image
from shown import pictures

from loraclr.formats import load_adapter
from loraclr.pipeline import Pipeline

TEMPLATES = (
    "a photo of a {}", "a {} on a beach", "a picture of a {} in the snow", "a {} in a forest", "a photo of a {} at night",
    "a {} on a blue background", "a portrait of a {} in a room", "a {} in a city",
)  # fmt: skip
STYLED = (
    "a smiling woman with long red hair", "a dog in the snow", "a man with a black afro in a city", "a chair in a room",
    "a woman on a beach", "an angry man in a forest", "a car in the desert", "a house at night",
)  # fmt: skip
ENDINGS = (".safetensors", ".pth")


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures of one height, left-aligned."""
    height = rows[0][0].height
    out = Image.new("RGB", (max(sum(image.width for image in row) for row in rows), height * len(rows)), "white")
    for number, row in enumerate(rows):
        x = 0
        for image in row:
            out.paste(image, (x, number * height))
            x += image.width
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("loras", type=Path, nargs="?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, rows = Pipeline.load(arguments.base), []
    if arguments.loras:
        for file in sorted(file for file in arguments.loras.iterdir() if file.suffix in ENDINGS and ".tokens." not in file.name):
            adapter = load_adapter(file)
            prompts = (
                [f"{text} in {adapter.call}" for text in STYLED]
                if adapter.call.endswith(" style")
                else [t.format(adapter.call) for t in TEMPLATES]
            )
            with pipeline.applied(adapter):
                rows.append(pictures(pipeline, prompts))
    else:
        single = pictures(pipeline, LOOK)
        rows = [single[:8], single[8:], pictures(pipeline, LOOK_WIDE, size=(64, 128))]
    sheet(rows).save(arguments.out, quality=90)


if __name__ == "__main__":
    main()
