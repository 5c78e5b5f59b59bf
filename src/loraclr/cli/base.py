"""The base model of a command: where it is, on which device it computes, how precise it is. The same options everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from loraclr.pipeline import Pipeline

SOURCE = "Base model: a diffusers folder, a checkpoint (.safetensors) or a hub id."
Device = Annotated[str, typer.Option(help="Where to compute: auto, cuda, cuda:1, mps, cpu; auto takes the first of these that is there.")]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as torch calls them
BaseDtype = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Precision that the base is held and run in.")]
Offload = Annotated[bool, typer.Option("--offload", help="Keep the base in main memory, each component on the device while it runs.")]
BaseConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A diffusers folder of a checkpoint's kind; of Flux.1, also with what the checkpoint lacks.",
        show_default="SD1.x, SD2.x or SDXL by its shapes",
    ),
]


def open_base(base: str, device: str, dtype: str, *, offload: bool, config: Path | None) -> Pipeline:
    import torch

    from loraclr.pipeline import Pipeline

    return Pipeline.load(base, device=device, dtype=getattr(torch, DTYPES[dtype]), offload=offload, config=config)
