"""What people and their tools note beside an adapter's file: A1111's card, and what Civitai's page said when it was fetched.

`NAME.json` is what a user typed into A1111 or Forge; `NAME.metadata.json` and `NAME.civitai.info` are a page of Civitai as download
managers keep it. They are a courtesy: what cannot be read is passed over, and nothing of a file's tensors depends on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BYTES = 8 << 20
_PROMPT_MARKS = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>")
# What a page of Civitai may forbid: its word, the value that forbids, ours.
_TERMS = (
    ("allowNoCredit", False, "credit the creator"),
    ("allowDerivatives", False, "no merges"),
    ("allowDifferentLicense", False, "same permissions for what is made of it"),
)
NO_MERGES = "no merges"


@dataclass(frozen=True)
class Notes:
    """Words that call the adapter, as its user typed them and as its page states them, each with the file that says so; its licence."""

    typed: tuple[str, ...] = ()
    typed_in: str = ""
    published: tuple[str, ...] = ()
    published_in: str = ""
    licence: str = ""


def read(path: Path) -> Notes:
    """The notes beside the adapter at `path`; empty ones if there are none."""
    stem = path.name if path.is_dir() else path.stem
    typed = phrases(_object(path.with_name(f"{stem}.json")).get("activation text"))
    published: tuple[str, ...] = ()
    where = licence = ""
    for ending in (".metadata.json", ".civitai.info"):
        page = _object(path.with_name(stem + ending))
        page = page["civitai"] if isinstance(page.get("civitai"), dict) else page
        if not published and (published := phrases(page.get("trainedWords"))):
            where = stem + ending
        licence = licence or _terms(page)
    return Notes(typed, f"{stem}.json" if typed else "", published, where, licence)


def phrases(stated: object) -> tuple[str, ...]:
    """Text separated by commas, or a list of such texts, as different phrases in order; marks that load a file are left out."""
    texts = stated if isinstance(stated, list) else [stated]
    words = [word for text in texts if isinstance(text, str) for word in _PROMPT_MARKS.sub("", text).split(",")]
    return tuple(dict.fromkeys(word.strip() for word in words if word.strip()))


def _terms(page: Mapping[str, Any]) -> str:
    model = page["model"] if isinstance(page.get("model"), dict) else {}
    stated = {**page, **model}
    found = [words for key, forbids, words in _TERMS if stated.get(key) is forbids]
    use = stated.get("allowCommercialUse")
    if use in ("None", [], ["None"]):
        found.append("no commercial use")
    return f"Civitai: {', '.join(found)}" if found else ""


def _object(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _BYTES:
            return {}
        value = json.loads(path.read_text("utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
