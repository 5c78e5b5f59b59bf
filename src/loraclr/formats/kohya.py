"""kohya / A1111 / LyCORIS names: `lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`, and all other kinds.

Scale is alpha / rank; a missing or zero alpha means 1, as in the training code. The one format every image tool reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from loraclr.adapter import Adapter, LoraLayer
from loraclr.errors import FormatError
from loraclr.formats import embedding, flux, kinds, ldm, names
from loraclr.formats.base import BaseWeights, Content, Storage, stored_layers, unplaced
from loraclr.formats.parts import Parts, Place

id: str = "kohya"
storage: Storage = "file"
holds_tokens: bool = False

PREFIXES = {
    "lora_unet_": "unet",  # of Flux.1 too
    "lora_transformer_": "transformer",  # OneTrainer
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_2",  # Flux.1's T5, which diffusers has as its second
}
WRAPPED = "lycoris_"  # LyCORIS around a model that it does not know: the path alone says what it is in
PARTS = {f"{part}.weight" if part.startswith("lora_") else part: part for part in kinds.PARTS}
_CLAIM = re.compile(r"(lora_(unet|transformer|te\d?)|lycoris)_\w+\.")


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(_CLAIM.match(key) for key in keys)


def read(content: Content, base: BaseWeights | None = None) -> Adapter:
    tensors, tokens = embedding.unbundled(content.tensors)
    if any(key.startswith("lora_te2_") for key in tensors) and any(key.startswith("lora_te3_") for key in tensors):
        raise FormatError("has three text encoders, as SD3 does; use an adapter of an SD1.x, SD2.x, SDXL or Flux.1 model")
    parts, unknown, is_flux = Parts(), [], False
    for key, tensor in tensors.items():
        flat, _, suffix = key.partition(".")
        place = _place(flat)
        is_flux |= flat.startswith("lora_unet_") and (isinstance(place, Place) or (place or "").startswith("transformer."))
        if place is None or suffix not in PARTS:
            unknown.append(key)
        else:
            parts.put(place, PARTS[suffix], tensor)
    if unknown:
        raise unplaced(unknown, id)
    return Adapter(parts.layers(alpha_over_rank, base), tokens=tokens, family="flux" if is_flux else None)


def write(adapter: Adapter, dtype: torch.dtype) -> Content:
    is_flux = "transformer" in adapter.components
    if is_flux and (adapter.family or names.guess_family(adapter.shapes)) != "flux":
        first = next(name for name in adapter.layers if name.startswith("transformer."))  # SD3 and others share names with Flux.1
        raise FormatError(f"{first}: {id} names are Flux.1's, and nothing says that this adapter is for it; write format 'diffusers'")
    originals = flux.original(adapter)
    two = is_flux or adapter.family in ("sdxl", "flux") or "text_encoder_2" in adapter.components
    flats = {layer.name: _flat(name, two) for name, layer in originals.items()}
    adapter = Adapter.of(originals.values())
    # One alpha for the whole file, the commonest rank: where alphas differ, diffusers takes the commonest for all attention layers.
    # Not of Flux.1: there it takes each layer's own, but none for the last two layers, so that these need alpha = rank.
    ranks = [layer.rank for layer in adapter if isinstance(layer, LoraLayer)]
    alpha = float(max(sorted(set(ranks)), key=ranks.count)) if ranks and not is_flux else None
    tensors = {}
    for layer, stored in stored_layers(adapter, dtype, alpha=alpha):
        flat = flats[layer.name]
        if len(stored) == 1:
            tensors[f"{flat}.diff"] = stored[0]
        else:
            tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = stored
            tensors[f"{flat}.alpha"] = torch.tensor(alpha or float(layer.rank))  # float32: bfloat16 cannot hold every rank above 256
    return Content(tensors)


def alpha_over_rank(name: str, rank: int, alpha: float | None) -> float:
    return alpha / rank if alpha else 1.0


def _place(flat: str) -> str | Place | None:
    for prefix, component in PREFIXES.items():
        if flat.startswith(prefix):
            rest = flat.removeprefix(prefix)
            if component == "unet" and (place := flux.place(rest)):
                return place
            if component == "unet" and ldm.is_ldm(rest):
                rest = ldm.to_diffusers(rest) or ""
            return _named(component, rest)
    if flat.startswith(WRAPPED):
        rest = flat.removeprefix(WRAPPED)
        found = (_place(prefix + rest) for prefix in ("lora_unet_", "lora_transformer_", "lora_te_"))
        return next((place for place in found if place), None)
    return None


def _named(component: str, flat: str) -> str | None:
    path = names.dotted(component, flat)
    return names.canonical(component, path) if path and names.fits(component, path) else None


def _flat(name: str, two: bool) -> str:
    """The key of a layer by its canonical or by its flat original Flux name. `two`: there are two text encoders, which are numbered."""
    if flux.place(name):
        return f"lora_unet_{name}"
    component, path = names.split(name)
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}.get(component)
    flat = f"{prefix}{names.with_text_model(component, path)}".replace(".", "_")
    if prefix is None or names.is_t5(name) or _place(flat) != name:
        raise FormatError(f"{name} has no {id} name that could be read back; write it as format 'diffusers'")
    return flat
