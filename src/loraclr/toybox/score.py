"""How well toybox pictures show whom and what they should: shares of attributes that the judge confirms.

Scoring prompts name expression, clothes and place, never the identity, and share no template with the merge's own prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from loraclr.toybox.judge import Judge, agreement, nearest_identity

SCORE_TEMPLATES: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("a photo of a {} wearing a green hoodie in a desert", {"background": "desert", "clothes_colour": "green"}),
    ("a picture of a {} at home", {"background": "room"}),
    ("a smiling {} in a field", {"background": "field", "expression": "smiling"}),
    ("a portrait of a {} wearing a white shirt on a yellow background", {"background": "yellow", "clothes_colour": "white"}),
    ("an angry {} on a blue background", {"background": "blue", "expression": "angry"}),
    ("a photo of a {} wearing a pink blazer in the forest", {"background": "forest", "clothes_colour": "pink"}),
    ("a {} wearing a yellow shirt on a gray background", {"background": "gray", "clothes_colour": "yellow"}),
    ("a picture of a surprised {} under the stars", {"background": "night", "expression": "surprised"}),
)


@dataclass(frozen=True, eq=False)
class Scores:
    """Per picture, (n,): `identity` the share of the identity's attributes seen, `named` 1.0 where the picture is nearest to the
    right one of the candidate identities, `told` the share of the prompt's own attributes seen."""

    identity: Tensor
    named: Tensor
    told: Tensor

    def means(self) -> dict[str, float]:
        return {key: float(getattr(self, key).nanmean()) for key in ("identity", "named", "told")}


def score(
    images: Sequence[Image.Image],
    people: Sequence[str],
    told: Sequence[Mapping[str, str]],
    *,
    judge: Judge,
    candidates: Mapping[str, Mapping[str, str]],
) -> Scores:
    """`people[k]` is the name of whom picture k should show, `candidates` maps names to identity attributes."""
    read = judge.read(images)
    names = list(candidates)
    found = nearest_identity(read, list(candidates.values()), judge.heads)
    right = torch.tensor([names.index(person) for person in people])
    return Scores(
        agreement(read, [candidates[person] for person in people], judge.heads),
        (found == right).double(),
        agreement(read, told, judge.heads),
    )
