"""An adapter and its base -> a model of its own, for tools that load models and no adapters: a diffusers folder, or one checkpoint file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loraclr import disk
from loraclr.adapter import Adapter
from loraclr.errors import FormatError, UsageError
from loraclr.formats import files, header, sidecar, single_file
from loraclr.loading import silenced
from loraclr.pipeline import Pipeline

Layout = Literal["fused", "checkpoint"]

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # as diffusers and as the model specification call them


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
    ComfyUI load it; of Flux.1 it holds the transformer alone, as such files do, so that changes of its text encoders need the folder.
    Either appears whole or not at all. Learned tokens go to `NAME.tokens.safetensors` beside it. Raises FormatError for a path or a family
    that does not suit, PipelineError for layers that the base does not have, UsageError for values beyond `dtype`, WriteError where the
    system refuses.
    """
    path = Path(path)
    with files.about(path):
        if (path.suffix == ".safetensors") != (layout == "checkpoint"):
            made = "one file: end its name in .safetensors" if layout == "checkpoint" else "a folder: leave .safetensors off its name"
            raise FormatError(f"layout {layout!r} is {made}")
        if layout == "fused" and path.exists():
            raise FormatError("exists already, and a model's folder is never replaced; give another name")
        left = [name for name in adapter.layers if not name.startswith("transformer.")]
        if layout == "checkpoint" and base.family == "flux" and left:
            raise FormatError(f"{len(left)} layers of text encoders ({left[0]}) have no place in a file of Flux.1; use layout 'fused'")
        with base.applied(dict(adapter.layers), scale=strength):
            _check(base, dtype)
            with disk.reserved(path, sidecar.path_for(path)), disk.together():
                sidecar.write(adapter.tokens, path)
                if layout == "checkpoint":
                    files.write_large(_checkpoint(base, dtype), _about(adapter, base), path)
                else:
                    with disk.whole(path) as part:
                        _folder(base, part, dtype)
    return path


def _check(base: Pipeline, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for name in base.modules:
        if not float(base.base_weight(name).abs().max()) <= most:
            raise UsageError(f"{name} has values that do not fit {dtype}; write fp32, or use a smaller strength")


def _about(adapter: Adapter, base: Pipeline) -> dict[str, str]:
    kept = header.outgoing(adapter.with_(family=adapter.family or base.family), {})
    kept[header.ARCHITECTURE] = kept[header.ARCHITECTURE].removesuffix("/lora")
    if (predicts := base.pipe.scheduler.config.get("prediction_type")) in _PREDICTIONS:
        kept[header.PREDICTION] = _PREDICTIONS[predicts]
    return {"format": "pt", **{key: value for key, value in kept.items() if not key.startswith("ss_")}}


def _checkpoint(base: Pipeline, dtype: torch.dtype) -> dict[str, Tensor]:
    states = {
        name: {path: tensor.detach() for path, tensor in part.state_dict().items()}
        for name, part in base.pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    layers = int(getattr(base.unet.config, "layers_per_block", 2))
    found = single_file.checkpoint(states, family=base.family, layers=layers)
    # That these keys are there, whatever they hold, tells ComfyUI and others that a model predicts v, and has no signal at the end.
    noise = base.pipe.scheduler.config
    marks = {"v_pred": noise.get("prediction_type") == "v_prediction", "ztsnr": bool(noise.get("rescale_betas_zero_snr"))}
    found |= {key: torch.ones(1) for key, there in marks.items() if there}
    return _cast(found, dtype)


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Numbers of positions and the like stay whole."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def _folder(base: Pipeline, path: Path, dtype: torch.dtype) -> None:
    """Saved as it is and then each file cast: nothing of `base` is cast in place."""
    with silenced():
        base.pipe.save_pretrained(path)
    for file in sorted(path.rglob("*.safetensors")):
        cast = file.with_suffix(".cast")  # never into the file itself: tensors that were not cast still lie in it
        files.stream(_cast(files.tensors_of(file), dtype), {"format": "pt"}, cast)
        cast.replace(file)
