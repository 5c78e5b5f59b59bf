"""A trial: every concept under every prompt and seed, with each adapter and without any, judged against references.

All rows share prompts and seeds, so their differences are paired. Pictures lie on disk with the settings that made them, and are
drawn again only where these changed: a killed trial goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraclr import __version__, disk
from loraclr.adapter import Adapter, LoraLayer
from loraclr.errors import UsageError
from loraclr.evaluate.evaluation import BASE, REFERENCES, Evaluation, Row
from loraclr.evaluate.judging import FaceJudge, Judges, PictureJudge
from loraclr.evaluate.subjects import Subject, fill, template
from loraclr.generate import Generated, generate
from loraclr.modules import fingerprint
from loraclr.pipeline import GUIDANCE, STEPS, Pipeline

SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True, eq=False)
class Variant:
    """What is compared: one adapter that holds all concepts, or by concept one of its own."""

    adapters: Adapter | Mapping[str, Adapter]
    scale: float = 1.0

    def of(self, concept: str) -> Adapter:
        return self.adapters if isinstance(self.adapters, Adapter) else self.adapters[concept]


def evaluate(
    pipeline: Pipeline,
    variants: Mapping[str, Variant | Adapter],
    subjects: Sequence[Subject],
    *,
    prompts: Sequence[str] | Mapping[str, str],
    judge: PictureJudge | None,
    output: str | Path,
    face: FaceJudge | None = None,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    negative: str = "",
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
    control: bool = True,
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Draw, judge, and tabulate: one row per variant, and two controls. `prompts` may be a mapping to groups, as `read_prompts` gives it.

    The control `base` has no adapter and the class noun in place of the call; `references` is how the judges rate each reference
    picture against the others of its concept, which is about the best that generated pictures can reach. `control` False leaves `base`
    out, where another trial of the same prompts and seeds has it. `prompts` hold one {} or
    <TOK> each for the concept's words. Pictures go to OUTPUT/pictures/LABEL/CONCEPT/, the result to OUTPUT/evaluation.json. Without a face
    judge there is no identity, without any judge nothing but pictures. Raises UsageError with everything that is wrong with the arguments
    before anything is drawn, and WriteError where another trial is at work in OUTPUT.
    """
    wanted = {label: variant if isinstance(variant, Variant) else Variant(variant) for label, variant in variants.items()}
    templates, judges = prepared(wanted, subjects, prompts=prompts, judge=judge, face=face, seeds=seeds, batch_size=batch_size)
    settings = settings_of(pipeline, steps=steps, guidance=guidance, negative=negative, seeds=seeds, size=size)
    pixels = (settings["size"][0], settings["size"][1])
    draw = partial(generate, pipeline, steps=steps, guidance=guidance, negative=negative, size=pixels, batch_size=batch_size)
    tell = progress or (lambda what, share: None)
    root = Path(output)
    jobs = [(prompt, seed) for prompt in templates for seed in seeds]
    drawn, rows = 0, [] if judges is None else [judges.references(REFERENCES)]
    labels: list[tuple[str, Variant | None]] = [*([(BASE, None)] if control else []), *wanted.items()]
    unlike = {id(adapter): adapter for variant in wanted.values() for adapter in map(variant.of, (one.name for one in subjects))}
    for each in unlike.values():
        with pipeline.applied(each):
            pass  # one that does not fit the base is an error before anything is drawn
    digests = {number: digest_of(adapter) for number, adapter in unlike.items()}
    with disk.folder(root):
        for label, variant in labels:
            paths: list[Path] = []
            for index, subject in enumerate(subjects):
                adapter = None if variant is None else variant.of(subject.name)
                scale = 1.0 if variant is None else variant.scale
                words = subject.noun if variant is None else subject.call
                made_by = settings | ({} if adapter is None else {"adapter": digests[id(adapter)], "scale": scale})
                pictures = [
                    Picture(prompt, seed, key_of(made_by, prompt, seed), place_of(root, label, subject.name, number, seed))
                    for number, prompt in enumerate((fill(text, words) for text in templates), start=1)
                    for seed in seeds
                ]
                missing = [picture for picture in pictures if not picture.there()]
                with pipeline.applied(adapter, scale=scale) if adapter is not None and missing else nullcontext():
                    for picture in drawn_anew(missing, draw):
                        drawn += 1
                        tell(f"drawing {label}", (index + pictures.index(picture) / len(pictures)) / len(subjects))
                paths += [picture.path for picture in pictures]
            tell(f"drawing {label}", 1.0)
            row = Row(
                label,
                tuple(subject.name for subject in subjects for _ in jobs),
                tuple(prompt for prompt, _ in jobs) * len(subjects),
                tuple(seed for _, seed in jobs) * len(subjects),
                {},
                tuple(path.relative_to(root).as_posix() for path in paths),
            )
            rows.append(row if judges is None else judges.judged(row, root, tell=tell))
    result = Evaluation(
        tuple(rows),
        {
            **settings,
            "base": pipeline.source,
            "prompts": templates,
            "groups": {template(text): group for text, group in prompts.items() if group} if isinstance(prompts, Mapping) else {},
            "seeds": list(seeds),
            "judge": None if judge is None else judge.name,
            **told_of(subjects, face),
            "variants": {
                label: {
                    "scale": variant.scale,
                    "adapters": {
                        one.name: {"name": variant.of(one.name).name, "sha256": digests[id(variant.of(one.name))]} for one in subjects
                    },
                }
                for label, variant in wanted.items()
            },
        },
        drawn=drawn,
        kept=len(labels) * len(subjects) * len(jobs) - drawn,
    )
    result.save(root / "evaluation.json")
    return result


