"""A PEFT folder: adapter_config.json beside adapter_model.safetensors; or folders `unet` and `text_encoder` of that kind, one adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

import torch

from loraclr.adapter import Adapter
from loraclr.errors import FormatError
from loraclr.formats import loraconfig, names
from loraclr.formats.base import Content, Parts, Storage, stored_layers, unplaced

id: str = "peft"
storage: Storage = "folder"
holds_tokens: bool = False

CONFIG = "adapter_config.json"
_KEY = re.compile(r"(?P<folder>[\w-]+/)?base_model\.model\.(?P<path>[\w.]+?)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(key.startswith("base_model.model.") or "/base_model.model." in key for key in keys)


def read(content: Content) -> Adapter:
    configs = {
        key.removesuffix(CONFIG): loraconfig.parse(text, key) for key, text in content.metadata.items() if key.split("/")[-1] == CONFIG
    }
    for folder, config in configs.items():
        if config.get("peft_type") != "LORA":
            raise FormatError(f"{folder}{CONFIG}: peft_type is {config.get('peft_type')!r}; convert it to LORA with PEFT first")
        loraconfig.check(config, f"{folder}{CONFIG}")
    parts, unknown, folders = Parts(), [], dict[str, str]()
    for key, tensor in content.tensors.items():
        match = _KEY.fullmatch(key)
        component = names.component_of(match["path"]) if match else None
        if match is None or component is None:
            unknown.append(key)
            continue
        folder = match["folder"] or ""
        if folder not in configs:
            raise FormatError(f"the weights of a PEFT folder without their {CONFIG}, which has the scale; pass the folder with both")
        name = names.canonical(component, match["path"])
        folders[name] = folder
        parts.put(name, "down" if match["factor"] == "A" else "up", tensor)
    if unknown:
        raise unplaced(unknown, id)

    def scale(name: str, rank: int, alpha: float | None) -> float:
        return loraconfig.scale(configs[folders[name]], names.split(name)[1], rank)

    return Adapter(parts.layers(scale))


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    tensors, ranks = {}, dict[str, dict[str, int]]()
    folder = "{}/" if len(adapter.components) > 1 else ""
    for layer, stored in stored_layers(adapter, dtype):
        component, path = names.split(layer.name)
        if names.component_of(path) != component:
            raise FormatError(f"{layer.name}: {id} folders hold {' or '.join(names.ROOTS)}; leave {component!r} out")
        if len(stored) == 1:
            raise FormatError(f"{layer.name} is a dense change, which {id} cannot load; write format 'kohya', or reduce it to a rank first")
        stem = f"{folder.format(component)}base_model.model.{path}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = stored
        ranks.setdefault(component, {})[path] = layer.rank
    configs = {folder.format(component): loraconfig.for_ranks(ranks[component]) for component in sorted(ranks)}
    return Content(tensors, {place + CONFIG: json.dumps(config, indent=2, sort_keys=True) for place, config in configs.items()})
