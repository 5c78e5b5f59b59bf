"""ED-LoRA, the single-concept part of Mix-of-Show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar

from loraclr.methods.options import Option
from loraclr.train.attention import attention_penalty
from loraclr.train.lora import Alpha, Lr, Rank, TextAlpha, TextLr, TextRank
from loraclr.train.recipe import TOYBOX, Hold, NoiseOffset, Recipe, Words, learned_words, too_high
from loraclr.train.student import Student, text_attention, unet_attention
from loraclr.train.templates import PERSON
from loraclr.train.tokens import token_problems

if TYPE_CHECKING:
    from torch import Tensor

    from loraclr.pipeline import Pipeline

TokenLr = Annotated[float, Option("learning rate of the learned tokens", 0)]
Spread = Annotated[float | None, Option("standard deviation of the first word at the start; none: the class word's own", 0)]
NormStop = Annotated[float | None, Option("learned tokens stop when their mean norm reaches this; none: they do not", 0)]
AttentionWeight = Annotated[float, Option("weight of the penalty on words that look outside the mask; needs masks", 0)]
Whole = Annotated[bool, Option("the second word shall look at the whole mask, not only inside it")]

TOYBOX_TOKENS = {"spread": None, "norm_stop": None, "token_lr": 5e-3, "lr": 1.2e-3, "text_lr": 3e-4, "noise_offset": 0.0}


@dataclass(frozen=True)
class EdLora(Recipe):
    """Two learned words, each with one embedding per cross-attention layer, and a LoRA on the attention of UNet and text encoder.

    The words carry what the base can say about the concept, the LoRA what it cannot. Mix-of-Show (arXiv 2305.18292) with the numbers of
    its released trainer: there a concept of n pictures takes n * 125 steps of 4 pictures. The first word starts at random, the second
    at the class word. Where pictures have masks, only what is inside them counts, and words that look outside are penalised. The
    released trainer's scale is alpha, not alpha / rank: its alpha 1 is `alpha=rank` here.
    """

    name: ClassVar[str] = "edlora"
    summary: ClassVar[str] = "ED-LoRA (Mix-of-Show): two layer-wise words and a LoRA"
    reference: ClassVar[str] = "Mix-of-Show, arXiv 2305.18292"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType({"toybox": {**TOYBOX, **TOYBOX_TOKENS}})
    layerwise: ClassVar[bool] = True
    templates: ClassVar[tuple[str, ...]] = PERSON

    hold: Hold = 0.0
    noise_offset: NoiseOffset = 0.01
    rank: Rank = 4
    alpha: Alpha = 4.0
    text_rank: TextRank = 4
    text_alpha: TextAlpha = 4.0
    lr: Lr = 1e-4
    text_lr: TextLr = 1e-5
    token_lr: TokenLr = 1e-3
    spread: Spread = 0.013
    norm_stop: NormStop = 0.55
    attention_weight: AttentionWeight = 0.01
    whole: Whole = False

    def words(self, trigger: str, class_word: str | None) -> Words:
        return learned_words(trigger, class_word, count=2)

    def problems(self, pipeline: Pipeline, words: Words) -> list[str]:
        ranks = too_high(pipeline, unet_attention(pipeline), self.rank) + too_high(pipeline, text_attention(pipeline), self.text_rank)
        return ranks + token_problems(pipeline, words)

    def attach(self, student: Student, words: Words) -> None:
        assert words.class_word is not None
        layers = len(student.pipeline.cross_attention_layers)
        starts = student.random_row(self.spread, like=words.class_word), student.embedding_of(words.class_word)
        student.add_tokens({token: row.expand(layers, -1) for token, row in zip(words.tokens, starts, strict=True)}, lr=self.token_lr)
        self.attach_loras(student)

    def attach_loras(self, student: Student) -> None:
        student.add_lora(unet_attention(student.pipeline), rank=self.rank, alpha=self.alpha, lr=self.lr)
        if self.text_rank:
            student.add_lora(text_attention(student.pipeline), rank=self.text_rank, alpha=self.text_alpha, lr=self.text_lr)

    @property
    def watches(self) -> bool:
        return self.attention_weight > 0

    def penalty(self, maps: Sequence[Tensor], places: Tensor, masks: Tensor, *, latent: tuple[int, int]) -> Tensor | None:
        found = attention_penalty(maps, places, masks, latent=latent, whole=self.whole)
        return None if found is None else self.attention_weight * found

    def after_step(self, student: Student) -> None:
        """The released trainer's rule: once the rows are as long as those of ordinary words, they are left alone."""
        if self.norm_stop is not None and not student.tokens_frozen and float(student.rows.detach().norm(dim=1).mean()) >= self.norm_stop:
            student.freeze_tokens()
