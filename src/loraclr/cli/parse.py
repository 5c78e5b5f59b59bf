"""From words on a command line to values. Every mistake is a UsageError that says what was expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from loraclr import disk
from loraclr.errors import UsageError

if TYPE_CHECKING:
    from loraclr.collect import Collection

# How the name of an output ends; repeated from the formats, which are not imported to parse a command line.
ENDINGS = {
    "kohya": (".safetensors",),
    "diffusers": (".safetensors",),
    "peft": ("",),
    "edlora": (".pth", ".pt"),
    "diff": (".safetensors",),
    "bundle": (".safetensors",),
    "embedding": (".safetensors",),
    "fused": ("",),
    "checkpoint": (".safetensors",),
}
HELD_OUT = ("held out", "held-out", "held_out")  # the group of a file of prompts that is not learned from


_held: ContextVar[ExitStack] = ContextVar("held")


def pair(text: str, what: str) -> tuple[str, str]:
    """`NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise UsageError(f"{what} {text!r} is not of the form NAME=VALUE")
    return name.strip(), value.strip()


def settings(texts: Sequence[str], types: Mapping[str, Any], *, what: str = "--set") -> dict[str, object]:
    """`--set NAME=VALUE` words, given the types of a method's parameters; whether they suit the method is for the method to say."""
    found: dict[str, object] = {}
    for text in texts:
        name, value = pair(text, what)
        if name in found:
            raise UsageError(f"{what} {name} is given twice; keep one")
        found[name] = tuple(_value(part) for part in value.split(",")) if get_origin(types.get(name)) is tuple else _value(value)
    return found


def _value(text: str) -> object:
    """A whole number, a number, true, false, none, or the word itself."""
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def weights(texts: Sequence[str], names: Sequence[str]) -> list[float] | None:
    """`--weight` words: all plain numbers, one per adapter in order, or all NAME=NUMBER, the others staying at 1. None without any."""
    if not texts:
        return None
    named = ["=" in text for text in texts]
    if not any(named):
        if len(texts) != len(names):
            raise UsageError(f"{len(names)} adapters and {len(texts)} plain weights; give one for each in order, or --weight NAME=NUMBER")
        return [number(text, "--weight") for text in texts]
    if not all(named):
        raise UsageError("--weight takes either plain numbers in the order of the files or NAME=NUMBER, not both")
    found: dict[str, float] = {}
    for text in texts:
        name, value = (part.strip() for part in text.rsplit("=", 1))
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"--weight {text!r}: the adapters are {', '.join(names)}{hint}")
        if name in found:
            raise UsageError(f"--weight {name} is given twice; keep one")
        found[name] = number(value, "--weight")
    return [found.get(name, 1.0) for name in names]


def by_name(texts: Sequence[str], names: Sequence[str], what: str) -> dict[str, str]:
    """`[NAME=]WORDS` words: without NAME they hold for all names that have none of their own."""
    found: dict[str, str] = {}
    common: list[str] = []
    for text in texts:
        if "=" not in text:
            common.append(text.strip())
            continue
        name, value = pair(text, what)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{what} {text!r}: the concepts are {', '.join(names)}{hint}")
        if name in found:
            raise UsageError(f"{what} {name} is given twice; keep one")
        found[name] = value
    if len(common) > 1 or not all(common):
        raise UsageError(f"{what} without a name is given {len(common)} times or without words; give it once, or as NAME=WORDS")
    return {name: common[0] for name in names if common} | found


def block_weights(texts: Sequence[str]) -> dict[str, list[float]]:
    """`--block-weights NAME=N,N,...` words; how many numbers there must be is for the merge to say."""
    found: dict[str, list[float]] = {}
    for text in texts:
        name, _, values = text.rpartition("=")
        if not name.strip() or not values.strip():
            raise UsageError(f"--block-weights {text!r} is not of the form NAME=N,N,...")
        if name.strip() in found:
            raise UsageError(f"--block-weights {name.strip()} is given twice; keep one")
        found[name.strip()] = [number(value, f"--block-weights {name.strip()}:") for value in values.split(",")]
    return found


def collection(usual: Collection, prompts: Path | None, preserve: Path | None) -> Collection:
    """`usual` with the prompts of the files `--prompts`, those of its group `held out` only to judge by, and `--preserve`.

    The empty prompt is always kept as it is: guidance starts from it.
    """
    from loraclr.evaluate import read_captions, read_prompts

    if prompts is not None:
        groups = read_prompts(prompts)
        fit = tuple(prompt for prompt, group in groups.items() if group.lower() not in HELD_OUT)
        held_out = tuple(prompt for prompt, group in groups.items() if group.lower() in HELD_OUT)
        usual = replace(usual, fit=fit, held_out=held_out or tuple(prompt for prompt in usual.held_out if prompt not in fit))
    return usual if preserve is None else replace(usual, preserve=("", *read_captions(preserve)))


def number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{what} {text!r} is not a number")
    return value


def size(text: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` in pixels."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--size {text!r} is not HEIGHTxWIDTH in pixels, such as 512x768")
    return int(parts[0]), int(parts[1])


def lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE`. A file that exists under the whole text is meant as it stands."""
    name, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    return Path(name), number(scale, f"--lora {name}: the scale")


def control(kind: str, text: str) -> tuple[str, Path, Path, float]:
    """`MODEL|IMAGE` or `MODEL|IMAGE|WEIGHT` of a `--control` or `--adapter`."""
    fields = [field.strip() for field in text.split("|")]
    if len(fields) not in (2, 3) or not all(fields):
        raise UsageError(f"--{kind} {text!r} is not of the form MODEL|IMAGE or MODEL|IMAGE|WEIGHT")
    model, image = Path(fields[0]), Path(fields[1])
    if not image.is_file():
        raise UsageError(f"--{kind}: there is no picture {image}")
    return kind, model, image, number(fields[2], f"--{kind} {image}: the weight") if len(fields) == 3 else 1.0


def check_output(output: Path, format: str, beside: Sequence[Path], *, force: bool) -> None:
    """Everything that would make the writing fail, said before any work. `beside` are files that are written with it."""
    endings = ENDINGS[format]
    if output.suffix not in endings:
        made = "a folder: leave the ending off" if endings == ("",) else f"a file: end its name in {' or '.join(endings)}"
        raise UsageError(f"--output {output}: format {format} is {made}")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}; make it first")
    if output.exists() and output.is_dir() != (endings == ("",)):
        raise UsageError(f"--output {output}: {output.name} is a {'folder' if output.is_dir() else 'file'}; give another name")
    taken = [path.name for path in (output, *beside) if path.exists()]
    if taken and not force:
        raise UsageError(f"--output {output}: {', '.join(taken)} exists already; give another name, or --force to replace")


def hold_output(output: Path, format: str, beside: Sequence[Path], *, force: bool, more: Sequence[Path] = ()) -> None:
    """`check_output`, and `output` is the command's until its end. Looked at again then: another run may have ended in between.

    `more` are files that may be written with it, whether or not they are there.
    """
    check_output(output, format, beside, force=force)
    hold(disk.reserved(output, *beside, *more))
    check_output(output, format, beside, force=force)


def hold(resource: AbstractContextManager[object]) -> None:
    """Enters what is to last until the command ends: the reservation of its output."""
    _held.get().enter_context(resource)


@contextmanager
def holding() -> Iterator[None]:
    """Around a command: leaves at its end what it holds."""
    with ExitStack() as stack:
        token = _held.set(stack)
        try:
            yield
        finally:
            _held.reset(token)


def adapter_name(path: Path) -> str:
    """What `load_adapter` calls it."""
    return path.name if path.is_dir() else path.stem
