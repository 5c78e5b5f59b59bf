"""ED-LoRA of Mix-of-Show, also used by Orthogonal Adaptation and LoRACLR: a `.pth` of learned tokens and LoRA factors.

`{"params": {"new_concept_embedding": {token: (layers, dim)}, "text_encoder": {...lora_down.weight, ...lora_up.weight}, "unet": {...}}}`.
There is no alpha and no division by the rank: scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from loraclr.adapter import Adapter
from loraclr.errors import FormatError
from loraclr.formats import names
from loraclr.formats.base import BaseWeights, Content, Storage, stored_layers, unplaced
from loraclr.formats.parts import Parts

id: str = "edlora"
storage: Storage = "torch"
holds_tokens: bool = True

_TOKEN = "params/new_concept_embedding/"
_KEY = re.compile(r"params/(?P<component>unet|text_encoder)/(?P<path>[\w.]+)\.lora_(?P<part>down|up)\.weight")


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(key.startswith("params/") for key in keys)


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    parts, tokens, unknown = Parts(), {}, []
    for key, tensor in content.tensors.items():
        match = _KEY.fullmatch(key)
        if key.startswith(_TOKEN):
            tokens[key.removeprefix(_TOKEN)] = tensor if tensor.ndim > 1 else tensor[None]
        elif match and names.component_of(match["path"]) == match["component"]:
            parts.put(names.canonical(match["component"], match["path"]), f"lora_{match['part']}", tensor)
        else:
            unknown.append(key)
    if unknown:
        raise unplaced(unknown, id)
    return Adapter(parts.layers(lambda name, rank, alpha: 1.0), tokens=tokens)


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    tensors = {f"{_TOKEN}{token}": rows.float().contiguous() for token, rows in adapter.tokens.items()}
    for layer, stored in stored_layers(adapter, dtype):
        component, path = names.split(layer.name)
        stem = f"params/{component}/{names.with_text_model(component, path)}"
        if not _KEY.fullmatch(f"{stem}.lora_up.weight"):
            raise FormatError(f"{layer.name}: {id} files hold unet and text_encoder; leave {component!r} out")
        if len(stored) == 1:
            raise FormatError(f"{layer.name} is a dense change, which {id} cannot hold; write format 'kohya', or reduce it to a rank first")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = stored
    return Content(tensors)
