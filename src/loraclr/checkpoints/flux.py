"""Flux.1 in one file: its transformer, often alone, in the names of the original code or in diffusers', with ComfyUI's prefixes or none.

No such file has the vocabulary of the T5, and most have no text encoder and no autoencoder either: what is not in the file comes from a
diffusers folder.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from loraclr.errors import FormatError, PipelineError
from loraclr.formats import flux, single_file

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
_OTHERS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
    "vae": "vae.",
}
_WORDS = {"text_encoder": "CLIP", "text_encoder_2": "T5", "vae": "autoencoder"}
_IGNORED = ("text_encoders.clip_l.logit_scale", "text_encoders.clip_l.transformer.text_projection.weight")


def known(keys: Collection[str]) -> bool:
    """Whether a file with these keys holds a transformer of Flux.1."""
    return any(
        f"{prefix}{blocks}" in keys
        for prefix in _PREFIXES
        for blocks in ("single_blocks.0.linear2.weight", "single_transformer_blocks.0.proj_out.weight")
    )


def load(file: Path, keys: Collection[str], *, dtype: torch.dtype, config: Path | None) -> Any:
    """A FluxPipeline: components that the file holds from there, the others from the folder `config`. Raises PipelineError."""
    import diffusers

    prefix = next(prefix for prefix in _PREFIXES if known([key.removeprefix(prefix) for key in keys if key.startswith(prefix)]))
    own = {name: start for name, start in {**_OTHERS, "transformer": prefix}.items() if any(key.startswith(start) for key in keys)}
    lacks = [words for name, words in _WORDS.items() if name not in own] or ["T5's vocabulary"]
    remedy = "give a diffusers folder of Flux.1 as its config (--base-config): what the file lacks is read from there"
    if config is None:
        raise PipelineError(f"{file} holds the transformer of Flux.1 without {', '.join(lacks)}; {remedy}")
    others = tuple(start for name, start in own.items() if name != "transformer")
    try:
        pipe: Any = diffusers.FluxPipeline
        folder = dict(pipe.load_config(str(config), local_files_only=True))
        if folder.get("_class_name") != "FluxPipeline":
            raise PipelineError(f"it is one of {folder.get('_class_name')}")
        objects: dict[str, nn.Module] = {}
        for name, start in own.items():
            mine = [key for key in keys if key.startswith(start) and not (name == "transformer" and key.startswith(others))]
            objects[name] = _component(name, folder[name][1], file, start, [key for key in mine if key not in _IGNORED], config, dtype)
        return pipe.from_pretrained(str(config), **objects, dtype=dtype, local_files_only=True)
    except Exception as error:  # the libraries raise a dozen unrelated kinds
        seen = str(error) if isinstance(error, PipelineError | FormatError) else f"{type(error).__name__}: {error}"
        raise PipelineError(f"{file} does not load with the folder {config} ({seen}); {remedy}") from error


def _component(name: str, kind: str, file: Path, prefix: str, keys: Collection[str], config: Path, dtype: torch.dtype) -> nn.Module:
    """One model of the folder's configuration with the file's weights."""
    import diffusers
    import transformers

    with safe_open(file, framework="pt") as content:
        tensors = {key.removeprefix(prefix): content.get_tensor(key).to(dtype) for key in keys}
    if not hasattr(diffusers, kind):
        made = getattr(transformers, kind)
        settings = made.config_class.from_pretrained(config, subfolder=name, local_files_only=True)
        model, seen = made.from_pretrained(None, config=settings, state_dict=tensors, dtype=dtype, output_loading_info=True)
        if lost := sorted((*seen["missing_keys"], *seen["unexpected_keys"], *seen["mismatched_keys"])):
            raise PipelineError(f"{len(lost)} weights of its {name} are not those of the folder's configuration, such as {lost[0]}")
        encoder: nn.Module = model
        return encoder.eval()
    with torch.device("meta"):
        made = getattr(diffusers, kind)
        module: nn.Module = made.from_config(made.load_config(str(config), subfolder=name, local_files_only=True))
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    if name == "vae":
        paths = {old: new for new, old in single_file.vae_paths(wanted).items()}
        state = {paths.get(old, old): tensor for old, tensor in tensors.items()}
        # Attentions are 1x1 convolutions in the original.
        state = {key: t[:, :, 0, 0] if t.ndim == 4 and len(wanted.get(key, t.shape)) == 2 else t for key, t in state.items()}
    else:
        state = tensors if "single_transformer_blocks.0.proj_out.weight" in tensors else flux.to_diffusers(tensors)
    wrong = sorted(wanted.keys() ^ state.keys()) or [key for key in wanted if wanted[key] != tuple(state[key].shape)]
    if wrong:
        key = wrong[0]
        has, folder = tuple(state[key].shape) if key in state else "nothing", wanted.get(key, "nothing")
        seen = f"such as {key}: {has}, not {folder}"
        raise PipelineError(f"{len(wrong)} weights of its {name} are not those of the folder's configuration, {seen}")
    module.load_state_dict(state, assign=True)
    return module.eval()
