"""kohya / A1111 names: `lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`; LoCon, Tucker and `.diff` too.

Scale is alpha / rank; a missing or zero alpha means 1, as in the training code. The one format every image tool reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from loraclr.adapter import Adapter, LoraLayer
from loraclr.errors import FormatError
from loraclr.formats import ldm, names
from loraclr.formats.base import Content, Parts, Storage, stored_layers, unplaced

id: str = "kohya"
storage: Storage = "file"
holds_tokens: bool = False

PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}  # the first of a component is the one written
PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha", "diff": "diff"}
_CLAIM = re.compile(r"lora_(unet|te\d?)_\w+\.")


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(_CLAIM.match(key) for key in keys)


def read(content: Content) -> Adapter:
    parts, unknown = Parts(), []
    for key, tensor in content.tensors.items():
        flat, _, suffix = key.partition(".")
        name = _canonical(flat)
        if name is None or suffix not in PARTS:
            unknown.append(key)
        else:
            parts.put(name, PARTS[suffix], tensor)
    if unknown:
        raise unplaced(unknown, id)
    return Adapter(parts.layers(_scale))


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    # One alpha for the whole file, the commonest rank: where alphas differ, diffusers takes the commonest for all attention layers.
    ranks = [layer.rank for layer in adapter if isinstance(layer, LoraLayer)]
    alpha = float(max(sorted(set(ranks)), key=ranks.count)) if ranks else None
    tensors = {}
    for layer, stored in stored_layers(adapter, dtype, alpha=alpha):
        flat = _flat(layer.name)
        if len(stored) == 1:
            tensors[f"{flat}.diff"] = stored[0]
        else:
            tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = stored
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)  # float32: bfloat16 cannot hold every rank above 256
    return Content(tensors)


def _scale(name: str, rank: int, alpha: float | None) -> float:
    return alpha / rank if alpha else 1.0


def _canonical(flat: str) -> str | None:
    for prefix, component in PREFIXES.items():
        if flat.startswith(prefix):
            rest = flat.removeprefix(prefix)
            if component == "unet" and ldm.is_ldm(rest):
                rest = ldm.to_diffusers(rest) or ""
            path = names.dotted(rest)
            return names.canonical(component, path) if path and names.component_of(path) == component else None
    return None


def _flat(name: str) -> str:
    component, path = names.split(name)
    for prefix, known in PREFIXES.items():
        if known == component:
            flat = prefix + names.with_text_model(component, path).replace(".", "_")
            if _canonical(flat) == name:
                return flat
    raise FormatError(f"{name} has no {id} name that could be read back; write it as format 'diffusers'")
