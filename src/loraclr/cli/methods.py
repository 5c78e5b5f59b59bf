"""`loraclr methods`: every merge method and its parameters, from the methods themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from loraclr.cli import show


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Only this one, with its description.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Rewrite the docs of this package's source folder.", show_default=False)
    ] = None,
) -> None:
    """List the merge methods, their presets and their parameters."""
    from loraclr.methods import METHODS, describe, find_method, make_method

    if markdown is not None:
        for path in describe.write(markdown):
            show.out.print(f"written: {path}", markup=False)
        return
    if name is not None:
        make_method(name)  # says what is wrong with the name or its preset
    chosen: list[Any] = [find_method(name.partition(":")[0])] if name else list(METHODS.values())
    if json:
        show.as_json([_record(method) for method in chosen])
        return
    if name is None:
        overview = show.table("method", "what it does", "needs a base", "presets")
        for method in chosen:
            overview.add_row(method.name, method.summary, "yes" if describe.needs_base(method) else "no", " ".join(_presets(method)))
        show.out.print(overview)
    for method in chosen:
        _show(method, described=name is not None)


def _show(method: Any, *, described: bool) -> None:
    from loraclr.methods import describe, parameters

    if not described:
        show.out.print()
    names = method.name + (f", also {', '.join(method.aliases)}" if method.aliases else "")
    show.out.print(f"{names}  ({method.reference})", style="bold", markup=False)
    if described:
        show.out.print(f"When: {method.when}.\nInputs: {describe.inputs(method)}.\n", markup=False)
        show.out.print("\n".join(line.strip() for line in (method.__doc__ or "").strip().splitlines()), markup=False)
    table = show.table("  parameter", "default", "meaning")
    for row in parameters(method):
        choices = f" [{', '.join(row.choices)}]" if row.choices else ""
        table.add_row(f"  {row.name}", describe.word(row.default), Text(row.help + choices))
    for preset, values in _presets(method).items():
        words = ", ".join(f"{key}={describe.word(value)}" for key, value in values.items())
        table.add_row(f"  :{preset}", "", f"preset: {words or 'the defaults'}")
    show.out.print(table if table.row_count else "  no parameters")


def _record(method: Any) -> dict[str, object]:
    from loraclr.methods import parameters

    return {
        "name": method.name,
        "aliases": list(method.aliases),
        "summary": method.summary,
        "when": method.when,
        "reference": method.reference,
        "needs": sorted(method().needs),
        "presets": _presets(method),
        "parameters": [{key: value for key, value in row._asdict().items() if key != "type"} for row in parameters(method)],
    }


def _presets(method: Any) -> dict[str, dict[str, object]]:
    return {preset: dict(values) for preset, values in method.presets.items()}
