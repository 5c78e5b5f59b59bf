"""Custom Diffusion: the keys and values of cross-attention, and a word that modifies the class word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from loraclr.adapter import Layer, LoraLayer
from loraclr.methods.options import Option
from loraclr.train.edlora import Spread, TokenLr
from loraclr.train.recipe import TOYBOX, Batch, Flip, PriorWeight, Recipe, Steps, Words, learned_words, too_high
from loraclr.train.student import Student, keys_and_values
from loraclr.train.tokens import token_problems

if TYPE_CHECKING:
    from loraclr.pipeline import Pipeline


@dataclass(frozen=True)
class CustomDiffusion(Recipe):
    """Cross-attention keys and values as whole matrices and a modifier token before the class word, "<rhea> woman" (arXiv 2212.04488).

    Half of every batch are regularisation pictures of the class with their captions. The modifier starts at random: the released
    trainer's rare word means nothing either. `rank` cuts the trained change to a low rank at the end, and the file says what was lost.
    Faces are asked for half the learning rate and three times the steps.
    """

    name: ClassVar[str] = "custom-diffusion"
    summary: ClassVar[str] = "cross-attention keys and values, and a modifier word"
    reference: ClassVar[str] = "Custom Diffusion, arXiv 2212.04488"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType(
        {
            "faces": {"lr": 2e-5, "token_lr": 2e-5, "steps": 750},
            "toybox": {**TOYBOX, "lr": 5e-4, "token_lr": 5e-3, "spread": None, "prior_pictures": 32, "batch": 6, "rank": 8},
        }
    )

    steps: Steps = 250
    batch: Batch = 4
    flip: Flip = True
    prior_weight: PriorWeight = 1.0
    lr: Annotated[float, Option("learning rate of keys and values", 0)] = 4e-5
    token_lr: TokenLr = 4e-5
    spread: Spread = 0.013
    rank: Annotated[int, Option("of the change in the file; 0 keeps it whole", 0)] = 0

    @property
    def whole_layers(self) -> bool:
        return self.rank == 0

    def words(self, trigger: str, class_word: str | None) -> Words:
        return learned_words(trigger, class_word, count=1, followed=True)

    def problems(self, pipeline: Pipeline, words: Words) -> list[str]:
        return token_problems(pipeline, words, starts_at_class=False) + too_high(pipeline, keys_and_values(pipeline), self.rank)

    def attach(self, student: Student, words: Words) -> None:
        assert words.class_word is not None
        start = student.random_row(self.spread, like=words.class_word)
        student.add_tokens({words.tokens[0]: start[None]}, lr=self.token_lr)
        student.add_changes(keys_and_values(student.pipeline), lr=self.lr)

    def layers(self, student: Student) -> tuple[list[Layer], dict[str, float]]:
        """Whole, or of `rank`: the nearest in the Frobenius norm, with `lost`, the share of the norm of all changes that is gone."""
        whole = student.layers()
        if not self.rank:
            return whole, {}
        cut: list[Layer] = []
        gone = total = 0.0
        for layer in whole:
            change = layer.delta(torch.float64)
            left, values, right = torch.linalg.svd(change, full_matrices=False)
            root = values[: self.rank].sqrt()
            cut.append(LoraLayer(layer.name, (root[:, None] * right[: self.rank]).float(), (left[:, : self.rank] * root).float()))
            gone, total = gone + float(values[self.rank :].square().sum()), total + float(values.square().sum())
        return cut, {"lost": (gone / total) ** 0.5 if total else 0.0}
