"""Files to adapters and back. One module per format; each file is claimed by exactly one of them.

A new format is one module with the members of `AdapterFormat`, and its name in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import torch

from loraclr import disk
from loraclr.adapter import Adapter, LoraLayer
from loraclr.errors import FormatError
from loraclr.formats import bundle, comfy, diffusers, edlora, embedding, files, full, header, kohya, names, notes, peft, sidecar
from loraclr.formats.base import FLOATS, AdapterFormat, BaseWeights, Content, PrecisionWarning, unplaced
from loraclr.formats.files import digest
from loraclr.formats.provenance import LICENSE
from loraclr.formats.report import FileReport, report

__all__ = [
    "FORMATS",
    "WRITTEN",
    "AdapterFormat",
    "BaseWeights",
    "Content",
    "FileReport",
    "PrecisionWarning",
    "check_layers",
    "describe",
    "detect_format",
    "digest",
    "examine",
    "load_adapter",
    "save_adapter",
]

FORMATS: tuple[AdapterFormat, ...] = (kohya, diffusers, peft, edlora, full, bundle, embedding, comfy)
WRITTEN: tuple[str, ...] = tuple(one.id for one in FORMATS if one is not comfy)


def load_adapter(path: str | Path, *, name: str | None = None, base: BaseWeights | None = None) -> Adapter:
    """The adapter in a file or PEFT folder, with the tokens of a `NAME.tokens.safetensors` beside it.

    `name` defaults to the file's name without its ending. `base` is the model it is for, a `Pipeline`: DoRA, OFT and BOFT are changes of
    certain base weights, and are worked out on these; all other kinds need none. Raises FormatError for whatever cannot be read
    completely.
    """
    return _load(Path(path), name, base)[0]


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    format: str = "kohya",
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `adapter` so that every loader of `format` applies it at full strength; returns the path.

    The file appears whole or not at all, and equal adapters make equal bytes. Learned tokens go to `NAME.tokens.safetensors`
    unless the format holds them, both or neither. Raises FormatError for what the format cannot hold and for values that overflow
    `dtype`, WriteError where the system refuses or another run is writing the same file; warns with PrecisionWarning when some layer
    loses more than 1e-3 of its norm.
    """
    path, target = Path(path), _by_id(format)
    with files.about(path):
        if dtype not in FLOATS.values():
            raise FormatError(f"weights cannot be written as {dtype}; use one of {', '.join(FLOATS)}")
        suffixes = files.SUFFIXES[target.storage]
        if target.storage != "folder" and path.suffix not in suffixes:
            raise FormatError(f"format {format!r} makes files ending in {' or '.join(suffixes)}; rename the output")
        if target.storage == "folder" and path.suffix in {".safetensors", ".pth", ".pt"}:
            raise FormatError(f"format {format!r} makes a folder; leave {path.suffix!r} off its name")
        if not len(adapter) and not (target.holds_tokens and adapter.tokens):
            raise FormatError(_nothing(adapter, format))
        content = target.write(adapter, dtype)
        content = Content(content.tensors, header.outgoing(adapter, metadata or {}) | dict(content.metadata))
        with disk.reserved(path, sidecar.path_for(path)), disk.together():
            sidecar.write({} if target.holds_tokens else adapter.tokens, path)
            files.write(content, path, target.storage)
    return path


def _nothing(adapter: Adapter, format: str) -> str:
    if not adapter.tokens:
        return "the adapter has no layers, so there is nothing to write; check what was merged"
    others = ", ".join(one.id for one in FORMATS if one.holds_tokens)
    return f"the adapter has learned tokens only, which format {format!r} does not hold; use one of {others}"


def check_layers(shapes: Mapping[str, tuple[int, ...]], format: str, *, family: str | None = None) -> None:
    """FormatError where `format` has no place for low-rank changes of these layers, names with their weights' shapes.

    Found out by writing rank 1; for full differences, which have kohya's names, by writing that, as they would take a model's room.
    """
    target = _by_id(format)
    layers = [
        LoraLayer(name, torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *[1] * (len(shape) - 2))) for name, shape in shapes.items()
    ]
    (kohya if target is full else target).write(Adapter.of(layers).with_(family=family), torch.float32)


def detect_format(path: str | Path) -> str:
    """The `id` of the format that claims the file."""
    with files.about(Path(path)):
        return _claim(files.read(Path(path))).id


def describe(path: str | Path, *, base: BaseWeights | None = None) -> FileReport:
    """Reads the whole file and says what is in it, with its SHA-256 and remarks worth a user's attention. `base` as in `load_adapter`."""
    return examine(path, base=base)[1]


def examine(path: str | Path, *, base: BaseWeights | None = None) -> tuple[Adapter, FileReport]:
    """What `load_adapter` and `describe` return, of one reading."""
    path = Path(path)
    adapter, target, content = _load(path, None, base)
    types = {str(tensor.dtype).removeprefix("torch.") for key, tensor in content.tensors.items() if not key.endswith("alpha")}
    with files.about(path):
        return adapter, report(
            adapter,
            path=path,
            format=target.id,
            dtypes=tuple(sorted(types)),
            size=sum(member.stat().st_size for member in files.members(path)),
            sha256=files.digest(path),
            tensor_sha256=files.tensor_digest(path),
            trigger_source=header.triggers(content.metadata, notes.read(path))[1],
        )


def _load(path: Path, name: str | None, base: BaseWeights | None) -> tuple[Adapter, AdapterFormat, Content]:
    with files.about(path):
        content = files.read(path)
        target = _claim(content)
        adapter = target.read(content, base)
        if target is embedding:
            adapter = adapter.with_(tokens=embedding.named(adapter.tokens, content.metadata.get(embedding.TOKEN) or path.stem))
        beside = {} if target.holds_tokens else sidecar.read(path)
        if twice := sorted(beside.keys() & adapter.tokens.keys()):
            raise FormatError(f"the token {twice[0]!r} is in the file and in {sidecar.path_for(path).name}; remove one of them")
        noted = notes.read(path)
        stated = dict(content.metadata)
        if noted.licence and not stated.get(LICENSE):
            stated[LICENSE] = noted.licence
        adapter = adapter.with_(
            name=name or (path.name if path.is_dir() else path.stem),
            tokens={**adapter.tokens, **beside},
            triggers=header.triggers(content.metadata, noted)[0],
            family=header.family(content.metadata, adapter.family or names.guess_family(adapter.shapes)),
            metadata=stated,
        )
    return adapter, target, content


def _claim(content: Content) -> AdapterFormat:
    claims = [one for one in FORMATS if one.detect(content.tensors, content.metadata)]
    if len(claims) > 1:
        raise FormatError(f"has keys of {' and '.join(one.id for one in claims)} at once; split it into one file per format")
    if claims:
        return claims[0]
    if sidecar.MARK in content.metadata:
        raise FormatError("holds the learned tokens of an adapter; load the file it lies beside, the tokens come along")
    raise unplaced(content.tensors, "any known format")


def _by_id(format: str) -> AdapterFormat:
    for one in FORMATS:
        if one.id == format:
            return one
    near = get_close_matches(format, WRITTEN, n=1)
    raise FormatError(f"no format {format!r}; use one of {', '.join(WRITTEN)}" + (f" (did you mean {near[0]!r}?)" if near else ""))
