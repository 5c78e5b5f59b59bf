"""Families of models as data: their names, and what a diffusers pipeline does not say of itself; one row per pipeline class that needs one.

Everything else is asked of the pipeline: its components, the sizes in their configurations, the arguments its call takes. A class
without a row is treated as `Family()` says, so a text-to-image pipeline of another family usually needs nothing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from loraclr.errors import PipelineError, UsageError

DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Family:
    """What adapters call a family of models, and how to call its pipelines.

    `name` is as `Adapter.family` has it; None for what has no names in files. `embedded_guidance`: the guidance is an input of the
    denoiser, so there is no unconditional half, no negative prompt, and no value that means none. `patch`: how many cells of the latent a
    side the denoiser reads as one; without it 1 for a UNet and 2 for a transformer. `arguments` go into every call.
    """

    name: str | None = None
    embedded_guidance: bool = False
    patch: int | None = None
    arguments: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


# By the name of the class in diffusers.
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family("sd1"),
    "StableDiffusionXLPipeline": Family("sdxl"),
    "StableDiffusion3Pipeline": Family("sd3"),
    "FluxPipeline": Family("flux", embedded_guidance=True),
    # Both would otherwise draw at another size than asked for and cut it, and rewrite the prompt.
    "PixArtAlphaPipeline": Family(arguments={"use_resolution_binning": False, "clean_caption": False}),
    "PixArtSigmaPipeline": Family(arguments={"use_resolution_binning": False, "clean_caption": False}),
}


VERSION_2 = Family("sd2")  # of the class of version 1; the layers around its attentions are linear, not convolutions
NAMES = frozenset(family.name for family in (*FAMILIES.values(), VERSION_2) if family.name)


def family_of(pipe: Any) -> Family:
    """Of a base. What family a file of an adapter is for is `formats.names.guess_family`, as there are its layers alone."""
    family = FAMILIES.get(type(pipe).__name__, Family())
    return VERSION_2 if family.name == "sd1" and pipe.unet.config.use_linear_projection else family


def denoiser_of(pipe: Any) -> str:
    """The name of the component that denoises. Raises PipelineError where something is missing that every family has."""
    present = {name for name, part in pipe.components.items() if part is not None}
    missing = [" or ".join(DENOISERS)] if not present & set(DENOISERS) else []
    missing += [name for name in ("text_encoder", "tokenizer", "vae", "scheduler") if name not in present]
    if missing:
        raise PipelineError(f"{type(pipe).__name__} has no {', '.join(missing)}; load a text-to-image pipeline of diffusers, whole")
    return next(name for name in DENOISERS if name in present)


def takes(pipe: Any, argument: str) -> bool:
    return argument in inspect.signature(pipe.__call__).parameters


def text_limits(pipe: Any) -> dict[str, int]:
    """The most tokens that each text encoder reads of a prompt, begin and end marks included."""
    call = inspect.signature(pipe.__call__).parameters
    limits = {}
    for name, part in pipe.components.items():
        tokenizer = pipe.components.get(name.replace("text_encoder", "tokenizer"))
        if part is None or tokenizer is None or not name.startswith("text_encoder"):
            continue
        known = [int(tokenizer.model_max_length)]  # some tokenizers state none, which transformers turns into 10**30
        if (positions := getattr(part.config, "max_position_embeddings", None)) is not None:
            known.append(int(positions))
        if "max_sequence_length" in call:
            known.append(int(call["max_sequence_length"].default))
        limits[name] = min(known)
    return limits


def pixels(pipe: Any, denoiser: Any) -> tuple[int, tuple[int, int] | None]:
    """What sides of a picture must be multiples of, and the model's own (height, width), None where it states none."""
    transformer = not hasattr(denoiser.config, "down_block_types")
    scale = int(pipe.vae_scale_factor)
    side = getattr(pipe, "default_sample_size", None) or getattr(denoiser.config, "sample_size", None)
    own = None if side is None else (side, side) if isinstance(side, int) else tuple(side)
    unit = scale * (family_of(pipe).patch or (2 if transformer else 1))
    return unit, None if own is None else (int(own[0]) * scale, int(own[1]) * scale)


def settings(
    pipe: Any, denoiser: Any, *, seeds: Any, steps: int, guidance: float, size: tuple[int, int] | None, scheduler: str | None
) -> tuple[int, int]:
    """The size in pixels, or UsageError with everything that is wrong, before any work is done."""
    unit, own = pixels(pipe, denoiser)
    height, width = size or own or (0, 0)
    wrong = []
    if size is None and own is None:
        wrong.append(f"{type(pipe).__name__} states no size of its own, give one")
    elif height < unit or width < unit or height % unit or width % unit:
        wrong.append(f"size {height}x{width} is not made of multiples of {unit} pixels")
    if steps < 1:
        wrong.append(f"{steps} steps are too few, give 1 or more")
    if not guidance >= 1:
        wrong.append(f"guidance {guidance:g} is below 1, which is conditional only")
    if bad := [seed for seed in seeds if not 0 <= seed < 2**63]:
        wrong.append(f"seeds {bad} are not from 0 to 2**63 - 1")
    if scheduler is not None:
        known = [kind.__name__ for kind in pipe.scheduler.compatibles]
        if scheduler not in known:
            wrong.append(f"scheduler {scheduler!r} is not one of {', '.join(sorted(known))}")
    if wrong:
        raise UsageError("; ".join(wrong) + "; change these settings")
    return height, width
