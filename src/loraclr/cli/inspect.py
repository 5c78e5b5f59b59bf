"""`loraclr inspect`: what adapter files are, and whether they should be merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraclr.cli import parse, show
from loraclr.errors import LoraclrError

if TYPE_CHECKING:
    from loraclr.formats import FileReport
    from loraclr.preflight import Preflight

COLORS = {"refuse": "red", "warn": "yellow", "note": ""}


def inspect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Adapter files, or PEFT folders.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="Base model they are for: a diffusers folder or a hub id. Checks them on it.", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Say what a merge at this rank would lose.", show_default=False)] = None,
    trigger: Annotated[
        list[str],
        typer.Option(metavar="NAME=WORDS", help="The words that call an adapter in a prompt; repeatable.", show_default="as the files say"),
    ] = [],  # noqa: B006
    allow: Annotated[list[str], typer.Option(metavar="CHECK", help="As for merge; repeatable.", show_default=False)] = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what adapter files are: format, family, layers, ranks, scales, tokens, trigger words; and whether they should be merged.

    Fails where a merge would be refused. Example: loraclr inspect rhea.safetensors theo.safetensors --base toy/base --rank 16
    """
    calls = dict(parse.pair(text, "--trigger") for text in trigger)

    from loraclr.formats import examine
    from loraclr.pipeline import Pipeline
    from loraclr.preflight import preflight

    pipeline = None if base is None else Pipeline.load(base)
    reports, adapters, failed = [], [], False
    for path in files:
        try:
            adapter, report = examine(path, base=pipeline)
            reports.append(report)
            adapters.append(adapter)
        except LoraclrError as error:
            show.error(error)
            failed = True
    several = len(files) > 1 or base is not None or rank is not None
    before = preflight(adapters, base=pipeline, calls=calls, rank=rank, allow=allow) if several and adapters else None
    if json:
        merge = None if before is None else {"verdict": before.verdict, **dataclasses.asdict(before)}
        show.as_json({"files": [dataclasses.asdict(report) for report in reports], "merge": merge})
    else:
        for report in reports:
            _show(report)
        if before is not None:
            _advise(before)
    if failed or (before is not None and before.of("refuse")):
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
    source = f" (by {report.trigger_source})" if report.trigger_source else ""
    table.add_row("trigger words", f"{', '.join(report.triggers) or 'none stated'}{source}")
    for token, shape in report.tokens.items():
        table.add_row("learned token", f"{token} ({'one embedding' if shape[0] == 1 else f'{shape[0]} embeddings, one per layer'})")
    if report.licence:
        table.add_row("licence", report.licence)
    table.add_row("sha256", report.sha256)
    if report.tensor_sha256 is not None:
        table.add_row("at Civitai", f"AutoV2 {report.sha256[:10].upper()}, AutoV3 (A1111's hash) {report.tensor_sha256[:12].upper()}")
    for warning in report.warnings:
        table.add_row("note", warning, style="yellow")
    show.out.print(table, "")


def _advise(before: Preflight) -> None:
    if before.findings:
        table = show.table("", "check", "what was seen")
        for finding in before.findings:
            table.add_row(finding.level, finding.check, finding.message, style=COLORS[finding.level])
        show.out.print(table, "")
    if before.losses is not None:
        kept = ", ".join(f"{name} {loss:.1%}" for name, loss in before.losses.items())
        show.out.print(f"expected loss at rank {before.rank}, by weights alone: {kept} (rank {before.enough} is enough)", markup=False)
    style = {"merge": "green", "merge with care": "yellow", "do not merge": "red"}[before.verdict]
    show.out.print(f"verdict: {before.verdict}", style=style, markup=False)


def _counted(counts: Mapping[int, int] | Mapping[str, int]) -> str:
    """`8`, or `4 (in 10 layers), 8 (in 2 layers)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} (in {count} layers)" for value, count in counts.items())
