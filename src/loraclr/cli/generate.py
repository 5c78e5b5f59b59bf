"""`loraclr generate`: pictures from a base, adapters and prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraclr import disk
from loraclr.cli import again, parse, show
from loraclr.cli.base import SOURCE, BaseConfig, BaseDtype, Device, Offload, open_base
from loraclr.cli.options import Batch, Guidance, Size, Steps
from loraclr.errors import UsageError

if TYPE_CHECKING:
    from loraclr.control import Control


def generate(
    context: typer.Context,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pictures; made if missing.", show_default=False)],
    base: Annotated[str | None, typer.Option(help=SOURCE, show_default=False)] = None,
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeatable.", show_default=False)] = [],  # noqa: B006
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
    control: Annotated[
        list[str],
        typer.Option(metavar="MODEL|IMAGE[|WEIGHT]", help="Follow a picture: a ControlNet's folder; repeatable.", show_default=False),
    ] = [],  # noqa: B006
    adapter: Annotated[
        list[str],
        typer.Option(metavar="MODEL|IMAGE[|WEIGHT]", help="The same with a T2I-Adapter's folder; repeatable.", show_default=False),
    ] = [],  # noqa: B006
    strategy: Annotated[
        Literal["omg", "clora"] | None,
        typer.Option(help="Keep several --lora apart at sampling time instead of adding them up; slow.", show_default=False),
    ] = None,
    class_: Annotated[
        list[str],
        typer.Option(
            "--class",
            metavar="[NAME=]WORDS",
            help="For --strategy: what kind of thing an adapter's concept is, such as woman; repeatable.",
            show_default="last word of the call",
        ),
    ] = [],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Every prompt is drawn with every seed; repeatable.")] = [0],  # noqa: B006
    steps: Steps = 20,
    guidance: Guidance = 4.0,
    size: Size = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="PNG", help="A picture drawn before: its settings, but for those given here.", show_default=False),
    ] = None,
    batch: Batch = 4,
    device: Device = "auto",
    base_dtype: BaseDtype = "fp32",
    offload: Offload = False,
    base_config: BaseConfig = None,
    force: Annotated[bool, typer.Option("--force", help="Replace pictures of the same name.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw every prompt with every seed. Each PNG carries the settings that made it."""
    told: Mapping[str, Any] = {} if from_ is None else again.told_by(from_, again.given(context))
    base, prompt = base or told.get("base"), prompt or told.get("prompt", [])
    if base is None or not prompt:
        raise UsageError("what to draw? give --base and --prompt, or --from with a picture drawn before")
    asked = parse.size(size) if size is not None else told.get("size")
    negative, seeds = told.get("negative", negative), list(dict.fromkeys(told.get("seed", seed)))
    steps, guidance = told.get("steps", steps), told.get("guidance", guidance)
    chosen, base_config = told.get("strategy", strategy), told.get("base_config", base_config)
    loras = [parse.lora(text) for text in lora] or told.get("lora", [])
    follow = [parse.control(kind, text) for kind, texts in (("control", control), ("adapter", adapter)) for text in texts]
    follow = follow or told.get("controls", [])
    paths = _paths(output, prompt, seeds)
    if not force:
        _check_free(paths)
    if class_ and chosen is None:
        raise UsageError("--class is for --strategy; give both or none")
    if offload and chosen is not None:
        raise UsageError(f"--strategy {chosen} keeps all adapters on the device; leave --offload out")

    from loraclr.formats import load_adapter
    from loraclr.generate import generate as run
    from loraclr.generate import parse_region
    from loraclr.strategies import Part, make_strategy

    pipeline = open_base(base, device, told.get("base_dtype", base_dtype), offload=offload, config=base_config)
    adapters = [(load_adapter(path, base=pipeline), scale) for path, scale in loras]
    pixels = pipeline.check_settings(seeds=seeds, steps=steps, guidance=guidance, size=asked)
    controls = [_control(*one) for one in follow]
    nouns = {**told.get("nouns", {}), **parse.by_name(class_, [one.name for one, _ in adapters], "--class")}
    files = again.files_of(loras, follow, base_config)
    with ExitStack() as stack:
        if chosen is None:
            for one, scale in adapters:
                stack.enter_context(pipeline.applied(one, scale=scale))
        tell = stack.enter_context(show.progress(quiet=json))
        pictures = run(
            pipeline,
            prompt,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            negative=negative,
            size=pixels,
            regions=[parse_region(text, pixels) for text in region] or told.get("regions", []),
            controls=controls,
            strategy=None if chosen is None else make_strategy(chosen) if isinstance(chosen, str) else chosen,
            parts=[] if chosen is None else [Part(one, scale, nouns.get(one.name)) for one, scale in adapters],
            scheduler=told.get("scheduler"),
            batch_size=batch,
            callback=lambda done, total: tell("drawing", done / total),
        )
        disk.make_folder(output)
        made = []
        for path, picture in zip(paths, pictures, strict=True):
            whole = replace(picture, settings={**picture.settings, "files": files})
            with disk.reserved(path):
                if not force:
                    _check_free([path])  # another run may have drawn it meanwhile
                made.append({"file": str(whole.save(path)), **whole.settings})
    if json:
        show.as_json(made)
    else:
        for written in made:
            show.out.print(f"written: {written['file']}", markup=False)


def _control(kind: str, model: Path, image: Path, weight: float) -> Control:
    from loraclr.control import Control, load_control
    from loraclr.pictures import read_picture

    seen = read_picture(image)
    return Control(load_control(kind, model), seen, weight, name=model.name)


def _check_free(paths: list[Path]) -> None:
    if taken := [path.name for path in paths if path.exists()]:
        raise UsageError(f"{paths[0].parent} already has {', '.join(taken[:3])}; give another --output, or --force to replace")


def _paths(folder: Path, prompts: list[str], seeds: list[int]) -> list[Path]:
    """One name per picture, in the order in which they are drawn: number of the prompt, its first words, seed."""
    words = [re.sub(r"\W+", "-", prompt).strip("-")[:40].rstrip("-") or "prompt" for prompt in prompts]
    return [folder / f"{number:02d}-{word}-{seed}.png" for number, word in enumerate(words, start=1) for seed in seeds]
