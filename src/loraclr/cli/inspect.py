"""`loraclr inspect`: what adapter files are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraclr.cli import show
from loraclr.errors import LoraclrError

if TYPE_CHECKING:
    from loraclr.formats import FileReport


def inspect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Adapter files, or PEFT folders.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what adapter files are: format, family, layers, ranks, scales, tokens and trigger words."""
    from loraclr.formats import describe

    reports, failed = [], False
    for path in files:
        try:
            reports.append(describe(path))
        except LoraclrError as error:
            show.error(error)
            failed = True
    if json:
        show.as_json([dataclasses.asdict(report) for report in reports])
    else:
        for report in reports:
            _show(report)
    if failed:
        raise typer.Exit(1)


def _show(report: FileReport) -> None:
    table = show.table("", "", title=str(report.path))
    table.show_header = False
    table.add_row("format", f"{report.format}, {', '.join(report.dtypes)}, {show.size(report.size)}")
    table.add_row("family", report.family or "not stated")
    table.add_row("layers", ", ".join(f"{count} {component}" for component, count in report.layers.items()))
    if report.ranks:
        table.add_row("rank", _counted(report.ranks))
        table.add_row("scale", _counted({f"{scale:g}": count for scale, count in report.scales.items()}))
    if report.dense:
        table.add_row("full rank", f"{report.dense} layers")
    table.add_row("trigger words", ", ".join(report.triggers) or "none stated")
    for token, shape in report.tokens.items():
        table.add_row("learned token", f"{token} ({'one embedding' if shape[0] == 1 else f'{shape[0]} embeddings, one per layer'})")
    table.add_row("sha256", report.sha256)
    for warning in report.warnings:
        table.add_row("note", warning, style="yellow")
    show.out.print(table, "")


def _counted(counts: Mapping[int, int] | Mapping[str, int]) -> str:
    """`8`, or `4 (in 10 layers), 8 (in 2 layers)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} (in {count} layers)" for value, count in counts.items())
