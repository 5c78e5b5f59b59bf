"""Scenes of several people: everybody is asked for in a box, and looked for there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loraclr import disk
from loraclr.adapter import Adapter
from loraclr.conditioning import Region
from loraclr.errors import UsageError
from loraclr.evaluate import metrics
from loraclr.evaluate.evaluation import BASE, Evaluation, Row
from loraclr.evaluate.judging import FaceJudge, known_faces
from loraclr.evaluate.subjects import Subject, fill, read_lines
from loraclr.evaluate.trial import SEEDS, Picture, Variant, digest_of, drawn_anew, faults, key_of, place_of, settings_of, told_of
from loraclr.generate import generate, parse_region
from loraclr.pipeline import GUIDANCE, STEPS, Pipeline


@dataclass(frozen=True)
class Ensemble:
    """Several people in one picture: in region k, whose prompt has {} for the words that call somebody, is `people[k]` to be seen."""

    prompt: str
    people: tuple[str, ...]
    regions: tuple[Region, ...]

    @property
    def title(self) -> str:
        return f"{self.prompt} ({', '.join(self.people)})"

    @property
    def size(self) -> str:
        return "1 person" if len(self.people) == 1 else f"{len(self.people)} people"

    def asked(self, words: Mapping[str, str]) -> list[Region]:
        """The regions with everybody's words in them."""
        return [replace(one, prompt=fill(one.prompt, words[name])) for one, name in zip(self.regions, self.people, strict=True)]


def read_scenes(path: str | Path, size: tuple[int, int]) -> list[Ensemble]:
    """A line with the picture's prompt, and below it, indented, a region for each of its people as `loraclr generate` takes them, with
    {NAME} in place of the words that call the concept. Raises UsageError."""
    scenes: list[Ensemble] = []
    for line in read_lines(path):
        if not line[0].isspace():
            scenes.append(Ensemble(line.strip(), (), ()))
            continue
        region = parse_region(line.strip(), size)
        named = re.findall(r"\{([^{}]+)\}", region.prompt)
        if len(named) != 1 or not scenes:
            fault = (
                f"names {len(named)} concepts; write one of them as {{NAME}}" if scenes else "stands before any prompt; write that first"
            )
            raise UsageError(f"{path}: the region {line.strip()!r} {fault}")
        last = scenes[-1]
        place = replace(region, prompt=region.prompt.replace(f"{{{named[0]}}}", "{}"))
        scenes[-1] = replace(last, people=(*last.people, named[0]), regions=(*last.regions, place))
    empty = [scene.prompt for scene in scenes if not scene.people]
    if empty or not scenes:
        seen = f"the scene {empty[0]!r} has nobody in it" if empty else "there is no scene in it"
        raise UsageError(f"{path}: {seen}; write its prompt, and below it, indented, a region for each of its people")
    return scenes


