"""An adapter and its base -> a model of its own, for tools that load models and no adapters: a diffusers folder, or one checkpoint file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loraclr import disk
from loraclr.adapter import Adapter
from loraclr.errors import FormatError, UsageError
from loraclr.formats import files, header, names, sidecar, single_file
from loraclr.loading import silenced
from loraclr.pipeline import Pipeline

Layout = Literal["fused", "checkpoint"]


def fuse(
    adapter: Adapter,
    base: Pipeline,
    path: str | Path,
    *,
    layout: Layout = "fused",
    strength: float = 1.0,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write `base` with `strength` times the adapter's change in its weights; returns the path. `base` itself comes back as it was.

    `fused` is a folder as diffusers saves it, `checkpoint` one .safetensors in the original layout of SD1.x, SD2.x and SDXL, as A1111 and
    ComfyUI load it. Either appears whole or not at all. Learned tokens go to `NAME.tokens.safetensors` beside it. Raises FormatError for
    a path or a family that does not suit, PipelineError for layers that the base does not have, UsageError for values beyond `dtype`,
    WriteError where the system refuses.
    """
    path = Path(path)
    with files.about(path):
        if (path.suffix == ".safetensors") != (layout == "checkpoint"):
            made = "one file: end its name in .safetensors" if layout == "checkpoint" else "a folder: leave .safetensors off its name"
            raise FormatError(f"layout {layout!r} is {made}")
        if layout == "fused" and path.exists():
            raise FormatError("exists already, and a model's folder is never replaced; give another name")
        with base.applied(dict(adapter.layers), scale=strength):
            _check(base, dtype)
            with disk.reserved(path, sidecar.path_for(path)), disk.together():
                sidecar.write(adapter.tokens, path)
                if layout == "checkpoint":
                    files.write_large(_checkpoint(base, dtype), _about(adapter, family_of(base)), path)
                else:
                    with disk.whole(path) as part:
                        _folder(base, part, dtype)
    return path


def family_of(base: Pipeline) -> str:
    """`sd1`, `sd2`, `sdxl` or `flux`, by components and by what the cross-attention of the UNet reads."""
    if "text_encoder_2" in base.pipe.components:
        return "sdxl" if getattr(base.pipe, "unet", None) is not None else "flux"
    return names.guess_family({name: tuple(base.base_weight(name).shape) for name in base.modules}) or "sd1"


def _check(base: Pipeline, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for name in base.modules:
        if not float(base.base_weight(name).abs().max()) <= most:
            raise UsageError(f"{name} has values that do not fit {dtype}; write fp32, or use a smaller strength")


def _about(adapter: Adapter, family: str) -> dict[str, str]:
    kept = header.outgoing(adapter, {})
    kept[header.ARCHITECTURE] = kept.get(header.ARCHITECTURE, "").removesuffix("/lora") or family
    return {"format": "pt", **{key: value for key, value in kept.items() if not key.startswith("ss_")}}


def _checkpoint(base: Pipeline, dtype: torch.dtype) -> dict[str, Tensor]:
    components = {name: part for name, part in base.pipe.components.items() if name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    if "unet" not in components:
        raise FormatError("checkpoints of one file are written for SD1.x, SD2.x and SDXL; write a fused folder")
    states = {
        name: {path: tensor.detach() for path, tensor in part.state_dict().items()} for name, part in components.items() if part is not None
    }
    layers = int(components["unet"].config.layers_per_block)
    found = single_file.checkpoint(states, family=family_of(base), layers=layers)
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in found.items()}


def _folder(base: Pipeline, path: Path, dtype: torch.dtype) -> None:
    """Saved as it is and then each file cast: nothing of `base` is cast in place."""
    with silenced():
        base.pipe.save_pretrained(path)
    for file in sorted(path.rglob("*.safetensors")):
        cast = file.with_suffix(".cast")  # never into the file itself: tensors that were not cast still lie in it
        files.stream({key: tensor.to(dtype) for key, tensor in files.tensors_of(file).items()}, {"format": "pt"}, cast)
        cast.replace(file)
