"""The scale a PEFT LoraConfig gives a module, from its JSON form: adapter_config.json, or the header of a diffusers file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loraclr.errors import FormatError

# Settings under which the delta is not scale * up @ down, and the values that leave it alone.
_PLAIN: dict[str, tuple[object, ...]] = {
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "use_qalora": (None, False),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),  # PiSSA and its kin move the base weights as well
}


def parse(text: str, where: str) -> dict[str, Any]:
    """A JSON object, or FormatError."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise FormatError(f"{where} holds a {type(config).__name__}; expected an object with r and lora_alpha")
    return config


def check(config: Mapping[str, Any], where: str) -> None:
    """FormatError for settings that make the adapter more than a plain LoRA."""
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise FormatError(f"{where}: {key}={config[key]!r} changes more than a plain LoRA does; convert the adapter with PEFT first")


def check_dora(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """`configs` are those of the layers without magnitudes, which use_dora would promise. Raises FormatError."""
    for name, config in configs.items():
        if config.get("use_dora") not in (None, False):
            raise FormatError(f"{name}: the configuration says use_dora, but there are no magnitudes for it; fetch the file again")


def magnitude(vector: Tensor) -> Tensor:
    """PEFT's magnitudes, (out,) or (1, out, 1, 1) for convolutions, as a column (out, 1): always one for each output row."""
    return vector.reshape(-1, 1)


def scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """lora_alpha / r, or / sqrt(r) with use_rslora, after `rank_pattern` and `alpha_pattern`; PEFT's defaults are 8 and 8.

    Text encoder patterns are tried with and without `text_model.`, as the file may be older than transformers 5.
    """
    stated = _number(_by_pattern(config, "rank_pattern", path, config.get("r", 8)), "r", path)
    if stated != rank:
        raise FormatError(f"{path}: the configuration says rank {stated:g}, its tensors have {rank}; the two do not belong together")
    return strength(config, path)


def strength(config: Mapping[str, Any], path: str) -> float:
    """What `scale` comes to, by the stated rank alone. `lora_alpha` is `alpha` in the configurations of LoHa and LoKr."""
    rank = _number(_by_pattern(config, "rank_pattern", path, config.get("r", 8)), "r", path)
    stated = config.get("lora_alpha", config.get("alpha", 8))
    alpha = _number(_by_pattern(config, "alpha_pattern", path, stated), "lora_alpha", path)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def for_ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration under which every module (path -> rank) has scale 1."""
    counts = list(ranks.values())
    common = max(sorted(set(counts)), key=counts.count)
    pattern = {path: ranks[path] for path in sorted(ranks) if ranks[path] != common}
    return {
        "alpha_pattern": pattern,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": common,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": pattern,
        "target_modules": sorted(ranks),
    }


def _number(value: object, what: str, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"{path}: {what} is {value!r} in the configuration; expected a number")
    return value


def _by_pattern(config: Mapping[str, Any], key: str, path: str, default: object) -> object:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{key} is a {type(patterns).__name__}; expected an object of patterns and numbers")
    for pattern, value in patterns.items():
        if _matches(pattern, path) or _matches(pattern, f"text_model.{path}"):
            return value
    return default


def _matches(pattern: str, path: str) -> bool:
    """PEFT's rule: the end of the path, from a dot on, read as a regular expression."""
    plain = pattern.removeprefix("^")
    if path == plain or (plain == pattern and path.endswith(f".{plain}")):
        return True
    if not re.search(r"[*+?{|\[(\\]", pattern):
        return False
    # A pattern comes from the file: nested quantifiers could keep the matcher busy for ever.
    if len(pattern) > 200 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 2:
        raise FormatError(f"pattern {pattern[:60]!r} is too involved to be run; write the module names out instead")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise FormatError(f"pattern {pattern!r} is no regular expression ({error}); save the adapter again") from error
