"""Pictures of every method at equal prompts and seeds, beside each adapter alone, and scores of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from loraclr.adapter import Adapter
from loraclr.compare.comparison import Comparison
from loraclr.compare.run import file_name
from loraclr.errors import UsageError
from loraclr.evaluate import Evaluation, FaceJudge, PictureJudge, Row, Subject, Variant, evaluate, read_prompts
from loraclr.evaluate.evaluation import BASE
from loraclr.evaluate.subjects import fill
from loraclr.evaluate.trial import place_of, prepared
from loraclr.pipeline import GUIDANCE, STEPS, Pipeline
from loraclr.settings import read_settings
from loraclr.toybox import open_toybox
from loraclr.toybox.score import SCORE_TEMPLATES, score

ALONE = "alone"
PROMPTS = ("a photo of a {} in a garden", "a picture of a smiling {} at night")


@dataclass(frozen=True, eq=False)
class Drawing:
    """What is drawn of every method and who judges it. Without a judge no subject needs references, and the base is not drawn."""

    subjects: Sequence[Subject]
    prompts: Sequence[str] | Mapping[str, str] = PROMPTS
    judge: PictureJudge | None = None
    face: FaceJudge | None = None
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of the concepts that the toybox's judge reads, too
    seeds: Sequence[int] = (0,)
    steps: int = STEPS
    guidance: float = GUIDANCE
    size: tuple[int, int] | None = None
    batch_size: int = 4

    def check(
        self, pipeline: Pipeline, adapters: Mapping[str, Adapter], methods: Iterable[str], folder: Path, *, replace: bool = False
    ) -> None:
        """Raises UsageError before any merge for what cannot be drawn or judged, and without `replace` where `folder` has other pictures.

        Other pictures are those of other prompts, seeds or settings; what is there of the same ones is `evaluate`'s to keep.
        """
        given: dict[str, Any] = {"prompts": self.prompts, "judge": self.judge, "face": self.face, "seeds": self.seeds}
        templates, _ = prepared({ALONE: Variant(adapters)}, self.subjects, batch_size=self.batch_size, **given)
        size = pipeline.check_settings(seeds=self.seeds, steps=self.steps, guidance=self.guidance, size=self.size)
        same = {"steps": self.steps, "guidance": self.guidance, "negative": "", "size": list(size)}
        for label in () if replace else (*([BASE] if self.judge else []), ALONE, *map(file_name, methods)):
            for subject in self.subjects:
                words = subject.noun if label == BASE else subject.call
                for number, text in enumerate(templates, start=1):
                    for seed in self.seeds:
                        path = place_of(folder, label, subject.name, number, seed)
                        if path.exists() and not _holds(path, same | {"prompt": fill(text, words), "seed": seed}):
                            raise UsageError(
                                f"{path} is there already and is not of these prompts and settings; give --pictures another folder, "
                                "or --force to replace"
                            )


def by_toybox(calls: Mapping[str, str], **settings: Any) -> Drawing:
    """The toybox's own prompts, references and judges for its own concepts, given the words that call them: image and text by ToyClip, and
    of people identity, right person and prompt by the attribute judge, each a share. Raises UsageError for other concepts.
    """
    box = open_toybox()
    if unknown := sorted(set(calls) - set(box.concepts)):
        raise UsageError(f"the toybox does not know {', '.join(unknown)}; give it adapters of its own, or another --judge")
    attributes = {name: box.concepts[name].attributes for name in calls if box.concepts[name].attributes}
    places = [prompt for prompt, group in read_prompts(box.prompts_path).items() if group == "context"]  # the others are for people
    prompts = [text for text, _ in SCORE_TEMPLATES] if attributes else places
    subjects = [Subject(name, call, box.concepts[name].noun, box.references(name)) for name, call in calls.items()]
    return Drawing(subjects, prompts, box.clip, attributes=attributes, **settings)


def draw(
    pipeline: Pipeline,
    comparison: Comparison,
    adapters: Mapping[str, Adapter],
    folder: str | Path,
    drawing: Drawing,
    *,
    progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """The comparison with pictures, drawn and judged by `evaluate`: an interrupted run goes on where it stopped. `adapters` are by concept.

    They go to FOLDER/pictures/METHOD/CONCEPT/, each adapter's own to `alone` in place of METHOD.
    """
    merged = {file_name(entry.label): Variant(entry.result.adapter) for entry in comparison.merged if entry.result}
    found = evaluate(
        pipeline,
        {ALONE: Variant(adapters), **merged},
        drawing.subjects,
        prompts=drawing.prompts,
        judge=drawing.judge,
        face=drawing.face,
        output=folder,
        seeds=drawing.seeds,
        steps=drawing.steps,
        guidance=drawing.guidance,
        size=drawing.size,
        batch_size=drawing.batch_size,
        control=drawing.judge is not None,
        progress=progress,
    )
    if drawing.attributes:
        found = _read(found, Path(folder), drawing.attributes)
    return replace(comparison, pictures=found, folder=Path(folder))


def _holds(path: Path, settings: Mapping[str, object]) -> bool:
    try:
        stated = read_settings(path)
    except UsageError:
        return False
    return all(stated[name] == value for name, value in settings.items())


def _read(found: Evaluation, folder: Path, attributes: Mapping[str, Mapping[str, str]]) -> Evaluation:
    """With what the attribute judge makes of the pictures of these concepts; NaN for the others."""
    box, told = open_toybox(), dict(SCORE_TEMPLATES)

    def read(row: Row) -> Row:
        places = [place for place, name in enumerate(row.concepts) if row.files and name in attributes]
        if not places:
            return row
        people, truths = [row.concepts[place] for place in places], [told[row.prompts[place]] for place in places]
        images = [Image.open(folder / row.files[place]).convert("RGB") for place in places]
        scores = score(images, people, truths, judge=box.judge, candidates=attributes)
        values = dict(row.values)
        for name, value in {"identity": scores.identity, "right person": scores.named, "prompt": scores.told}.items():
            values[name] = value.new_full((len(row.concepts),), float("nan"))
            values[name][places] = value
        return replace(row, values=values)

    result = replace(found, rows=tuple(map(read, found.rows)))
    result.save(folder / "evaluation.json")
    return result
