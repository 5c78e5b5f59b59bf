"""`loraclr convert`: one adapter file in another format, or as a model of its own with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loraclr.cli import parse, show
from loraclr.cli.base import SOURCE, BaseConfig
from loraclr.errors import UsageError


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file, or a PEFT folder.", show_default=False)],
    to: Annotated[
        Literal["kohya", "diffusers", "peft", "edlora", "diff", "bundle", "embedding", "fused", "checkpoint"],
        typer.Option(help="Names and layout of the output; fused and checkpoint are the base with the adapter in it.", show_default=False),
    ],
    output: Annotated[Path | None, typer.Option(metavar="OUT", help="The file to write.", show_default="FILE-FORMAT, beside FILE")] = None,
    base: Annotated[
        str | None,
        typer.Option(help=f"{SOURCE} DoRA, OFT, BOFT, fused and checkpoint need it.", show_default=False),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The most per layer; cuts what has more.", show_default="all of it")] = None,
    dtype: Annotated[Literal["fp16", "fp32"], typer.Option(help="Precision of the output.")] = "fp16",
    base_config: BaseConfig = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter in another format. Every layer keeps its change; scales are baked in, trigger words come along.

    fused is a diffusers folder, checkpoint one file as A1111 and ComfyUI load it. Example: loraclr convert rhea.pth --to kohya
    """
    if not file.exists():
        raise UsageError(f"{file}: there is no such file; check the path")
    file = file if file.name else file.resolve()
    output = output or file.with_name(f"{parse.adapter_name(file)}-{to}{parse.ENDINGS[to][0]}")
    tokens = output.with_name(output.name.removesuffix(".safetensors") + ".tokens.safetensors")
    whole = to in ("fused", "checkpoint")
    if whole and base is None:
        raise UsageError(f"--to {to} is the base model with the adapter in it; give --base")
    if output.resolve() == file.resolve():
        raise UsageError(f"--output {output} is the file to convert; give another name")
    parse.hold_output(output, to, [] if to in ("edlora", "bundle", "embedding") else [tokens], force=force, more=[tokens])

    import torch

    from loraclr.adapter import DenseLayer
    from loraclr.formats import load_adapter, save_adapter
    from loraclr.formats.reduced import reduced
    from loraclr.fuse import fuse
    from loraclr.pipeline import Pipeline

    pipeline = None if base is None else Pipeline.load(base, config=base_config)
    adapter = load_adapter(file, base=pipeline)
    adapter, lost = (adapter, {}) if rank is None else reduced(adapter, rank)
    precision = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    if to == "fused" or to == "checkpoint":
        assert pipeline is not None
        written = fuse(adapter, pipeline, output, layout=to, dtype=precision)
    else:
        written = save_adapter(adapter, output, format=to, dtype=precision)
    dense = 0 if whole else sum(isinstance(layer, DenseLayer) for layer in adapter)
    sidecar = tokens if tokens.exists() and adapter.tokens else None
    if json:
        show.as_json(
            {
                "output": str(written),
                "tokens": None if sidecar is None else str(sidecar),
                "layers": len(adapter),
                "dense": dense,
                "lost": lost,
            }
        )
        return
    show.out.print(f"written: {written}", markup=False)
    if sidecar is not None:
        show.out.print(f"tokens:  {sidecar}", markup=False)
    if dense:
        show.line(f"{dense} of {len(adapter)} layers have full rank, and diffusers does not load such; --rank cuts them", style="yellow")
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        show.line(f"{len(lost)} of {len(adapter)} layers were cut to rank {rank}; {worst} lost most, {lost[worst]:.1%} of its change")
