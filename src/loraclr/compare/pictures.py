"""Pictures of every method at equal prompts and seeds, beside each adapter alone, and scores of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from PIL import Image

from loraclr import disk
from loraclr.compare.comparison import Comparison
from loraclr.compare.run import file_name
from loraclr.errors import UsageError
from loraclr.evaluate import Evaluation, FaceJudge, PictureJudge, Row, Subject, Variant, evaluate
from loraclr.evaluate.subjects import fill, template
from loraclr.generate import generate
from loraclr.pipeline import GUIDANCE, STEPS, Pipeline
from loraclr.toybox import open_toybox
from loraclr.toybox.score import SCORE_TEMPLATES, score

ALONE = "alone"
PROMPTS = ("a photo of a {} in a garden", "a picture of a smiling {} at night")


def variants(comparison: Comparison, adapters: Mapping[str, Variant]) -> dict[str, Variant]:
    """What is drawn, by the name of its folder: each adapter `alone`, then every merge."""
    alone = Variant({name: variant.of(name) for name, variant in adapters.items()})
    return {ALONE: alone} | {file_name(entry.label): Variant(entry.result.adapter) for entry in comparison.merged if entry.result}


def draw(
    pipeline: Pipeline,
    comparison: Comparison,
    adapters: Mapping[str, Variant],
    folder: str | Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
    progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """Every concept under every prompt and seed, to FOLDER/pictures/METHOD/CONCEPT/. `adapters` are by concept."""
    templates = [template(prompt) for prompt in prompts]
    rows, calls, root = [], _calls(comparison), Path(folder)
    wanted = variants(comparison, adapters)
    with disk.folder(root):
        for number, (label, variant) in enumerate(wanted.items()):
            files: list[str] = []
            for name, call in calls.items():
                inside = root / "pictures" / label / name
                with pipeline.applied(variant.of(name)) if variant is not None else nullcontext():
                    made = generate(
                        pipeline,
                        [fill(text, call) for text in templates],
                        seeds=seeds,
                        steps=steps,
                        guidance=guidance,
                        size=size,
                        batch_size=batch_size,
                    )
                    for place, picture in enumerate(made):
                        path = inside / f"{place // len(seeds) + 1:02d}-{picture.seed}.png"
                        files.append(picture.save(path).relative_to(root).as_posix())
            rows.append(_row(label, files, calls, templates, seeds))
            if progress:
                progress("drawing", (number + 1) / len(wanted))
    found = Evaluation(tuple(rows), {"prompts": templates, "seeds": list(seeds), "steps": steps, "guidance": guidance})
    return replace(comparison, pictures=found, folder=root)


def judge_by_toybox(
    pipeline: Pipeline, comparison: Comparison, adapters: Mapping[str, Variant], folder: str | Path, **drawing: object
) -> Comparison:
    """`draw` of the toybox's scoring prompts, read by its attribute judge: identity, right person and prompt, each a share."""
    box = open_toybox()
    unknown = sorted(set(_calls(comparison)) - set(box.concepts))
    if unknown:
        raise UsageError(f"the toybox does not know {', '.join(unknown)}; give it adapters of its own, or another --judge")
    prompts = [text for text, _ in SCORE_TEMPLATES]
    drawn = draw(pipeline, comparison, adapters, folder, prompts=prompts, **drawing)  # type: ignore[arg-type]
    assert drawn.pictures is not None
    told = dict(SCORE_TEMPLATES)
    candidates = {name: box.concepts[name].attributes for name in _calls(comparison)}
    rows = []
    for row in drawn.pictures.rows:
        images = [Image.open(Path(folder) / file).convert("RGB") for file in row.files]
        scores = score(images, row.concepts, [told[prompt] for prompt in row.prompts], judge=box.judge, candidates=candidates)
        values = {"identity": scores.identity, "right person": scores.named, "prompt": scores.told}
        rows.append(replace(row, values=values))
    return replace(drawn, pictures=replace(drawn.pictures, rows=tuple(rows)))


def judge(
    pipeline: Pipeline,
    comparison: Comparison,
    adapters: Mapping[str, Variant],
    folder: str | Path,
    *,
    subjects: Sequence[Subject],
    eyes: PictureJudge,
    face: FaceJudge | None = None,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
    progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """The same drawn and judged by `evaluate`, with its controls; an interrupted run goes on where it stopped."""
    found = evaluate(
        pipeline,
        variants(comparison, adapters),
        subjects,
        prompts=prompts,
        judge=eyes,
        face=face,
        output=folder,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        size=size,
        batch_size=batch_size,
        progress=progress,
    )
    return replace(comparison, pictures=found, folder=Path(folder))


def _calls(comparison: Comparison) -> dict[str, str]:
    return {str(entry["name"]): str(entry["call"]) for entry in comparison.settings["inputs"]}


def _row(label: str, files: Sequence[str], concepts: Iterable[str], prompts: Sequence[str], seeds: Sequence[int]) -> Row:
    places = [(name, prompt, seed) for name in concepts for prompt in prompts for seed in seeds]
    names, texts, numbers = zip(*places, strict=True)
    return Row(label, names, texts, numbers, {}, tuple(files))
