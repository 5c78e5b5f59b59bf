"""diffusers' own calls, as a family's pipeline makes them: encoding and sampling without a line of our own about any family.

For every pipeline but those of one text encoder and a plain UNet, which `Pipeline.denoise` samples itself to have learned tokens per
layer and float32 latents.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraclr.errors import PipelineError, UsageError
from loraclr.families import family_of, takes
from loraclr.loading import silenced

if TYPE_CHECKING:
    from PIL.Image import Image


def fresh_scheduler(pipe: Any, name: str | None) -> Any:
    """A new one per call, the pipeline's own or another class: schedulers keep state, and the model's own must stay as it was."""
    own = pipe.scheduler
    kind: Any = type(own) if name is None else next(kind for kind in own.compatibles if kind.__name__ == name)
    # diffusers drops what it once noted as a default, even if it was changed since (steps_offset of every older model).
    config = {key: value for key, value in own.config.items() if key != "_use_default_values"}
    with silenced():
        return kind.from_config(config)


def encode(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """(B, T, dim): the first of what the pipeline's encode_prompt gives, padded as sampling pads; every text encoder is run."""
    known = inspect.signature(pipe.encode_prompt).parameters
    copies = {"num_images_per_prompt": 1} if "num_images_per_prompt" in known else {}
    others = {name: None for name in ("prompt_2", "prompt_3") if name in known}
    single = {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in known else {}
    with silenced():
        found = pipe.encode_prompt(prompt=list(prompts), device=pipe._execution_device, **others, **single, **copies)
    states = found[0] if isinstance(found, tuple) else found
    if not isinstance(states, Tensor):
        seen = f"{type(pipe).__name__} encodes prompts to {type(states).__name__}"
        raise PipelineError(f"{seen}, not to one tensor; this family is not supported")
    return states


def call(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    size: tuple[int, int],
    guidance: float | None,
    negative: str = "",
    scheduler: str | None = None,
    callback: Callable[[int, int], None] | None = None,
    pictures: bool,
) -> Any:
    """The pipeline's own call: a list of pictures, or a tensor of latents as the family keeps them.

    One generator per picture, on the CPU: a seed is the same picture in any batch, on any device. Guidance None is conditional only, or
    where guidance is embedded the pipeline's own value. Raises PipelineError where the pipeline needs more than a text.
    """
    family = family_of(pipe)
    if takes(pipe, "image") or not takes(pipe, "prompt"):
        raise PipelineError(f"{type(pipe).__name__} does not draw from a text alone; use a text-to-image model")
    if negative and family.embedded_guidance:
        raise UsageError(f"{type(pipe).__name__} has its guidance built in and takes no negative prompt; leave it empty")
    arguments: dict[str, Any] = {
        **family.arguments,
        "prompt": list(prompts),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "num_inference_steps": steps,
        "height": size[0],
        "width": size[1],
        "output_type": "pil" if pictures else "latent",
    }
    if guidance is not None or not family.embedded_guidance:
        arguments["guidance_scale"] = 1.0 if guidance is None else guidance
    if negative and guidance is not None and guidance > 1:
        arguments["negative_prompt"] = [negative] * len(prompts)
    sampler = fresh_scheduler(pipe, scheduler)
    if callback is not None:
        _count(sampler, callback)
    with _quiet(pipe, sampler), silenced():
        return pipe(**arguments).images


def decode(pipe: Any, latents: Tensor) -> list[Image]:
    """(B, channels, h, w) latents that no family has packed, to pictures."""
    from PIL import Image

    vae = pipe.vae
    with torch.inference_mode():
        scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        pictures = vae.decode(scaled.to(pipe._execution_device, vae.dtype), return_dict=False)[0].float()
        bytes_ = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in bytes_]


def _count(sampler: Any, callback: Callable[[int, int], None]) -> None:
    step, done = sampler.step, 0

    @functools.wraps(step)  # pipelines look at its signature
    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal done
        result, done = step(*arguments, **keywords), done + 1
        callback(done, len(sampler.timesteps))
        return result

    sampler.step = counted


@contextmanager
def _quiet(pipe: Any, sampler: Any) -> Iterator[None]:
    own, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    pipe.scheduler = sampler
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler = own
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar
