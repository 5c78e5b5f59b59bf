"""Between a path and `Content`: the only module here that touches the disk. What comes from a file is believed only once checked."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraclr import disk
from loraclr.errors import FormatError
from loraclr.formats import embedding
from loraclr.formats.base import FLOATS, Content, Storage
from loraclr.formats.names import COMPONENTS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUFFIXES: dict[Storage, tuple[str, ...]] = {"file": (".safetensors",), "torch": (".pth", ".pt"), "folder": ("",)}
_TORCH_READ = (".pth", ".pt", ".bin")
READ = (".safetensors", *_TORCH_READ)
# As safetensors calls them.
_NAMES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_CONFIG_BYTES = 4 << 20
_ZIP_SLACK = 1 << 10


class Entry(NamedTuple):
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


Stored = Tensor | Entry


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Every error from inside becomes one FormatError that begins with the path."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: cannot be read or written ({error}); check the path, or fetch the file again") from error


def read(path: Path) -> Content:
    """The checked content of a .safetensors file, a .pth / .pt file or a PEFT folder."""
    if path.is_dir():
        content = _read_folder(path)
    elif not path.exists():
        raise FormatError("there is no such file; check the path")
    elif not path.is_file():  # opening a pipe would wait for ever
        raise FormatError("is no ordinary file; check the path")
    elif path.suffix in _TORCH_READ:
        content = _read_torch(path)
    elif path.suffix == ".safetensors":
        content = _read_safetensors(path)
    else:
        raise FormatError(f"files ending in {path.suffix!r} are not read; convert it to .safetensors first")
    if not content.tensors:
        raise FormatError("there are no tensors in it; fetch the file again")
    for key, tensor in content.tensors.items():
        # Trainers store alpha as an integer now and then; it is a number, not a weight.
        if tensor.dtype not in FLOATS.values() and not (key.endswith("alpha") and tensor.numel() == 1):
            raise FormatError(f"{key} has type {tensor.dtype}; expected one of {', '.join(FLOATS)}: convert the file first")
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{key} holds NaN or infinite values; the file is damaged or its training diverged")
    return content


def members(path: Path) -> list[Path]:
    """The files an adapter at `path` consists of, sorted."""
    if not path.is_dir():
        return [path]
    return sorted(found for folder in _folders(path) for found in (path / folder / CONFIG, path / folder / WEIGHTS) if found.exists())


def digest(path: Path) -> str:
    """SHA-256 of the file, in hex; of a folder, of its members' relative names and digests."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = "".join(f"{digest(member)}  {member.relative_to(path).as_posix()}\n" for member in members(path))
    return hashlib.sha256(lines.encode()).hexdigest()


def tensor_digest(path: Path) -> str | None:
    """SHA-256 of a .safetensors file without its header, in hex: kohya's `sshs_model_hash`, and what A1111 and Civitai know it by."""
    if path.suffix != ".safetensors" or path.is_dir():
        return None
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(content: Content, path: Path, storage: Storage) -> None:
    """Puts `content` at `path` in one step: whoever looks sees the old file or the whole new one. Equal content, equal bytes.

    Raises FormatError for a folder that holds more than one PEFT adapter, and WriteError for what the system refuses.
    """
    if storage == "folder":
        _write_folder(content, path)
    elif storage == "torch":
        disk.write(path, _torch_bytes(content))
    else:
        write_large(content.tensors, _hashed(content.tensors, content.metadata), path)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The whole file in memory, for small ones, with what `_hashed` adds."""
    parts = _parts(tensors, _hashed(tensors, metadata))
    return b"".join(bytes(part) for part in parts)


def write_large(tensors: Mapping[str, Stored], metadata: Mapping[str, str], path: Path) -> None:
    """A .safetensors file of whole models: put there in one step as by `write`, but tensor by tensor."""
    with disk.whole(path) as part:
        stream(tensors, metadata, part)


def stream(tensors: Mapping[str, Stored], metadata: Mapping[str, str], path: Path) -> None:
    """The same straight into the file at `path`, for folders that are written as a whole: tensor by tensor, no copy of all in memory."""
    with path.open("wb") as file:
        file.writelines(_parts(tensors, metadata))


def _hashed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` and the SHA-256 of the tensors, as kohya's trainer and the model specification call it."""
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    if wrong:
        raise FormatError(f"metadata {wrong[0]!r} is a {type(metadata[wrong[0]]).__name__}; safetensors metadata must be text: use str()")
    whole = hashlib.sha256()
    for key in _order(tensors):
        whole.update(body(tensors[key]))
    return {**metadata, "modelspec.hash_sha256": f"0x{whole.hexdigest()}", "sshs_model_hash": whole.hexdigest()}


