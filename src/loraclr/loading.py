"""From a folder, a checkpoint or a hub id to a diffusers pipeline: what can be wrong is said before diffusers is asked, in one line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from loraclr.checkpoints import load_checkpoint
from loraclr.errors import PipelineError, UsageError


def load_pipe(source: str | Path, *, dtype: torch.dtype, config: str | Path | None = None) -> Any:
    """A diffusers folder, a single-file checkpoint or, if `source` is a plain `owner/name`, a model of the hub.

    `config` is a diffusers folder of a checkpoint's architecture. Raises PipelineError if a local path does not exist or is no model, if
    loading fails, or without diffusers.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise PipelineError(f"{folder} has no model_index.json; give a folder written by a diffusers pipeline's save_pretrained")
    if not folder.exists() and looks_local(source):
        raise PipelineError(f"there is no folder {folder}; check the path, or give a hub id as owner/name")
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise PipelineError(f"loading a base model needs diffusers and transformers ({error}); pip install 'loraclr[diffusion]'") from error
    if config is not None and not folder.is_file():
        raise PipelineError(f"a config goes with a single-file checkpoint, and {source} is none; leave it out")
    with silenced():
        if folder.is_file():
            return load_checkpoint(folder, dtype=dtype, config=None if config is None else Path(config).expanduser())
        kind: Any = DiffusionPipeline
        name = str(folder if folder.exists() else source)
        try:
            return kind.from_pretrained(name, dtype=dtype, safety_checker=None, requires_safety_checker=False)
        except Exception as error:  # the libraries raise a dozen unrelated kinds
            seen = f"{type(error).__name__}: {error}"
            raise PipelineError(
                f"{source} is no diffusers pipeline that loads ({seen}); check the name, the files and the network"
            ) from error


def placed(load: Callable[[], Any], device: str | torch.device, *, offload: bool) -> Any:
    """What `load` gives, on the device; `offload` leaves it in main memory, each component on the device while it runs.

    `device` may be `auto`: cuda, else mps, else cpu. Raises UsageError for a device that cannot be used, before anything is loaded.
    """
    where = chosen(device)
    if offload and where.type == "cpu":
        raise UsageError("offloading spares the memory of a GPU, and the base is on the CPU; leave it out, or give a device")
    pipe = load()
    if offload:
        pipe.enable_model_cpu_offload(device=where)
        return pipe
    return pipe.to(where)


def half(device: str | torch.device, wanted: bool = True) -> torch.autocast:
    """Inside, what is safe in bfloat16 is multiplied in it, if that is `wanted` and the device can: a processor that only emulates it
    takes 15 times as long as in float32 (measured on AVX2)."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return any(able.get(kind) for kind in ("avx512_bf16", "amx_bf16", "bf16"))


def chosen(device: str | torch.device) -> torch.device:
    """A device that is there. Raises UsageError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(device)!r} cannot be used ({reason}); give cpu, or auto") from error


def looks_local(source: str | Path) -> bool:
    """Anything but a plain `owner/name` or `name`, or one whose first part is a folder here."""
    text = str(source)
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text) is not None
    file_like = text.endswith((".safetensors", ".ckpt", ".bin", ".pt"))
    return isinstance(source, Path) or not hub_id or file_like or ("/" in text and Path(text).parent.is_dir())


@contextmanager
def silenced() -> Iterator[None]:
    """diffusers and transformers print reports and bars about things this package knows to be harmless."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with ExitStack() as restore, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logging in (diffusers_logging, transformers_logging):
            restore.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                logging.disable_progress_bar()
                restore.callback(logging.enable_progress_bar)
        yield
