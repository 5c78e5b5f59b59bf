"""Textual Inversion: the concept is one new word, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from loraclr.train.edlora import TokenLr
from loraclr.train.recipe import TOYBOX, Recipe, Steps, Words, learned_words
from loraclr.train.student import Student
from loraclr.train.tokens import token_problems

if TYPE_CHECKING:
    from loraclr.pipeline import Pipeline


@dataclass(frozen=True)
class TextualInversion(Recipe):
    """One embedding of a new word, trained on templated prompts; it starts at the class word (arXiv 2208.01618).

    The learning rate is diffusers' 5e-4 times its effective batch of 4, scaled to 2.
    """

    name: ClassVar[str] = "textual-inversion"
    summary: ClassVar[str] = "one new word, all weights as they were"
    reference: ClassVar[str] = "Textual Inversion, arXiv 2208.01618"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType({"toybox": {**TOYBOX, "token_lr": 5e-3}})
    only_tokens: ClassVar[bool] = True

    steps: Steps = 3000
    token_lr: TokenLr = 1e-3

    def words(self, trigger: str, class_word: str | None) -> Words:
        return learned_words(trigger, class_word, count=1)

    def problems(self, pipeline: Pipeline, words: Words) -> list[str]:
        return token_problems(pipeline, words)

    def attach(self, student: Student, words: Words) -> None:
        assert words.class_word is not None
        rows = len(student.pipeline.cross_attention_layers) if self.layerwise else 1
        student.add_tokens({words.tokens[0]: student.embedding_of(words.class_word).expand(rows, -1)}, lr=self.token_lr)