def prepared(
    variants: Mapping[str, Variant],
    subjects: Sequence[Subject],
    *,
    prompts: Sequence[str] | Mapping[str, str],
    judge: PictureJudge | None,
    face: FaceJudge | None,
    seeds: Sequence[int],
    batch_size: int,
) -> tuple[list[str], Judges | None]:
    """The prompts as templates, and the judges with what they make of the references. Raises UsageError as `evaluate` does."""
    templates = [template(prompt) for prompt in prompts]
    problems = faults(variants, subjects, templates, seeds, batch_size)
    if judge is not None:
        problems += [f"concept {subject.name} has no reference pictures" for subject in subjects if not subject.references]
    elif face is not None:
        problems.append("a face judge is beside a judge of pictures; give both")
    if problems:
        raise UsageError("; ".join(problems))
    return templates, None if judge is None else Judges(judge, face, subjects, templates)


def faults(
    variants: Mapping[str, Variant], subjects: Sequence[Subject], texts: Sequence[str], seeds: Sequence[int], batch_size: int
) -> list[str]:
    """What is wrong with what is to be drawn; `texts` are templates or scenes."""
    names = [subject.name for subject in subjects]
    problems = []
    if not variants or not subjects or not texts or not seeds or batch_size < 1:
        problems.append("give at least one adapter, one concept, one prompt, one seed, and a batch of at least one picture")
    if len(set(names)) < len(names) or len(set(seeds)) < len(seeds) or len(set(texts)) < len(texts):
        problems.append("a concept, prompt or seed is given twice; keep one")
    for kind, words in (("row", list(variants)), ("concept", names)):
        if unsafe := [word for word in words if not word or word.startswith(".") or set(word) & set('/\\:*?"<>|')]:
            problems.append(f"{kind} {unsafe[0]!r} cannot be a folder's name; choose another")
    if taken := sorted({BASE, REFERENCES} & set(variants)):
        problems.append(f"{taken[0]!r} is what a control is called; give the adapter another label")
    for label, variant in variants.items():
        if not isinstance(variant.adapters, Adapter) and (lacking := sorted(set(names) - set(variant.adapters))):
            problems.append(f"{label} has no adapter of {', '.join(lacking)}")
    return problems


def settings_of(
    pipeline: Pipeline, *, steps: int, guidance: float, negative: str, seeds: Sequence[int], size: tuple[int, int] | None
) -> dict[str, Any]:
    """What a picture depends on but for its prompt, seed and adapter. Raises UsageError for what cannot be."""
    pixels = pipeline.check_settings(seeds=seeds, steps=steps, guidance=guidance, size=size)
    return {
        "weights": fingerprint(pipeline.pipe, vae=True),
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "size": list(pixels),
        "scheduler": pipeline.scheduler_name,
        "dtype": str(pipeline.dtype),
        "versions": {"loraclr": __version__, "torch": version("torch"), "diffusers": version("diffusers")},
    }


def told_of(subjects: Sequence[Subject], face: FaceJudge | None) -> dict[str, Any]:
    """What a report says of whom it is about and of who looked for them."""
    return {
        "face_judge": None if face is None else face.name,
        "limit": None if face is None else {"value": face.limit.value, "kind": face.limit.kind},
        "concepts": [{"name": one.name, "call": one.call, "class": one.noun, "references": len(one.references)} for one in subjects],
    }


@dataclass(frozen=True)
class Picture:
    """One picture of a trial, drawn or to be drawn. `key` is the digest of all that made it."""

    prompt: str
    seed: int
    key: str
    path: Path

    def there(self) -> bool:
        """Whether it lies there whole, made from the same settings."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path) as image:
                image.load()
                stated = json.loads(image.text["loraclr"])["evaluation"]  # type: ignore[attr-defined]
        except (OSError, UnidentifiedImageError, AttributeError, KeyError, ValueError, TypeError):
            return False
        return bool(stated == self.key)

    def keep(self, made: Generated) -> None:
        replace(made, settings={**made.settings, "evaluation": self.key}).save(self.path)


def place_of(root: Path, label: str, concept: str, number: int, seed: int) -> Path:
    """The file of a row's picture; prompts are numbered from 1."""
    return root / "pictures" / label / concept / f"{number:02d}-{seed}.png"


def drawn_anew(pictures: Sequence[Picture], draw: Callable[..., Iterator[Generated]]) -> Iterator[Picture]:
    """Each as soon as it is on disk. `draw` takes prompts x seeds, so pictures, ordered by prompt, go to it as runs of that shape."""
    by_prompt = [list(part) for _, part in groupby(pictures, key=lambda picture: picture.prompt)]
    for seeds, run in groupby(by_prompt, key=lambda part: [picture.seed for picture in part]):
        parts = list(run)
        made = draw([part[0].prompt for part in parts], seeds=seeds)
        for picture, one in zip([picture for part in parts for picture in part], made, strict=True):
            picture.keep(one)
            yield picture


def key_of(settings: Mapping[str, object], prompt: str, seed: int) -> str:
    return hashlib.sha256(json.dumps({**settings, "prompt": prompt, "seed": seed}, sort_keys=True).encode()).hexdigest()


def digest_of(adapter: Adapter) -> str:
    """Of what it does: layers, scales, learned tokens."""
    whole = hashlib.sha256()
    for layer in adapter:
        parts = (layer.up, layer.down, torch.tensor(layer.scale)) if isinstance(layer, LoraLayer) else (layer.delta(),)
        _add(whole, layer.name, parts)
    for token, rows in sorted(adapter.tokens.items()):
        _add(whole, token, (rows,))
    return whole.hexdigest()


def _add(whole: hashlib._Hash, name: str, tensors: Sequence[Tensor]) -> None:
    whole.update(name.encode())
    for tensor in tensors:
        whole.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
