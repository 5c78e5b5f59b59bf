"""What headers say besides scales: the words that call an adapter, and the family of models it is for."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loraclr.adapter import Adapter
from loraclr.formats.notes import Notes, phrases

TRIGGERS = "modelspec.trigger_phrase"
ARCHITECTURE = "modelspec.architecture"
SPECIFICATION = "modelspec.sai_model_spec"

# Start of ss_base_model_version, start of modelspec.architecture, our word. Longer starts first.
_FAMILIES = (
    ("sdxl", "stable-diffusion-xl", "sdxl"),
    ("sd_v1", "stable-diffusion-v1", "sd1"),
    ("sd_v2", "stable-diffusion-v2", "sd2"),
    ("sd3", "stable-diffusion-3", "sd3"),
    ("flux", "flux-1", "flux"),
)
# A1111 takes every file with a header for one of SD1.x, and hides it from other models, unless it says this.
_VERSIONS = {
    "sd1": {"ss_base_model_version": "sd_v1"},
    "sd2": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0"},
    "flux": {"ss_base_model_version": "flux1"},
}
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


def triggers(metadata: Mapping[str, str], notes: Notes | None = None) -> tuple[tuple[str, ...], str]:
    """The words that call an adapter, and who says so: the first that says anything of

    what its user typed beside the file, `modelspec.trigger_phrase`, its page at Civitai, and what kohya's trainer noted: folder names
    (`10_sks man` -> `sks man`) and the most frequent tag.
    """
    notes = notes or Notes()
    found = [match[1].strip() for folder in _object(metadata, "ss_dataset_dirs") if (match := re.fullmatch(r"\d+_(.+)", folder))]
    counts: Counter[str] = Counter()
    for tags in tag_frequency(metadata):
        counts.update(tags)
    tag = [max(sorted(counts), key=lambda tag: counts[tag])] if counts else []
    noted = " and ".join(key for key, words in (("ss_dataset_dirs", found), ("ss_tag_frequency", tag)) if words)
    for words, source in (
        (notes.typed, notes.typed_in),
        (phrases(metadata.get(TRIGGERS)), TRIGGERS),
        (notes.published, notes.published_in),
        (tuple(dict.fromkeys(word for word in (*found, *tag) if word)), noted),
    ):
        if words:
            return words, source
    return (), ""


def tag_frequency(metadata: Mapping[str, str]) -> list[dict[str, int]]:
    """How often kohya's trainer saw each tag, one entry per folder of pictures."""
    folders = [tags for tags in _object(metadata, "ss_tag_frequency").values() if isinstance(tags, dict)]
    return [{tag.strip(): count for tag, count in tags.items() if isinstance(count, int)} for tags in folders]


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
        kept = _VERSIONS.get(adapter.family, {}) | kept
    return kept | {SPECIFICATION: "1.0.1", **extra}


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """A JSON object, or nothing: these notes are a courtesy of the trainer, and no reason to refuse a file."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
