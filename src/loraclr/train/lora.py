"""DreamBooth with a LoRA: the recipe behind most files in the wild."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar

from loraclr.methods.options import Option
from loraclr.train.recipe import TOYBOX, Recipe, Words, plain_words, too_high
from loraclr.train.student import Student, text_attention, unet_attention
from loraclr.train.templates import PERSON

if TYPE_CHECKING:
    from loraclr.pipeline import Pipeline

Rank = Annotated[int, Option("of the UNet's LoRA", 1)]
Alpha = Annotated[float, Option("the change is alpha / rank * up @ down", 0)]
TextRank = Annotated[int, Option("of the text encoder's LoRA; 0 leaves the text encoder alone", 0)]
TextAlpha = Annotated[float, Option("alike for the text encoder", 0)]
Lr = Annotated[float, Option("learning rate of the UNet's LoRA", 0)]
TextLr = Annotated[float, Option("learning rate of the text encoder's LoRA", 0)]


@dataclass(frozen=True)
class Lora(Recipe):
    """A LoRA on the attention of UNet and text encoder (SDXL: both), called by a rare word before the class word: "rhea woman".

    DreamBooth (arXiv 2208.12242) with the weights held still and a LoRA (arXiv 2106.09685) trained beside them, as cloneofsimo's and
    diffusers' trainers do. `prior_weight=1` is DreamBooth's prior preservation, on pictures of the class.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "DreamBooth-LoRA: a rare word calls the concept"
    reference: ClassVar[str] = "DreamBooth, arXiv 2208.12242; LoRA, arXiv 2106.09685"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType(
        {"toybox": {**TOYBOX, "rank": 8, "alpha": 8.0, "text_rank": 4, "lr": 1.2e-3, "text_lr": 3e-4}}
    )
    for_sdxl: ClassVar[bool] = True
    templates: ClassVar[tuple[str, ...]] = PERSON

    rank: Rank = 4
    alpha: Alpha = 4.0
    text_rank: TextRank = 4
    text_alpha: TextAlpha = 4.0
    lr: Lr = 1e-4
    text_lr: TextLr = 5e-5

    def words(self, trigger: str, class_word: str | None) -> Words:
        return plain_words(trigger, class_word)

    def problems(self, pipeline: Pipeline, words: Words) -> list[str]:
        return too_high(pipeline, unet_attention(pipeline), self.rank) + too_high(pipeline, text_attention(pipeline), self.text_rank)

    def attach(self, student: Student, words: Words) -> None:
        student.add_lora(unet_attention(student.pipeline), rank=self.rank, alpha=self.alpha, lr=self.lr)
        if self.text_rank:
            student.add_lora(text_attention(student.pipeline), rank=self.text_rank, alpha=self.text_alpha, lr=self.text_lr)
