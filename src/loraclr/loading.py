"""From a folder or a hub id to a diffusers pipeline: what can be wrong is said before diffusers is asked, in one line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from loraclr.errors import PipelineError


def load_pipe(source: str | Path, *, dtype: torch.dtype) -> Any:
    """A diffusers folder or, if `source` is a plain `owner/name`, a model of the hub.

    Raises PipelineError if a local path does not exist or is no diffusers folder, if loading fails, or without diffusers.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise PipelineError(f"{folder} has no model_index.json; give a folder written by a diffusers pipeline's save_pretrained")
    if folder.is_file():
        raise PipelineError(
            f"{folder} is one file; convert it first: StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)"
        )
    if not folder.exists() and looks_local(source):
        raise PipelineError(f"there is no folder {folder}; check the path, or give a hub id as owner/name")
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise PipelineError(f"loading a base model needs diffusers and transformers ({error}); pip install 'loraclr[diffusion]'") from error
    with silenced():
        kind: Any = DiffusionPipeline
        name = str(folder if folder.exists() else source)
        try:
            return kind.from_pretrained(name, dtype=dtype, safety_checker=None, requires_safety_checker=False)
        except Exception as error:  # the libraries raise a dozen unrelated kinds
            seen = f"{type(error).__name__}: {error}"
            raise PipelineError(
                f"{source} is no diffusers pipeline that loads ({seen}); check the name, the files and the network"
            ) from error


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