def _parts(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> Iterator[Any]:
    """A .safetensors file, piece by piece. Equal content, equal bytes: the library shuffles the metadata from run to run."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    order, end = _order(tensors), 0
    for key in order:
        begin, end = end, end + math.prod(tensors[key].shape) * tensors[key].dtype.itemsize
        entries[key] = {"dtype": _NAMES[tensors[key].dtype], "shape": list(tensors[key].shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little")
    yield header
    yield from (body(tensors[key]) for key in order)


def _order(tensors: Mapping[str, Stored]) -> list[str]:
    """The larger types first: all stay aligned."""
    return sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))


def body(stored: Stored) -> Any:
    """The bytes of a tensor, as a buffer."""
    tensor = stored.make() if isinstance(stored, Entry) else stored
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensors_of(path: Path) -> dict[str, Tensor]:
    """What a .safetensors file of our own making holds, unchecked."""
    return safetensors.torch.load_file(path)


def _read_safetensors(path: Path) -> Content:
    try:
        with safe_open(path, framework="pt") as file:
            return Content({key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise FormatError(f"is no valid safetensors file ({error}); fetch it again") from error


def _read_folder(path: Path) -> Content:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for folder in _folders(path):
        config, weights = path / folder / CONFIG, path / folder / WEIGHTS
        if not config.is_file() or not weights.is_file():
            raise FormatError(f"the folder {folder or '.'} lacks {(WEIGHTS if config.is_file() else CONFIG)}; pass a whole PEFT folder")
        if config.stat().st_size > _CONFIG_BYTES:
            raise FormatError(f"{folder}{CONFIG} has {config.stat().st_size} bytes, too many for a configuration; fetch it again")
        part = _read_safetensors(weights)
        tensors |= {folder + key: tensor for key, tensor in part.tensors.items()}
        metadata |= part.metadata
        metadata[folder + CONFIG] = config.read_text("utf-8", errors="replace")
    if not tensors and not metadata:
        raise FormatError(f"a folder without {CONFIG}, here or in its subfolders; pass a LoRA file or a PEFT folder")
    return Content(tensors, metadata)


def _folders(path: Path) -> list[str]:
    """`""` for a PEFT folder itself, else `unet/`, ... for the PEFT folders in it."""
    if (path / CONFIG).exists() or (path / WEIGHTS).exists():
        return [""]
    return sorted(f"{child.name}/" for child in path.iterdir() if (child / CONFIG).exists() or (child / WEIGHTS).exists())


def _read_torch(path: Path) -> Content:
    """`{"params": {section: {name: tensor}}, "metadata": {...}}`, unpickled with weights_only and nothing else."""
    try:
        if not zipfile.is_zipfile(path):  # which raises, too, on some damage
            raise FormatError("is no torch zip file (torch 1.6 or later); fetch it again, or load and save it where you trust it")
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size + _ZIP_SLACK:
            raise FormatError(f"would unpack to {unpacked} bytes; torch never compresses, so this is no honest file: discard it")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except Exception as error:  # a forged archive can make the unpickler raise anything
        reason = (str(error) or repr(error)).splitlines()[0]
        raise FormatError(f"cannot be unpickled as plain tensors ({reason}); fetch it again from a source you trust") from error
    if (found := _embedding(content)) is not None:
        return found
    params = content.get("params") if isinstance(content, dict) else None
    if not isinstance(params, dict) or not content.keys() <= {"params", "metadata"}:
        raise FormatError("holds no 'params' dictionary as ED-LoRA files do, and no embedding; convert it to .safetensors first")
    tensors = {}
    for section, entries in params.items():
        for name, tensor in (entries or {}).items() if isinstance(entries, dict | None) else [("", entries)]:
            if not _is_plain(tensor):
                raise FormatError(f"params/{section}/{name} is no ordinary tensor; the file is not an ED-LoRA, convert it first")
            tensors[f"params/{section}/{name}"] = tensor.detach()
    metadata = content.get("metadata") or {}
    return Content(tensors, {key: value for key, value in metadata.items() if isinstance(key, str) and isinstance(value, str)})


def _embedding(content: object) -> Content | None:
    """A Textual Inversion: A1111's `string_to_param`, or tensors under its keys, or a single one; None for anything else."""
    if not isinstance(content, dict):
        return None
    old = isinstance(params := content.get("string_to_param"), dict)
    entries, prefix = (params, embedding.TORCH) if old else (content, embedding.LEARNED)
    if not entries or not all(isinstance(key, str) and _is_plain(tensor) for key, tensor in entries.items()):
        return None
    if not (old or len(entries) == 1 or embedding.known(list(entries))):
        return None
    return Content({f"{prefix}{key}": tensor.detach() for key, tensor in entries.items()})


def _is_plain(tensor: object) -> bool:
    """A dense CPU tensor that owns as much memory as its shape claims; pickles can also make views of nothing."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _torch_bytes(content: Content) -> bytes:
    params: dict[str, dict[str, Tensor]] = {"new_concept_embedding": {}, "text_encoder": {}, "unet": {}}
    for key in sorted(content.tensors):
        _, section, name = key.split("/", 2)
        params[section][name] = content.tensors[key].detach().cpu().clone()
    saved: dict[str, Any] = {"params": params}
    if content.metadata:
        saved["metadata"] = dict(sorted(content.metadata.items()))
    buffer = io.BytesIO()  # a buffer, not the path: torch puts the file's name into the archive, and equal content should be equal bytes
    torch.save(saved, buffer)
    return buffer.getvalue()


def _holds_only_peft(folder: Path) -> bool:
    """Nothing but what this writer makes: replacing it loses nothing else."""
    known = {CONFIG, WEIGHTS, "README.md"}
    return all(
        entry.name in known if entry.is_file() else entry.name in COMPONENTS and {inner.name for inner in entry.iterdir()} <= known
        for entry in folder.iterdir()
    )


def _write_folder(content: Content, path: Path) -> None:
    if path.exists() and not (path.is_dir() and _holds_only_peft(path)):
        raise FormatError("exists and holds more than one PEFT adapter; choose another name, nothing of it is replaced")
    shared = {key: value for key, value in content.metadata.items() if not key.endswith(CONFIG)}
    with disk.whole(path) as part:
        part.mkdir()
        for key, text in content.metadata.items():
            if key.endswith(CONFIG):
                folder = key.removesuffix(CONFIG)
                (part / folder).mkdir(exist_ok=True)
                mine = {name.removeprefix(folder): tensor for name, tensor in content.tensors.items() if name.startswith(folder)}
                (part / key).write_bytes(text.encode() + b"\n")
                stream(mine, _hashed(mine, shared), part / folder / WEIGHTS)
