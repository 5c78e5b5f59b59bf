"""What headers say besides scales: the words that call an adapter, and the family of models it is for."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loraclr.adapter import Adapter

TRIGGERS = "modelspec.trigger_phrase"
ARCHITECTURE = "modelspec.architecture"

# Start of ss_base_model_version, start of modelspec.architecture, our word. Longer starts first.
_FAMILIES = (
    ("sdxl", "stable-diffusion-xl", "sdxl"),
    ("sd_v1", "stable-diffusion-v1", "sd1"),
    ("sd_v2", "stable-diffusion-v2", "sd2"),
    ("sd3", "stable-diffusion-3", "sd3"),
    ("flux", "flux-1", "flux"),
)
# True of the tensors they came with, false of any others.
_STALE = {
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata", "format"),
}


def family(metadata: Mapping[str, str], guess: str | None = None) -> str | None:
    """`sd1`, `sdxl`, ... as stated, else the `guess`; a model specification outside the table is kept as it stands, less its `/lora`."""
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get(ARCHITECTURE, "")
    for ours_starts, spec_starts, word in _FAMILIES:
        if version.startswith(ours_starts) or architecture.startswith(spec_starts):
            return word
    return guess or architecture.removesuffix("/lora") or None


def triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The stated trigger phrases; else what kohya's trainer noted: folder names (`10_sks man` -> `sks man`) and the most frequent tag."""
    if stated := metadata.get(TRIGGERS, "").strip():
        return tuple(dict.fromkeys(phrase.strip() for phrase in stated.split(",") if phrase.strip()))
    found = [match[1].strip() for folder in _object(metadata, "ss_dataset_dirs") if (match := re.fullmatch(r"\d+_(.+)", folder))]
    counts: Counter[str] = Counter()
    for tags in _object(metadata, "ss_tag_frequency").values():
        if isinstance(tags, dict):
            counts.update({tag.strip(): count for tag, count in tags.items() if isinstance(count, int)})
    found += [max(sorted(counts), key=lambda tag: counts[tag])] if counts else []
    return tuple(dict.fromkeys(word for word in found if word))


def trained_split(metadata: Mapping[str, str]) -> bool:
    """Whether kohya's trainer kept the parts of fused matrices apart, which makes the scale its own files state too small."""
    return str(_object(metadata, "ss_network_args").get("split_qkv", "")).lower() in ("true", "1")


def outgoing(adapter: Adapter, extra: Mapping[str, str]) -> dict[str, str]:
    """The header of a file to be written: what came in and still holds, triggers and family, and `extra` on top."""
    kept = {key: value for key, value in adapter.metadata.items() if key not in _STALE and not key.endswith("adapter_config.json")}
    if adapter.triggers:
        kept[TRIGGERS] = ", ".join(adapter.triggers)
    if adapter.family:
        spec = next((spec for _, spec, word in _FAMILIES if word == adapter.family), adapter.family)
        kept[ARCHITECTURE] = f"{spec}/lora"
    return kept | dict(extra)


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """A JSON object, or nothing: these notes are a courtesy of the trainer, and no reason to refuse a file."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
