"""Metrics as pure functions of features: no pictures, no encoders, no files.

Axis names: `n` generated pictures, `m` reference pictures, `concepts`, `d` an embedding's width. Every function returns one value per
picture, whose mean is the metric and whose spread `intervals` reads. No face is NaN in a closeness and 0 in a rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loraclr.errors import UsageError

CLIP_SCALE = 2.5  # of CLIPScore: Hessel et al. 2021, arXiv 2104.08718


def text_cosine(pictures: Tensor, texts: Tensor) -> Tensor:
    """(n, d) pictures, (n, d) texts -> (n,) cosine of each picture with its own text."""
    _same_width(pictures, texts)
    if len(pictures) != len(texts):
        raise UsageError(f"{len(pictures)} pictures and {len(texts)} texts; give every picture its text")
    return (normalize(pictures.double(), dim=-1) * normalize(texts.double(), dim=-1)).sum(-1)


def clip_score(pictures: Tensor, texts: Tensor) -> Tensor:
    """(n,) CLIPScore, 2.5 max(cos, 0): text alignment as the tables of the field print it (arXiv 2104.08718, eq. 1)."""
    return CLIP_SCALE * text_cosine(pictures, texts).clamp(min=0)


def image_alignment(pictures: Tensor, references: Tensor) -> Tensor:
    """(n, d), (m, d) -> (n,) mean cosine with all references. Not 1 for the references themselves, unless they are all alike."""
    _same_width(pictures, references)
    return (normalize(pictures.double(), dim=-1) @ normalize(references.double(), dim=-1).T).mean(1)


@dataclass(frozen=True)
class Limit:
    """When two face embeddings count as one person: cosine >= value, or Euclidean distance (`l2`) <= value.

    Closeness is larger for more alike faces in both: the cosine, or minus the distance.
    """

    value: float
    kind: Literal["cosine", "l2"]

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "l2"):
            raise UsageError(f"faces are compared by cosine or l2, not by {self.kind!r}")

    def closeness(self, faces: Tensor, others: Tensor) -> Tensor:
        """(n, d), (m, d) -> (n, m)."""
        _same_width(faces, others)
        faces, others = faces.double(), others.double()
        if self.kind == "cosine":
            return normalize(faces, dim=-1) @ normalize(others, dim=-1).T
        distance: Tensor = torch.linalg.vector_norm(faces[:, None] - others, dim=-1)
        return -distance

    def accepts(self, closeness: Tensor) -> Tensor:
        """Bool, of the same shape; NaN is not accepted."""
        return closeness >= (self.value if self.kind == "cosine" else -self.value)

    def centre(self, references: Tensor) -> Tensor:
        """(m, d) -> (d,): the mean reference embedding, of unit embeddings for cosine."""
        faces = references.double()
        return (normalize(faces, dim=-1) if self.kind == "cosine" else faces).mean(0)


def closest(faces: Sequence[Tensor], others: Tensor, limit: Limit) -> Tensor:
    """Per picture its faces (faces_k, d), and (m, d) others -> (n, m): closeness of the picture's best face, NaN where it has none."""
    rows = [limit.closeness(own, others).amax(0) if len(own) else others.new_full((len(others),), torch.nan).double() for own in faces]
    return torch.stack(rows) if rows else torch.empty(0, len(others), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Identity:
    """Per picture, (n,): how close it is to whom it should show."""

    closeness: Tensor  # to the mean reference embedding; NaN without a face
    accepted: Tensor  # 1 where that passes the limit, else 0: its mean is identity alignment
    any_reference: Tensor  # 1 where some face passes the limit with some single reference
    no_face: Tensor  # 1 where no face was found; such a picture is not accepted


def identity(faces: Sequence[Tensor], references: Sequence[Tensor], limit: Limit) -> Identity:
    """Identity alignment of pictures of one concept. References without a face are left out; UsageError if none has one.

    The tables of the field are best explained as a detection rate at ArcFace cosine 0.32 (a distance of 0.68), no face counting as
    a miss. `any_reference` is the same rule with the nearest reference in place of their mean: more lenient, and more so the more
    references there are.
    """
    known = _stacked(references)
    closeness = closest(faces, limit.centre(known)[None], limit)[:, 0]
    best = closest(faces, known, limit).amax(1)
    return Identity(closeness, limit.accepts(closeness).double(), limit.accepts(best).double(), closeness.isnan().double())


def centres(references: Sequence[Sequence[Tensor]], limit: Limit) -> Tensor:
    """Per concept the faces of its references -> (concepts, d) mean reference embeddings."""
    return torch.stack([limit.centre(_stacked(own)) for own in references])


def confusion(accepted: Tensor, asked: Tensor) -> Tensor:
    """(n, concepts) whom each picture passes for, (n,) which concept was asked -> (concepts, concepts) rates.

    Row i: the pictures asked to show concept i; column j: the share that passes for j. The diagonal is identity alignment. Rows need
    not sum to 1: a picture may pass for two people or for nobody. NaN for concepts that were not asked.
    """
    rows = [accepted[asked == concept].double().mean(0) for concept in range(accepted.shape[1])]
    return torch.stack(rows)


def leakage(accepted: Tensor, asked: Tensor) -> Tensor:
    """(n, concepts), (n,) -> (n,) share of the *other* concepts that a picture passes for; NaN with one concept only.

    Its mean is the mean off the diagonal of `confusion`, and a judge alone brings it to its rate of false accepts: comparable
    between different numbers of concepts.
    """
    others = accepted.double().scatter(1, asked[:, None], 0.0)
    return others.sum(1) / (accepted.shape[1] - 1) if accepted.shape[1] > 1 else others.new_full((len(accepted),), torch.nan)


def nearest(closeness: Tensor) -> Tensor:
    """(n, concepts) -> (n,) the concept that each picture is closest to, -1 without a face."""
    return torch.where(closeness.isnan().any(1), -1, closeness.nan_to_num(-torch.inf).argmax(1))


def acceptance(closeness: Tensor, limits: Sequence[float], kind: Literal["cosine", "l2"]) -> list[float]:
    """Identity alignment at each of several limits, from (n,) closeness: a rate at one limit can hide a lot."""
    return [float(Limit(value, kind).accepts(closeness).double().mean()) for value in limits]


def _stacked(references: Sequence[Tensor]) -> Tensor:
    found = [own for own in references if len(own)]
    if not found:
        raise UsageError(f"no face was found in any of {len(references)} reference pictures; give pictures with a clear, upright face")
    return torch.cat(found)


def _same_width(one: Tensor, other: Tensor) -> None:
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise UsageError(f"features of shapes {tuple(one.shape)} and {tuple(other.shape)}; give rows of the same judge's embeddings")


@dataclass(frozen=True, eq=False)
class Presence:
    """Per picture, (n,): how many of the people asked for are there."""

    share: Tensor  # of them that pass where they should be; its mean is the presence rate
    everyone: Tensor  # 1 where all of them do; its mean is the all-present rate
    assigned: Tensor  # (n, people) which place each of them was given, -1 for none


def presence(closeness: Sequence[Tensor], limit: Limit, *, placed: bool) -> Presence:
    """Of scenes: per picture (places, people) closeness of what is seen at each place to each person asked for, NaN where nothing is.

    With `placed` person k belongs to place k and is looked for nowhere else. Otherwise places (faces found, boxes in any order) are
    given to people one to one so that as many as possible pass and, among such assignments, these are the closest: the Hungarian method
    (Kuhn 1955). One face never counts for two people. Raises UsageError for regions that are not one for each person.
    """
    shares, everyone, assigned = [], [], []
    for table in closeness:
        places, people = table.shape
        if placed and places != people:
            raise UsageError(f"{places} places and {people} people; with placed people give the one place of each")
        given = torch.arange(people) if placed else _matched(table, limit)
        seen = torch.tensor([float(table[place, person]) if place >= 0 else math.nan for person, place in enumerate(given.tolist())])
        passes = limit.accepts(seen.double()).double()
        shares.append(passes.mean())
        everyone.append(passes.prod())
        assigned.append(given)
    return Presence(torch.stack(shares).double(), torch.stack(everyone).double(), torch.stack(assigned))


def _matched(table: Tensor, limit: Limit) -> Tensor:
    """(people,) the place of each, -1 for none."""
    from scipy.optimize import linear_sum_assignment

    passes = limit.accepts(table.double()).double()
    known = table.double().nan_to_num(nan=-torch.inf)
    finite = known[known.isfinite()]
    low, spread = (float(finite.min()), float(finite.max() - finite.min()) + 1) if len(finite) else (0.0, 1.0)
    # A pass outweighs all closeness together; what is not there is worse than the farthest.
    gain = passes * (1 + min(table.shape)) + ((known - low) / spread).clamp(min=-1)
    places, people = linear_sum_assignment(gain.numpy(), maximize=True)
    given = torch.full((table.shape[1],), -1)
    given[torch.as_tensor(people)] = torch.as_tensor(places)
    return given


def attribute_closeness(read: Mapping[str, Tensor], people: Sequence[Mapping[str, int]]) -> Tensor:
    """(n, people): the share of each person's attributes that a picture's most probable values agree with.

    `read` is, per attribute, (n, values) probabilities of a judge; `people` give each attribute's index of its true value.
    Compared by a `Limit` of kind cosine: at value 1 all attributes must agree.
    """
    first = {name: values.argmax(-1) for name, values in read.items()}
    rows = [torch.stack([(first[name] == value).double() for name, value in person.items()]).mean(0) for person in people]
    return torch.stack(rows, 1)
