"""A picture as a command line: what the settings inside say for the options that are not given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from operator import index
from pathlib import Path
from typing import Any

import typer

from loraclr.cli.base import DTYPES
from loraclr.errors import UsageError


def given(context: typer.Context) -> set[str]:
    """The options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def told_by(picture: Path, given: Set[str]) -> dict[str, Any]:
    """What a picture says for every option that is not given. Raises UsageError if a file that it needs is gone or another one now."""
    from loraclr.formats import digest
    from loraclr.settings import read_settings, warn_of_versions

    settings = read_settings(picture)
    warn_of_versions(settings, picture)
    try:
        told, needed = _options(settings, given)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        seen = f"{type(error).__name__}: {error}"
        raise UsageError(f"the settings inside {picture} are not of the form that loraclr writes ({seen}); draw it anew") from error
    problems = []
    if told.pop("lost"):
        problems.append(f"{picture} was drawn with files of which it does not say where they lie; give --lora, --control, --adapter")
    for option, file, known in needed:
        if not Path(file).exists():
            problems.append(f"{file} is not there any more; give {option}")
        elif known is not None and digest(Path(file)) != known:
            problems.append(f"{file} is not the file that {picture.name} was drawn with; to take it all the same give {option}")
    if problems:
        raise UsageError("; ".join(problems))
    return told


def _options(settings: Mapping[str, Any], given: Set[str]) -> tuple[dict[str, Any], list[tuple[str, str, str | None]]]:
    """Settings as values of the options that are not given, and the files that these need: option, file, digest. `lost` tells whether
    some of them are not named."""
    from loraclr.conditioning import Region
    from loraclr.strategies import make_strategy

    files = settings.get("files") or {"loras": [], "controls": []}
    height, width = map(index, settings["size"])
    told: dict[str, Any] = {"base": _text(settings["base"]), "prompt": [_text(settings["prompt"])], "negative": _text(settings["negative"])}
    told |= {"steps": index(settings["steps"]), "guidance": float(settings["guidance"]), "seed": [index(settings["seed"])]}
    told |= {"size": (height, width), "scheduler": settings.get("scheduler"), "lost": False}
    told["base_dtype"] = {name: option for option, name in DTYPES.items()}[settings.get("dtype", "float32")]
    told["regions"] = [Region(one["prompt"], tuple(one["box"]), one["negative"]) for one in settings.get("regions") or ()]
    if stated := settings.get("strategy"):
        told["strategy"] = make_strategy(stated["name"], {name: value for name, value in stated.items() if name != "name"})
        told["nouns"] = {one["name"]: one["noun"] for one in settings["adapters"]}
    needed: list[tuple[str, str, str | None]] = []
    if (config := files.get("base_config")) is not None and not {"base", "base_config"} & given:
        told["base_config"] = Path(config)
        needed.append(("--base-config", config, None))
    if "lora" not in given:
        told["lora"] = [(Path(one["file"]), float(one["scale"])) for one in files["loras"]]
        told["lost"] |= len(told["lora"]) != len(settings.get("adapters") or ())
        needed += [("--lora", one["file"], one["sha256"]) for one in files["loras"]]
    if not {"control", "adapter"} & given:
        told["controls"] = [(one["kind"], Path(one["model"]), Path(one["image"]), float(one["weight"])) for one in files["controls"]]
        told["lost"] |= len(told["controls"]) != len(settings.get("controls") or ())
        for one in files["controls"]:
            needed += [(f"--{one['kind']}", one["model"], None), (f"--{one['kind']}", one["image"], one["sha256"])]
    return {name: value for name, value in told.items() if name not in given}, needed


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def files_of(
    loras: Sequence[tuple[Path, float]], follow: Sequence[tuple[str, Path, Path, float]], base_config: Path | None
) -> dict[str, object]:
    """What a picture needs to be drawn again, with digests."""
    from loraclr.formats import digest

    return {
        "base_config": None if base_config is None else str(base_config),
        "loras": [{"file": str(path), "scale": scale, "sha256": digest(path)} for path, scale in loras],
        "controls": [
            {"kind": kind, "model": str(model), "image": str(image), "weight": weight, "sha256": digest(image)}
            for kind, model, image, weight in follow
        ],
    }
