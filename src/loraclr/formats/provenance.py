"""What the header of a merged file says of the files it was made of: licences, authors, tags, and the model they are for.

Every entry is a function of the inputs' headers alone. `DESCENT` are those that tell of the inputs; the others are needed to use the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from loraclr.adapter import Adapter, style_of
from loraclr.formats import header

LICENSE, AUTHOR, TAGS = "modelspec.license", "modelspec.author", "modelspec.tags"
MERGED_FROM, FREQUENCY, RECEIPT = "modelspec.merged_from", "ss_tag_frequency", "loraclr.receipt"
DESCENT = frozenset({LICENSE, AUTHOR, TAGS, MERGED_FROM, FREQUENCY, RECEIPT, "modelspec.description"})

# Kept where all inputs that state it agree: what a loader must know about the base.
_AGREED = (
    *(header.ARCHITECTURE, header.PREDICTION, "modelspec.resolution", "modelspec.encoder_layer"),
    *("ss_base_model_version", "ss_v2", "ss_v_parameterization", "ss_clip_skip"),
)


def joined(adapters: Sequence[Adapter]) -> dict[str, str]:
    """The header entries of what is made of `adapters`: what they agree on, every licence and author, the union of their tags."""
    found = {}
    for key in _AGREED:
        values = {adapter.metadata[key] for adapter in adapters if adapter.metadata.get(key)}
        if len(values) == 1:
            found[key] = values.pop()
    for key, between in ((LICENSE, "; "), (AUTHOR, ", ")):
        found[key] = between.join(_different(adapters, key, between))
    found[TAGS] = ", ".join(_different(adapters, TAGS, ","))
    tags = {adapter.name: counts for adapter in adapters if (counts := _counted(adapter.metadata))}
    found[FREQUENCY] = json.dumps(tags, sort_keys=True) if tags else ""
    found[MERGED_FROM] = ", ".join(_name(adapter) for adapter in adapters)
    return {key: value for key, value in found.items() if value}


def prompt(calls: Sequence[str]) -> str:
    """A prompt to begin with: the first two concepts together, or without any the first style; empty where nothing calls them."""
    called = [call for call in dict.fromkeys(calls) if call]
    shown = [call for call in called if style_of(call) is None]
    return f"a photo of {' and '.join(shown[:2])}" if shown else f"a picture in {style_of(called[0])}" if called else ""


def usage(calls: Sequence[str]) -> str:
    """How to use the file, in one line."""
    called = [call for call in dict.fromkeys(calls) if call]
    return f"Strength 1. Called by: {'; '.join(called)}. Prompt: {prompt(calls)}" if called else "Strength 1."


def withheld(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that do not tell of the inputs."""
    return {key: value for key, value in metadata.items() if key not in DESCENT}


def _name(adapter: Adapter) -> str:
    """With what it was merged from itself."""
    older = adapter.metadata.get(MERGED_FROM, "")
    return f"{adapter.name} ({older})" if older else adapter.name


def _different(adapters: Sequence[Adapter], key: str, between: str) -> list[str]:
    parts = [part.strip() for adapter in adapters for part in adapter.metadata.get(key, "").split(between.strip())]
    return list(dict.fromkeys(part for part in parts if part))


def _counted(metadata: Mapping[str, str]) -> dict[str, int]:
    """How often each tag stood in any of an input's folders."""
    counts: Counter[str] = Counter()
    for tags in header.tag_frequency(metadata):
        counts.update(tags)
    return dict(sorted(counts.items()))
