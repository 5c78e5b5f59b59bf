"""The names diffusers has used over the years: attention processors (2023), `.lora.down` (2023), `.lora_A` (since 2024, written here).

Scale is 1 unless the header has `lora_adapter_metadata` (a LoraConfig per component) or the file has `.alpha` keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from loraclr.adapter import Adapter
from loraclr.errors import FormatError
from loraclr.formats import loraconfig, names
from loraclr.formats.base import Content, Parts, Storage, stored_layers, unplaced

id: str = "diffusers"
storage: Storage = "file"
holds_tokens: bool = False

CONFIG = "lora_adapter_metadata"
_WEIGHT = re.compile(
    r"(?P<path>[\w.]+?)(?:\.lora_(?P<new>[AB])(?:\.default)?|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<old>down|up))\.weight"
)
_ALPHA = re.compile(r"(?P<path>[\w.]+?)(?:\.lora|\.lora_linear_layer|_lora)?(?:\.down\.weight)?\.alpha")
_PART = {"A": "down", "B": "up", "down": "down", "up": "up"}
_PROCESSOR = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # the text encoder's processors of 2023


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    mine = (key for key in keys if not key.startswith("base_model.model."))
    return any(_WEIGHT.fullmatch(key) or key.endswith(".lora_magnitude_vector") for key in mine)


def read(content: Content) -> Adapter:
    parts, unknown, alphas = Parts(), [], False
    for key, tensor in content.tensors.items():
        weight, alpha = _WEIGHT.fullmatch(key), _ALPHA.fullmatch(key)
        match = weight or alpha
        name = _canonical(match["path"]) if match else None
        if name is None:
            unknown.append(key)
        elif weight:
            parts.put(name, _PART[weight["new"] or weight["old"]], tensor)
        else:
            parts.put(name, "alpha", tensor)
            alphas = True
    if unknown:
        raise unplaced(unknown, id)
    configs = _configs(content.metadata)
    if configs and alphas:
        raise FormatError(f"has alpha keys and {CONFIG} in its header, two answers to one question; remove one of them")

    def scale(name: str, rank: int, alpha: float | None) -> float:
        component, path = names.split(name)
        if component in configs:
            return loraconfig.scale(configs[component], path, rank)
        return alpha / rank if alpha else 1.0

    return Adapter(parts.layers(scale))


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    tensors, ranks = {}, dict[str, dict[str, int]]()
    for layer, stored in stored_layers(adapter, dtype):
        component, path = names.split(layer.name)
        if component not in names.ROOTS:
            raise FormatError(f"{layer.name}: {id} files hold {' and '.join(names.ROOTS)}; leave {component!r} out")
        if len(stored) == 1:
            raise FormatError(f"{layer.name} is a dense change, which {id} cannot load; write format 'kohya', or reduce it to a rank first")
        stem = f"{component}.{names.with_text_model(component, path)}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = stored
        ranks.setdefault(component, {})[path] = layer.rank
    # Patterns are written without `text_model.`: diffusers matches them against the model, which may or may not have that level.
    config = {f"{component}.{key}": value for component in sorted(ranks) for key, value in loraconfig.for_ranks(ranks[component]).items()}
    return Content(tensors, {CONFIG: json.dumps(config, sort_keys=True)} if config else {})


def _canonical(path: str) -> str | None:
    component, rest = names.split(path)
    if component not in names.ROOTS:
        component, rest = names.component_of(path) or "", path
    path = rest.replace(".processor.", ".")
    parent, _, leaf = path.rpartition(".")
    if component == "text_encoder" and leaf in _PROCESSOR:
        path = f"{parent}.{_PROCESSOR[leaf]}"
    elif leaf == "to_out":
        path += ".0"
    return names.canonical(component, path) if names.component_of(path) == component else None


def _configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Component -> LoraConfig, for the components the header speaks of."""
    if CONFIG not in metadata:
        return {}
    packed = loraconfig.parse(metadata[CONFIG], CONFIG)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in packed.items():
        component, dot, setting = key.partition(".")
        if not dot:
            raise FormatError(f"{CONFIG}: {key!r} does not say which component it is for; save the file again with diffusers")
        configs.setdefault(component, {})[setting] = value
    for component, config in configs.items():
        loraconfig.check(config, f"{CONFIG} of {component}")
    return configs
