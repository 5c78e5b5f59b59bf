"""`loraclr generate`: pictures from a base, adapters and prompts."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraclr import disk
from loraclr.cli import parse, show
from loraclr.errors import UsageError

if TYPE_CHECKING:
    from loraclr.generate import Generated


def generate(
    base: Annotated[str, typer.Option(help="Base model: a diffusers folder or a hub id.", show_default=False)],
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeatable.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pictures; made if missing.", show_default=False)],
    lora: Annotated[list[str], typer.Option(metavar="FILE[:SCALE]", help="Adapter to apply; repeatable.", show_default=False)] = [],  # noqa: B006
    negative: Annotated[str, typer.Option(help="What to stay away from.")] = "",
    region: Annotated[
        list[str],
        typer.Option(
            metavar="PROMPT|NEGATIVE|BOX",
            help="A part of the picture with its own prompt; the box is y1,x1,y2,x2 in pixels or fractions; repeatable.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Every prompt is drawn with every seed; repeatable.")] = [0],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="How strictly prompts are followed; 1 switches guidance off.")] = 4.0,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Height and width in pixels.", show_default="the model's own")] = None,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 4,
    force: Annotated[bool, typer.Option("--force", help="Replace pictures of the same name.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw every prompt with every seed. Each PNG carries the settings that made it."""
    asked = None if size is None else parse.size(size)
    seeds = list(dict.fromkeys(seed))
    loras = [parse.lora(text) for text in lora]
    paths = _paths(output, prompt, seeds)
    if not force and (taken := [path.name for path in paths if path.exists()]):
        raise UsageError(f"{output} already has {', '.join(taken[:3])}; give another --output, or --force to replace")

    from loraclr.formats import load_adapter
    from loraclr.generate import generate as run
    from loraclr.generate import parse_region
    from loraclr.pipeline import Pipeline

    pipeline = Pipeline.load(base)
    adapters = [(load_adapter(path, base=pipeline), scale) for path, scale in loras]
    pixels = pipeline.check_settings(seeds=seeds, steps=steps, guidance=guidance, size=asked)
    with ExitStack() as stack:
        for adapter, scale in adapters:
            stack.enter_context(pipeline.applied(adapter, scale=scale))
        tell = stack.enter_context(show.progress(quiet=json))
        pictures = run(
            pipeline,
            prompt,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            negative=negative,
            size=pixels,
            regions=[parse_region(text, pixels) for text in region],
            batch_size=batch,
            callback=lambda done, total: tell("drawing", done / total),
        )
        disk.make_folder(output)
        made = [{"file": str(_write(picture, path)), **picture.settings} for path, picture in zip(paths, pictures, strict=True)]
    if json:
        show.as_json(made)
    else:
        for picture in made:
            show.out.print(f"written: {picture['file']}", markup=False)


def _write(picture: Generated, path: Path) -> Path:
    with disk.reserved(path):
        return picture.save(path)


def _paths(folder: Path, prompts: list[str], seeds: list[int]) -> list[Path]:
    """One name per picture, in the order in which they are drawn: number of the prompt, its first words, seed."""
    words = [re.sub(r"\W+", "-", prompt).strip("-")[:40].rstrip("-") or "prompt" for prompt in prompts]
    return [folder / f"{number:02d}-{word}-{seed}.png" for number, word in enumerate(words, start=1) for seed in seeds]
