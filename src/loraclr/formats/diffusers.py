"""The names diffusers has used over the years: attention processors (2023), `.lora.down` (2023), `.lora_A` (since 2024, written here).

AI-toolkit's Flux files are of this format.

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
from loraclr.formats import embedding, loraconfig, names
from loraclr.formats.base import BaseWeights, Content, Storage, stored_layers, unplaced
from loraclr.formats.parts import Parts

id: str = "diffusers"
storage: Storage = "file"
holds_tokens: bool = False

CONFIG = "lora_adapter_metadata"
_WEIGHT = re.compile(
    r"(?P<path>[\w.]+?)(?:\.lora_(?P<new>[AB])(?:\.default)?|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<old>down|up))\.weight"
)
_ALPHA = re.compile(r"(?P<path>[\w.]+?)(?:\.lora|\.lora_linear_layer|_lora)?(?:\.down\.weight)?\.alpha")
_MAGNITUDE = re.compile(r"(?P<path>[\w.]+?)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_PART = {"A": "lora_down", "B": "lora_up", "down": "lora_down", "up": "lora_up"}
_OTHERS = ("base_model.model.", "diffusion_model.", "text_encoders.", "double_blocks.", "single_blocks.")  # how keys of other formats begin
_PROCESSOR = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # the text encoder's processors of 2023


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    mine = (key for key in keys if not key.startswith(_OTHERS))
    return any(_WEIGHT.fullmatch(key) or _MAGNITUDE.fullmatch(key) for key in mine)


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    tensors, tokens = embedding.unbundled(content.tensors)
    parts, unknown, alphas = Parts(), [], False
    for key, tensor in tensors.items():
        weight, alpha, magnitude = _WEIGHT.fullmatch(key), _ALPHA.fullmatch(key), _MAGNITUDE.fullmatch(key)
        match = weight or alpha or magnitude
        name = _canonical(match["path"]) if match else None
        if name is None:
            unknown.append(key)
        elif weight:
            parts.put(name, _PART[weight["new"] or weight["old"]], tensor)
        elif magnitude:
            parts.put(name, "dora_scale", loraconfig.magnitude(tensor))
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

    loraconfig.check_dora({name: configs.get(names.split(name)[0], {}) for name in parts.without("dora_scale")})
    return Adapter(parts.layers(scale, base), tokens=tokens)


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    tensors, ranks = {}, dict[str, dict[str, int]]()
    for layer, stored in stored_layers(adapter, dtype):
        component, path = names.split(layer.name)
        if component not in names.COMPONENTS or names.is_t5(layer.name):
            what = "a T5 text encoder" if names.is_t5(layer.name) else repr(component)
            raise FormatError(f"{layer.name}: {id} loads LoRAs of {', '.join(names.COMPONENTS)} and of CLIP; leave {what} out")
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
    if component not in names.COMPONENTS:
        component, rest = names.component_of(path) or "", path
    path = rest.removeprefix("base_model.model.").replace(".processor.", ".")  # some trainers leave PEFT's wrapper in
    parent, _, leaf = path.rpartition(".")
    if names.kind(component) == "text_encoder" and leaf in _PROCESSOR:
        path = f"{parent}.{_PROCESSOR[leaf]}"
    elif leaf == "to_out":
        path += ".0"
    return names.canonical(component, path) if names.fits(component, path) else None


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
