"""ComfyUI's own names, which Flux trainers use too: `diffusion_model.<original path>` and `text_encoders.clip_l.transformer.<path>`.

Flux files in the original's own names without a prefix are of this format too, among them XLabs' with their
`double_blocks.0.processor.qkv_lora1.down.weight`. Scale is alpha / rank, 1 without alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from loraclr.adapter import Adapter
from loraclr.errors import FormatError
from loraclr.formats import embedding, flux, kinds, ldm, names
from loraclr.formats.base import BaseWeights, Content, Storage, unplaced
from loraclr.formats.kohya import alpha_over_rank
from loraclr.formats.parts import Parts, Place

id: str = "comfy"
storage: Storage = "file"
holds_tokens: bool = False

_ENCODERS = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",  # SD2.x
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_2",
}
_MODEL = "diffusion_model."
_FACTORS = {"A": "lora_down", "B": "lora_up", "down": "lora_down", "up": "lora_up", "mid": "lora_mid"}
_WEIGHT = re.compile(r"(?P<path>[\w.]+?)\.lora_(?P<factor>A|B|down|up|mid)(?:\.default)?\.weight")
_OTHER = re.compile(rf"(?P<path>[\w.]+)\.(?P<part>{'|'.join(sorted(part for part in kinds.PARTS if not part.startswith('lora_')))})")
_XLABS = re.compile(rf"(?:{re.escape(_MODEL)})?(?P<path>(?:double|single)_blocks\.\d+\.processor\.\w+)\.(?P<factor>down|up)\.weight")


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(key.startswith((_MODEL, "text_encoders.", "double_blocks.", "single_blocks.")) for key in keys)


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    tensors, tokens = embedding.unbundled(content.tensors)
    parts, unknown = Parts(), []
    for key, tensor in tensors.items():
        match = _XLABS.fullmatch(key) or _WEIGHT.fullmatch(key) or _OTHER.fullmatch(key)
        place = _place(match["path"]) if match else None
        if match is None or place is None:
            unknown.append(key)
        else:
            found = match.groupdict()
            parts.put(place, _FACTORS[found["factor"]] if "factor" in found else found["part"], tensor)
    if unknown:
        raise unplaced(unknown, id)
    adapter = Adapter(parts.layers(alpha_over_rank, base), tokens=tokens)
    return adapter.with_(family="flux") if "transformer" in adapter.components else adapter


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    raise FormatError("format 'comfy' is read, not written: ComfyUI reads 'kohya' files; write such a one")


def _place(path: str) -> str | Place | None:
    for prefix, component in _ENCODERS.items():
        if path.startswith(prefix):
            rest = path.removeprefix(prefix)
            return names.canonical(component, rest) if names.fits(component, rest) else None
    rest = path.removeprefix(_MODEL)
    if place := flux.place(rest):
        return place
    flat = ldm.to_diffusers(rest.replace(".", "_"))
    dotted = names.dotted("unet", flat) if flat else None
    return f"unet.{dotted}" if dotted else None
