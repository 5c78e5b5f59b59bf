"""`loraclr verify`: is a merged file what its sources ask for?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from loraclr.cli import parse, show
from loraclr.cli.base import SOURCE, BaseConfig, BaseDtype, Device, Offload, open_base
from loraclr.cli.options import SCRATCH, Triggers


def verify(
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="The merged file, by whatever tool.", show_default=False)],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="The files it was merged from.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help=f"{SOURCE} Without it the weights alone are compared.", show_default=False),
    ] = None,
    weight: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]NUMBER", help="The strength that was meant; repeatable.", show_default="the receipt's, else 1"),
    ] = [],  # noqa: B006
    trigger: Triggers = [],  # noqa: B006
    device: Device = "auto",
    base_dtype: BaseDtype = "fp32",
    offload: Offload = False,
    base_config: BaseConfig = None,
    scratch: Annotated[
        Path | None, typer.Option(metavar="DIR", help=SCRATCH, show_default="the system's folder for temporary files")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a merged file against its sources: layers, numbers, and every concept's strength at 1.0. Fails where something is wrong.

    Example: loraclr verify both.safetensors rhea.safetensors theo.safetensors --base toy/base
    """
    names = [parse.adapter_name(path) for path in files]
    weights = parse.weights(weight, names)
    calls = dict(parse.pair(text, "--trigger") for text in trigger)

    from loraclr.verify import verify as run

    pipeline = None if base is None else open_base(base, device, base_dtype, offload=offload, config=base_config)
    with show.progress(quiet=json) as tell:
        found = run(merged, files, base=pipeline, weights=weights, calls=calls, scratch=scratch, progress=tell)
    if json:
        show.as_json({"good": found.good, **dataclasses.asdict(found)})
    else:
        columns = ("meant", "strength at 1.0", "residual", "worst layer")
        table = show.table("concept", *columns, numbers=columns[:3], title=f"{merged}, by {found.space}")
        for one in found.concepts:
            worst = f"{one.worst} ({one.worst_residual:.2f})" if one.worst else "-"
            table.add_row(one.name, f"{one.meant:g}", f"{one.strength:.2f}", f"{one.residual:.3f}", worst)
        show.out.print(table, "")
        for note in found.notes:
            show.out.print(f"note: {note}", markup=False, style="yellow")
        for wrong in found.wrong:
            show.out.print(f"wrong: {wrong}", markup=False, style="red")
        show.out.print("good" if found.good else "not good", style="green" if found.good else "red")
    if not found.good:
        raise typer.Exit(1)
