"""The settings that travel inside a picture: read back, and told the way other tools show them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraclr.errors import UsageError

_NEEDED = ("prompt", "seed", "steps", "guidance", "negative", "size", "base")
# Where the web interfaces of the field call a scheduler otherwise.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


def parameters(settings: Mapping[str, Any]) -> str:
    """The `parameters` text of AUTOMATIC1111's web interface: prompt with `<lora:NAME:SCALE>`, negative prompt, one line of settings.

    Only `loraclr`'s own chunk holds all that is needed to draw the picture again: regions, strategies and learned tokens
    have no such words.
    """
    loras = "".join(f" <lora:{adapter['name']}:{adapter['scale']:g}>" for adapter in settings["adapters"])
    height, width = settings["size"]
    facts = {
        "Steps": settings["steps"],
        "Sampler": _SAMPLERS.get(settings["scheduler"], settings["scheduler"]),
        "CFG scale": f"{settings['guidance']:g}",
        "Seed": settings["seed"],
        "Size": f"{width}x{height}",
        "Model": Path(str(settings["base"])).name,
    }
    if settings.get("strategy"):
        facts["Strategy"] = settings["strategy"]["name"]
    for number, region in enumerate(settings.get("regions") or (), start=1):
        edges = ",".join(f"{edge:g}" for edge in region["box"])
        facts[f"Region {number}"] = json.dumps(f"{region['prompt']}|{region['negative']}|{edges}", ensure_ascii=False)
    facts["Version"] = f"loraclr {settings['versions']['loraclr']}"
    lines = [f"{settings['prompt']}{loras}"]
    if settings["negative"]:
        lines.append(f"Negative prompt: {settings['negative']}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings inside a picture that `generate` wrote. Raises UsageError for another file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get("loraclr")
    except FileNotFoundError as error:
        raise UsageError(f"there is no picture {path}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is not a picture that can be read ({error})") from error
    if text is None:
        raise UsageError(f"{path} holds no settings; give a PNG that loraclr generate wrote, as other programs may strip them when saving")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the settings inside {path} are damaged ({error}); draw it from its prompt") from error
    lacking = [name for name in _NEEDED if not isinstance(settings, dict) or name not in settings]
    if lacking:
        raise UsageError(f"the settings inside {path} lack {', '.join(lacking)}; draw it from its prompt")
    return dict(settings)


def warn_of_versions(settings: Mapping[str, Any], path: Path) -> None:
    """Other versions of the libraries may draw other pictures from the same settings."""
    stated = settings.get("versions")
    stated = stated if isinstance(stated, Mapping) else {}
    other = [
        f"{name} {stated[name]} (here {version(name)})"
        for name in ("torch", "diffusers", "transformers")
        if stated.get(name) != version(name) and name in stated
    ]
    if other:
        warnings.warn(f"{path.name} was drawn with {', '.join(other)}: the new picture may differ from it", stacklevel=2)
