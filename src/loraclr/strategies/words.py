"""Who is meant where in a prompt: each adapter's words, the plain noun that stands for them, and which tokens these are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraclr.adapter import Adapter, noun_of
from loraclr.errors import UsageError


@dataclass(frozen=True, eq=False)
class Part:
    """An adapter that plays in a picture. `noun` is what the base calls the same thing; None: the last word of a plain call."""

    adapter: Adapter
    scale: float = 1.0
    noun: str | None = None

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def call(self) -> str:
        return self.adapter.call

    @property
    def plain(self) -> str:
        """Raises UsageError where nothing says the noun."""
        if (noun := self.noun or noun_of(self.call)) is None:
            raise UsageError(f"what kind of thing is {self.name}, called by {self.call!r}? --class {self.name}=WORDS, or Part(noun=...)")
        return noun


@dataclass(frozen=True)
class Words:
    """A prompt in pieces: (text, index of the part whose words these are, or None)."""

    pieces: tuple[tuple[str, int | None], ...]

    @staticmethod
    def of(prompt: str, parts: Sequence[Part]) -> Words:
        """Longer calls first, so that `<a> woman` is not taken for `<a>`; upper and lower case are one, as in CLIP's text."""
        calls = {part.call.lower(): number for number, part in enumerate(parts) if part.call}
        if not calls:
            return Words(((prompt, None),))
        # Only whole words: `rhea` is not in `rheal`.
        either = "|".join(rf"(?<!\w){re.escape(call)}(?!\w)" for call in sorted(calls, key=len, reverse=True))
        found = re.split(f"({either})", prompt, flags=re.IGNORECASE)
        return Words(tuple((text, calls.get(text.lower())) for text in found if text))

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """The parts whose call the prompt does not hold."""
        there = {owner for _, owner in self.pieces}
        return [part for number, part in enumerate(parts) if number not in there]

    def said(self, parts: Sequence[Part], who: int | None) -> Words:
        """The prompt in which only part `who` is called by its own words, all others by their nouns."""
        return Words(tuple((text if owner in (None, who) else parts[owner].plain, owner) for text, owner in self.pieces))

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    def spots(self, count: Callable[[str], int]) -> dict[int, list[int]]:
        """Part -> positions of its words among the prompt's tokens. `count` counts tokens of a text with begin and end marks."""
        spots: dict[int, list[int]] = {}
        before = ""
        for text, owner in self.pieces:
            if owner is not None:
                # The begin mark stands in front, the end mark of the counted text behind.
                spots.setdefault(owner, []).extend(range(count(before) - 1, count(before + text) - 1))
            before += text
        return spots