def evaluate_scenes(
    pipeline: Pipeline,
    variants: Mapping[str, Variant | Adapter],
    subjects: Sequence[Subject],
    *,
    scenes: Sequence[Ensemble],
    face: FaceJudge,
    output: str | Path,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    negative: str = "",
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Draw every scene with each adapter, which holds all concepts, and with the base told nouns; look for everybody in the own box.

    By the number of people in a picture, each picture has two values: `present`, the share of them that pass the judge's limit, and
    `all present` (`presence`). Pictures go to OUTPUT/pictures/LABEL/scenes/, and are kept as those of `evaluate`, the result to
    OUTPUT/scenes.json. Raises UsageError before anything is drawn, and WriteError where another trial is at work in OUTPUT.
    """
    wanted = {label: variant if isinstance(variant, Variant) else Variant(variant) for label, variant in variants.items()}
    problems = faults(wanted, subjects, [scene.title for scene in scenes], seeds, batch_size)
    if several := [label for label, variant in wanted.items() if not isinstance(variant.adapters, Adapter)]:
        problems.append(f"{several[0]} has an adapter for each concept, and a scene needs one that holds all; merge them first")
    if unknown := sorted({name for scene in scenes for name in scene.people} - {one.name for one in subjects}):
        problems.append(f"the scenes ask for {', '.join(unknown)}; the references are of {', '.join(one.name for one in subjects)}")
    if problems:
        raise UsageError("; ".join(problems))
    settings = settings_of(pipeline, steps=steps, guidance=guidance, negative=negative, seeds=seeds, size=size)
    pixels = (settings["size"][0], settings["size"][1])
    pipeline.check_steerable()
    known = known_faces(face, subjects)
    centres = dict(zip((one.name for one in subjects), metrics.centres(known, face.limit), strict=True))
    draw = partial(generate, pipeline, steps=steps, guidance=guidance, negative=negative, size=pixels, batch_size=batch_size)
    tell, root, rows, drawn = progress or (lambda what, share: None), Path(output), [], 0
    told: list[tuple[str, Variant | None]] = [(BASE, None), *wanted.items()]
    for each in wanted.values():
        with pipeline.applied(each.of("")):
            pass  # one that does not fit the base is an error before anything is drawn
    with disk.folder(root):
        for label, variant in told:
            adapter, scale = (None, 1.0) if variant is None else (variant.of(""), variant.scale)
            words = {one.name: one.noun if variant is None else one.call for one in subjects}
            made_by = settings | ({} if adapter is None else {"adapter": digest_of(adapter), "scale": scale})
            shown: list[tuple[Ensemble, Picture]] = []
            with pipeline.applied(adapter, scale=scale) if adapter is not None else nullcontext():
                for number, scene in enumerate(scenes, start=1):
                    regions = scene.asked(words)
                    stated = made_by | {"regions": [[one.prompt, one.negative, *one.box] for one in regions]}
                    pictures = [
                        Picture(scene.prompt, seed, key_of(stated, scene.prompt, seed), place_of(root, label, "scenes", number, seed))
                        for seed in seeds
                    ]
                    for _ in drawn_anew([one for one in pictures if not one.there()], partial(draw, regions=regions)):
                        drawn += 1
                    shown += [(scene, one) for one in pictures]
                    tell(f"drawing {label}", number / len(scenes))
            rows.append(_row(label, shown, face, centres, root))
    found = {"base": pipeline.source, "seeds": list(seeds), "scenes": [scene.title for scene in scenes], "groups": {}}
    result = Evaluation(
        tuple(rows), {**settings, **found, **told_of(subjects, face)}, drawn=drawn, kept=len(rows) * len(scenes) * len(seeds) - drawn
    )
    result.save(root / "scenes.json")
    return result


def _row(label: str, shown: Sequence[tuple[Ensemble, Picture]], face: FaceJudge, centres: Mapping[str, Tensor], root: Path) -> Row:
    from PIL import Image

    sizes = [scene.size for scene, _ in shown]
    values = {
        f"{what}, {size}": torch.full((len(shown),), torch.nan, dtype=torch.float64)
        for size in dict.fromkeys(sizes)
        for what in ("present", "all present")
    }
    for index, (scene, picture) in enumerate(shown):
        with Image.open(picture.path) as opened:
            image = opened.convert("RGB")
        crops = []
        for region in scene.regions:
            y1, x1, y2, x2 = region.box
            crops.append(image.crop((round(x1 * image.width), round(y1 * image.height), round(x2 * image.width), round(y2 * image.height))))
        people = torch.stack([centres[name] for name in scene.people])
        found = metrics.presence([metrics.closest(face.embed_faces(crops), people, face.limit)], face.limit, placed=True)
        values[f"present, {scene.size}"][index] = found.share[0]
        values[f"all present, {scene.size}"][index] = found.everyone[0]
    return Row(
        label,
        tuple(sizes),
        tuple(scene.title for scene, _ in shown),
        tuple(picture.seed for _, picture in shown),
        values,
        tuple(picture.path.relative_to(root).as_posix() for _, picture in shown),
    )
