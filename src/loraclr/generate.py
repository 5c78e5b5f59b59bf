"""VERB. Prompts x seeds (x regions) -> pictures, each with the settings that made it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from loraclr import __version__, disk
from loraclr.adapter import noun_of
from loraclr.conditioning import Box, Region
from loraclr.control import Control, check_fit, controlled
from loraclr.errors import UsageError
from loraclr.pipeline import GUIDANCE, STEPS, Pipeline
from loraclr.settings import parameters
from loraclr.strategies import Cast, Part, Scene, Strategy

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Generated", "Region", "generate", "parse_region"]


@dataclass(frozen=True, eq=False)
class Generated:
    """One picture. `settings` says all that is needed to make it again; it travels inside the saved file."""

    image: Image
    prompt: str
    seed: int
    settings: Mapping[str, object]

    def save(self, path: str | Path) -> Path:
        """Write a PNG, whole or not at all, whose text chunk `loraclr` holds the settings as JSON, and `parameters` the same for other
        tools to show. Raises UsageError for another suffix.
        """
        from PIL.PngImagePlugin import PngInfo

        target = Path(path)
        if target.suffix.lower() != ".png":
            raise UsageError(f"{target.name!r} is not a PNG name, and only PNG keeps the settings; end it with .png")
        text = PngInfo()
        text.add_text("loraclr", json.dumps(dict(self.settings)))
        text.add_itxt("parameters", parameters(self.settings))
        disk.make_folder(target.parent)
        with disk.whole(target) as part:
            self.image.save(part, format="PNG", pnginfo=text)
        return target


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    negative: str = "",
    size: tuple[int, int] | None = None,
    regions: Sequence[Region] = (),
    controls: Sequence[Control] = (),
    strategy: Strategy | None = None,
    parts: Sequence[Part] = (),
    scheduler: str | None = None,
    batch_size: int = 4,
    callback: Callable[[int, int], None] | None = None,
) -> Iterator[Generated]:
    """Every prompt with every seed, prompt by prompt, as soon as each batch is done.

    `size` is (height, width) in pixels; the other settings are those of `Pipeline.sample`. `controls` are pictures that every picture
    follows. With a `strategy` the adapters are its `parts` in place of applied ones, region k is part k's, and pictures are drawn
    one at a time. `callback(done, total)` counts denoising steps over all batches. A picture does not depend on `batch_size` beyond
    rounding. Raises UsageError or PipelineError at the call, not at the first picture.
    """
    if isinstance(prompts, str) or not prompts or not seeds:
        raise UsageError("generate needs a list of at least one prompt and at least one seed; put a single prompt in a list")
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size} is not a number of pictures; give 1 or more")
    size = pipeline.check_settings(seeds=seeds, steps=steps, guidance=guidance, size=size, scheduler=scheduler)
    if controls:
        check_fit(pipeline.unet, controls)
    if regions:
        pipeline.check_steerable()
    cast = None
    if strategy is not None:
        cast = _cast(strategy, pipeline, parts)
        for prompt in prompts:
            strategy.check(cast, Scene(prompt, seeds[0], size, steps, guidance, negative, tuple(regions), scheduler))
    elif parts:
        raise UsageError(f"{len(parts)} parts need a strategy; give one, or apply the adapters to the pipeline")
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    settings: dict[str, object] = {
        "base": pipeline.source,
        "adapters": [{"name": name, "scale": scale} for name, scale in pipeline.adapters]
        or [{"name": part.name, "scale": part.scale, "noun": part.noun or noun_of(part.call)} for part in parts],
        "tokens": list(pipeline.tokens),
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "size": list(size),
        "regions": [asdict(region) for region in regions],
        "controls": [control.settings for control in controls],
        "strategy": None if strategy is None else {"name": strategy.name, **asdict(strategy)},  # type: ignore[call-overload]
        "scheduler": scheduler or pipeline.scheduler_name,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": {"loraclr": __version__} | {package: version(package) for package in ("torch", "diffusers", "transformers")},
    }
    # One at a time: masks from attention have edges, which the rounding of another batch could move.
    batch_size = batch_size if strategy is None else 1
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]

    def pictures() -> Iterator[Generated]:
        for number, batch in enumerate(batches):

            def progress(step: int, total: int, before: int = number) -> None:
                if callback is not None:
                    callback(before * total + step, len(batches) * total)

            with controlled(pipeline.unet, controls, size=size) if controls else nullcontext():
                if strategy is not None and cast is not None:
                    ((prompt, seed),) = batch
                    scene = Scene(prompt, seed, size, steps, guidance, negative, tuple(regions), scheduler, progress)
                    images = pipeline.decode(strategy.draw(cast, scene))
                else:
                    images = pipeline.sample(
                        [prompt for prompt, _ in batch],
                        seeds=[seed for _, seed in batch],
                        steps=steps,
                        guidance=guidance,
                        negative=negative,
                        size=size,
                        regions=regions,
                        scheduler=scheduler,
                        callback=progress,
                    )
            for (prompt, seed), image in zip(batch, images, strict=True):
                yield Generated(image, prompt, seed, {"prompt": prompt, "seed": seed, **settings})

    return pictures()


def _cast(strategy: Strategy, pipeline: Pipeline, parts: Sequence[Part]) -> Cast:
    if not parts:
        raise UsageError(f"strategy {strategy.name} needs at least one adapter; give one for each concept of the scene")
    pipeline.check_plain(f"strategy {strategy.name}")
    if pipeline.adapters:
        names = ", ".join(name for name, _ in pipeline.adapters)
        raise UsageError(f"strategy {strategy.name} takes its adapters as parts, and {names} is applied; leave that context first")
    return Cast(pipeline, parts)


def parse_region(text: str, size: tuple[int, int]) -> Region:
    """`PROMPT|y1,x1,y2,x2` or `PROMPT|NEGATIVE|y1,x1,y2,x2` -> Region.

    Four numbers up to 1 are fractions; otherwise all are pixels of `size`, (height, width). Square brackets around the box
    are allowed. Every kind of mistake has its own UsageError.
    """
    fields = [field.strip() for field in text.split("|")]
    if len(fields) not in (2, 3):
        raise UsageError(f"region {text!r} has {len(fields)} fields between '|'; write PROMPT|y1,x1,y2,x2 or PROMPT|NEGATIVE|y1,x1,y2,x2")
    box = _parse_box(fields[-1], size, where=f"region {text!r}")
    return Region(fields[0], box, fields[1] if len(fields) == 3 else "")


def _parse_box(text: str, size: tuple[int, int], *, where: str) -> Box:
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    words = [word.strip() for word in inside.split(",")]
    if len(words) != 4:
        raise UsageError(f"{where}: the box {text!r} has {len(words)} numbers; give four, y1,x1,y2,x2")
    y1, x1, y2, x2 = edges = [_number(word, where) for word in words]
    if min(edges) < 0:
        raise UsageError(f"{where}: the box {text!r} starts outside the picture; the smallest edge is 0")
    pixels = max(edges) > 1
    if pixels and any(0 < edge < 1 for edge in edges):
        raise UsageError(f"{where}: the box {text!r} mixes pixels and fractions; give all four as pixels, or all four from 0 to 1")
    height, width = size if pixels else (1, 1)
    if max(y1, y2) > height or max(x1, x2) > width:
        raise UsageError(f"{where}: the box {text!r} reaches outside the picture of {height}x{width} (height x width); shrink the box")
    for axis, first, last in (("y", y1, y2), ("x", x1, x2)):
        if first > last:
            raise UsageError(f"{where}: the box {text!r} is reversed, {axis}1 {first:g} is beyond {axis}2 {last:g}; swap them")
        if first == last:
            raise UsageError(f"{where}: the box {text!r} is empty, {axis}1 equals {axis}2; give it some extent")
    return y1 / height, x1 / width, y2 / height, x2 / width


def _number(word: str, where: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where}: {word!r} is not a number; give the box as y1,x1,y2,x2 such as 0,0,1,0.5")
    return value
