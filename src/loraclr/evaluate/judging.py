"""What a judge must be able to do, and what two of them make of the pictures of a trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from loraclr.errors import UsageError
from loraclr.evaluate import metrics
from loraclr.evaluate.evaluation import Row
from loraclr.evaluate.metrics import Limit
from loraclr.evaluate.subjects import Subject, fill

if TYPE_CHECKING:
    from PIL.Image import Image

_AT_ONCE = 32  # pictures in memory


@runtime_checkable
class PictureJudge(Protocol):
    """Sees pictures and reads texts in one space, as CLIP does."""

    @property
    def name(self) -> str: ...
    def embed_images(self, images: Sequence[Image]) -> Tensor: ...  # (n, d)
    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...  # (n, d)


@runtime_checkable
class FaceJudge(Protocol):
    """Finds faces and tells people apart. `limit` is when two embeddings count as one person."""

    @property
    def name(self) -> str: ...
    @property
    def limit(self) -> Limit: ...
    def embed_faces(self, images: Sequence[Image]) -> list[Tensor]: ...  # per picture (faces, d), no rows where it finds none


def known_faces(face: FaceJudge, subjects: Sequence[Subject]) -> list[list[Tensor]]:
    """By concept and reference picture the faces, (faces, d). Raises UsageError where a concept has none at all."""
    known = [face.embed_faces(subject.references) for subject in subjects]
    if without := [subject.name for subject, found in zip(subjects, known, strict=True) if not any(len(one) for one in found)]:
        raise UsageError(
            f"{face.name} finds no face in any reference of {', '.join(without)}; give pictures with a clear, upright face, "
            "another face judge, or none"
        )
    return known


class Judges:
    """Both judges, with what they make of the references and of the texts."""

    def __init__(self, judge: PictureJudge, face: FaceJudge | None, subjects: Sequence[Subject], templates: Sequence[str]) -> None:
        self.judge, self.face, self.subjects, self.templates = judge, face, subjects, templates
        nouns = dict.fromkeys(["", *(subject.noun for subject in subjects)])
        self.said = {noun: judge.embed_texts([fill(text, noun) for text in templates]) for noun in nouns}
        self.seen = [judge.embed_images(subject.references) for subject in subjects]
        self.known = [] if face is None else known_faces(face, subjects)

    def judged(self, row: Row, output: Path, *, tell: Callable[[str, float], None]) -> Row:
        """The row with the values of its pictures, which lie in `output`, concept by concept and in each prompt by prompt."""
        from PIL import Image

        paths, label = [output / file for file in row.files], row.label
        seen, faces = [], []
        for start in range(0, len(paths), _AT_ONCE):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + _AT_ONCE]]
            seen.append(self.judge.embed_images(images))
            faces += self.face.embed_faces(images) if self.face is not None else []
            tell(f"judging {label}", min(1.0, (start + _AT_ONCE) / len(paths)))
        pictures, count = torch.cat(seen), len(paths) // len(self.subjects)
        asked = torch.arange(len(self.subjects)).repeat_interleave(count)
        numbers = [self.templates.index(prompt) for prompt in row.prompts[:count]]
        told = torch.cat([self.said[subject.noun][numbers] for subject in self.subjects])
        values = {
            "text": metrics.clip_score(pictures, told),
            "text_cosine": metrics.text_cosine(pictures, told),
            "text_dropped": metrics.clip_score(pictures, self.said[""][numbers].repeat(len(self.subjects), 1)),
            "image": torch.cat([metrics.image_alignment(pictures[asked == k], own) for k, own in enumerate(self.seen)]),
        }  # fmt: skip
        confusion = curve = None
        if self.face is not None:
            limit = self.face.limit
            parts = [faces[start : start + count] for start in range(0, len(faces), count)]
            own = [metrics.identity(part, references, limit) for part, references in zip(parts, self.known, strict=True)]
            values |= _identities(own, limit)
            curve = _curve(torch.cat([one.closeness for one in own]), limit)
            if len(self.subjects) > 1:
                accepted = limit.accepts(metrics.closest(faces, metrics.centres(self.known, limit), limit))
                values["leakage"] = metrics.leakage(accepted, asked)
                confusion = metrics.confusion(accepted, asked).tolist()
        return replace(row, values=values, confusion=confusion, curve=curve)

    def references(self, label: str) -> Row:
        """Each reference against the others of its concept, NaN where these have no face. No text; concepts of one picture are left out."""
        image: list[Tensor] = []
        own: list[metrics.Identity] = []
        names: list[str] = []
        for index, (subject, seen) in enumerate(zip(self.subjects, self.seen, strict=True)):
            if len(seen) < 2:
                continue
            names += [subject.name] * len(seen)
            for k in range(len(seen)):
                image.append(metrics.image_alignment(seen[k : k + 1], torch.cat([seen[:k], seen[k + 1 :]])))
                if self.face is not None:
                    found = self.known[index]
                    rest = [*found[:k], *found[k + 1 :]]
                    comparable = any(len(one) for one in rest)
                    own.append(metrics.identity([found[k]], rest, self.face.limit) if comparable else _NOTHING)
        values = {"image": torch.cat(image)} if image else {}
        if self.face is not None and own:
            values |= _identities(own, self.face.limit)
        return Row(label, tuple(names), ("",) * len(names), tuple(range(len(names))), values)


_NAN = torch.full((1,), torch.nan, dtype=torch.float64)
_NOTHING = metrics.Identity(_NAN, _NAN, _NAN, _NAN)


def _identities(parts: Sequence[metrics.Identity], limit: Limit) -> dict[str, Tensor]:
    closeness = torch.cat([one.closeness for one in parts])
    return {
        "identity": torch.cat([one.accepted for one in parts]),
        "identity_any": torch.cat([one.any_reference for one in parts]),
        "face_cosine" if limit.kind == "cosine" else "face_distance": closeness if limit.kind == "cosine" else -closeness,
        "no_face": torch.cat([one.no_face for one in parts]),
    }


def _curve(closeness: Tensor, limit: Limit) -> list[tuple[float, float]]:
    """Identity alignment from half to one and a half times the limit."""
    limits = [round(limit.value * share / 10, 6) for share in range(5, 16)]
    return list(zip(limits, metrics.acceptance(closeness, limits, limit.kind), strict=True))
