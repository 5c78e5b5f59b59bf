"""A PEFT folder: adapter_config.json beside adapter_model.safetensors; or folders `unet`, `text_encoder`, ... of that kind, one adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

import torch

from loraclr.adapter import Adapter
from loraclr.errors import FormatError
from loraclr.formats import loraconfig, names
from loraclr.formats.base import BaseWeights, Content, Storage, stored_layers, unplaced
from loraclr.formats.parts import Parts

id: str = "peft"
storage: Storage = "folder"
holds_tokens: bool = False

CONFIG = "adapter_config.json"
_KEY = re.compile(
    r"(?P<folder>[\w-]+/)?base_model\.model\.(?P<path>[\w.]+?)\."
    r"(?:lora_(?P<factor>[AB])(?:\.default)?\.weight|lora_magnitude_vector(?:\.default)?(?:\.weight)?"
    r"|(?P<part>(?:hada|lokr)_\w+?)(?:\.default)?)"
)


_DECOMPOSED = ("lokr_w2_b", "lokr_w2_b.default")  # where w1 stands whole, w2 alone may be decomposed


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(key.startswith("base_model.model.") or "/base_model.model." in key for key in keys)


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    configs = {
        key.removesuffix(CONFIG): loraconfig.parse(text, key) for key, text in content.metadata.items() if key.split("/")[-1] == CONFIG
    }
    for folder, config in configs.items():
        if config.get("peft_type") not in ("LORA", "LOHA", "LOKR"):
            raise FormatError(
                f"{folder}{CONFIG}: peft_type is {config.get('peft_type')!r}, whose change is not known here; "
                "LORA, LOHA and LOKR are read: convert it to one of these with PEFT"
            )
        loraconfig.check(config, f"{folder}{CONFIG}")
    parts, unknown, folders = Parts(), [], dict[str, str]()
    for key, tensor in content.tensors.items():
        match = _KEY.fullmatch(key)
        component = _component(match["folder"] or "", match["path"]) if match else None
        if match is None or component is None:
            unknown.append(key)
            continue
        folder = match["folder"] or ""
        if folder not in configs:
            raise FormatError(f"the weights of a PEFT folder without their {CONFIG}, which has the scale; pass the folder with both")
        name = names.canonical(component, match["path"])
        folders[name] = folder
        if match["part"]:
            factor = 1.0
            if match["part"] == "lokr_w1" and not {f"{key.rpartition('lokr_w1')[0]}{one}" for one in _DECOMPOSED} & content.tensors.keys():
                factor = loraconfig.strength(configs[folder], match["path"])  # PEFT scales it all the same, kohya's tools do not
            parts.put(name, match["part"], tensor * factor)
        elif match["factor"]:
            parts.put(name, "lora_down" if match["factor"] == "A" else "lora_up", tensor)
        else:
            parts.put(name, "dora_scale", loraconfig.magnitude(tensor))
    if unknown:
        raise unplaced(unknown, id)

    def scale(name: str, rank: int, alpha: float | None) -> float:
        return loraconfig.scale(configs[folders[name]], names.split(name)[1], rank)

    loraconfig.check_dora({name: configs[folders[name]] for name in parts.without("dora_scale")})
    return Adapter(parts.layers(scale, base))


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    tensors, ranks = {}, dict[str, dict[str, int]]()
    # A second text encoder needs its folder, whose name is all that tells it from the first.
    folder = "{}/" if len(adapter.components) > 1 or "text_encoder_2" in adapter.components else ""
    for layer, stored in stored_layers(adapter, dtype):
        component, path = names.split(layer.name)
        if not names.fits(component, path):
            raise FormatError(f"{layer.name}: {id} folders hold {' or '.join(names.COMPONENTS)}; leave {component!r} out")
        if len(stored) == 1:
            raise FormatError(f"{layer.name} is a dense change, which {id} cannot load; write format 'kohya', or reduce it to a rank first")
        stem = f"{folder.format(component)}base_model.model.{path}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = stored
        ranks.setdefault(component, {})[path] = layer.rank
    configs = {folder.format(component): loraconfig.for_ranks(ranks[component]) for component in sorted(ranks)}
    return Content(tensors, {place + CONFIG: json.dumps(config, indent=2, sort_keys=True) for place, config in configs.items()})


def _component(folder: str, path: str) -> str | None:
    """The folder's name where it is that of a component the path fits, else by the path."""
    named = folder.removesuffix("/")
    return named if names.fits(named, path) else names.component_of(path)
