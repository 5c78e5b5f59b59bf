"""A LoRA on the pictures of one style."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from loraclr.train.lora import Lora
from loraclr.train.recipe import TOYBOX, Words, plain_words
from loraclr.train.templates import STYLE


@dataclass(frozen=True)
class Style(Lora):
    """The recipe `lora` for what is not a thing: called by a rare word before "style", as in "a picture in moko style".

    Captions that say what is in each picture matter more than elsewhere: what they leave out becomes part of the style.
    """

    name: ClassVar[str] = "style"
    summary: ClassVar[str] = "a LoRA on a style's pictures, called TRIGGER style"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType(
        {"toybox": {**TOYBOX, "rank": 8, "alpha": 8.0, "text_rank": 4, "lr": 1.2e-3, "text_lr": 3e-4}}
    )
    templates: ClassVar[tuple[str, ...]] = STYLE

    def words(self, trigger: str, class_word: str | None) -> Words:
        return plain_words(trigger, class_word, suffix="style")
