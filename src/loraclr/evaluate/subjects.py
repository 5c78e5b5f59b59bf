"""What a trial is about: concepts with their words and reference pictures, and prompts with a place for the words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraclr.adapter import Adapter, noun_of
from loraclr.errors import UsageError
from loraclr.pictures import SUFFIXES, pictures_in, read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Subject", "call_of", "fill", "noun_of", "read_captions", "read_prompts", "read_references", "template"]

PLACES = ("{}", "<TOK>")


@dataclass(frozen=True, eq=False)
class Subject:
    """A concept as a trial sees it. `noun` stands for `call` where no adapter knows it: in the base's prompts, and in the text that
    pictures are compared with."""

    name: str
    call: str  # `rhea woman`, or `<rhea1> <rhea2>`
    noun: str  # `woman`
    references: Sequence[Image]


def template(prompt: str) -> str:
    """The prompt with its one {} or <TOK> written as {}, and evenly spaced."""
    if sum(prompt.count(place) for place in PLACES) != 1:
        raise UsageError(f"prompt {prompt!r} needs exactly one {{}} or <TOK>, where the concept's words go")
    return fill(prompt.replace("<TOK>", "{}"), "{}")


def fill(template: str, words: str) -> str:
    """The words in place of {}; without words the place closes up."""
    return re.sub(r"\s+([,.]|$)", r"\1", " ".join(template.replace("{}", words).split()))


def read_prompts(path: str | Path) -> dict[str, str]:
    """Prompt -> its group, "" outside of any. One prompt a line; `[context]` alone on a line begins a group of that name; empty lines
    and lines that start with # are passed over."""
    prompts: dict[str, str] = {}
    group = ""
    for line in map(str.strip, read_lines(path)):
        if head := re.fullmatch(r"\[([^\[\]{}<>]+)\]", line):
            group = head[1].strip()
        else:
            prompts.setdefault(template(line), group)
    if not prompts:
        raise UsageError(f"{path} holds no prompt; write one a line, with {{}} where the concept's words go")
    return prompts


def read_captions(path: str | Path) -> list[str]:
    """Prompts without any concept, one a line; empty lines and lines that start with # are passed over."""
    captions = list(dict.fromkeys(" ".join(line.split()) for line in read_lines(path)))
    if called := [caption for caption in captions if any(place in caption for place in PLACES)]:
        raise UsageError(f"{path}: {called[0]!r} has a place for a concept's words; these prompts are to be without any concept")
    if not captions:
        raise UsageError(f"{path} holds no prompt; write one a line, without any concept")
    return captions


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text, without those that are empty or begin with #. Raises UsageError for what is no text."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # Windows' editors begin with a mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text ({error.reason}); give a text file with one prompt a line") from error
    return [line for line in lines if (text := line.strip()) and not text.startswith("#")]


def read_references(folder: str | Path) -> dict[str, list[Image]]:
    """Pictures of DIR/CONCEPT/ by concept; or of DIR itself, which is then one concept of that name."""
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; give one with pictures, or with CONCEPT/ folders of pictures")
    inside = {path.name: found for path in sorted(root.iterdir()) if path.is_dir() and (found := pictures_in(path))}
    own = pictures_in(root)
    if bool(inside) == bool(own):
        seen = "both pictures and folders of pictures" if own else f"no pictures ({', '.join(SUFFIXES)})"
        raise UsageError(f"{root} holds {seen}; give either pictures of one concept, or CONCEPT/ folders of pictures")
    chosen = inside or {root.resolve().name: own}
    return {name: [read_picture(path) for path in paths] for name, paths in chosen.items()}


def call_of(adapter: Adapter, name: str, *, alone: bool) -> str | None:
    """The words that call concept `name`: as the merge's receipt states them, or those of an adapter that holds it `alone`."""
    try:
        inputs = json.loads(adapter.metadata["loraclr.receipt"])["inputs"]
        stated = {str(entry["name"]): str(entry["call"] or "") for entry in inputs}
    except (KeyError, ValueError, TypeError):
        return (adapter.call or None) if alone else None
    return stated.get(name) or None
