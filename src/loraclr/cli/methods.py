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
        more = [{"aliases": list(method.aliases), "when": method.when, "needs": sorted(method().needs)} for method in chosen]
        show.as_json([record(method) | extra for method, extra in zip(chosen, more, strict=True)])
        return
    if name is None:
        overview = show.table("method", "what it does", "needs a base", "presets")
        for method in chosen:
            others = f"; also {', '.join(method.aliases)}" if method.aliases else ""
            overview.add_row(
                method.name, method.summary + others, "yes" if describe.needs_base(method) else "no", " ".join(_presets(method))
            )
        show.out.print(overview)
    for method in chosen:
        asks = f"When: {method.when}.\nInputs: {describe.inputs(method)}.\n"
        present(method, described=name is not None, asks=asks)


def present(method: Any, *, described: bool, asks: str = "") -> None:
    """A method, or a recipe: name, reference, with `described` what it `asks` for and is, and its hyper-parameters."""
    from loraclr.methods import describe, parameters

    if not described:
        show.out.print()
    show.out.print(f"{_called(method)}  ({method.reference})", style="bold", markup=False)
    if described:
        if asks:
            show.out.print(asks, markup=False)
        show.out.print("\n".join(line.strip() for line in (method.__doc__ or "").strip().splitlines()), markup=False)
    table = show.table("  parameter", "default", "meaning")
    for row in parameters(method):
        choices = f" [{', '.join(row.choices)}]" if row.choices else ""
        table.add_row(f"  {row.name}", describe.word(row.default), Text(row.help + choices))
    for preset, values in _presets(method).items():
        words = ", ".join(f"{key}={describe.word(value)}" for key, value in values.items())
        table.add_row(f"  :{preset}", "", f"preset: {words or 'the defaults'}")
    show.out.print(table if table.row_count else "  no parameters")


def record(method: Any) -> dict[str, object]:
    """The same for JSON."""
    from loraclr.methods import parameters

    return {
        "name": method.name,
        "summary": method.summary,
        "reference": method.reference,
        "presets": _presets(method),
        "parameters": [{key: value for key, value in row._asdict().items() if key != "type"} for row in parameters(method)],
    }


def _called(method: Any) -> str:
    others = ", ".join(getattr(method, "aliases", ()))
    return f"{method.name}, also {others}" if others else str(method.name)


def _presets(method: Any) -> dict[str, dict[str, object]]:
    return {preset: dict(values) for preset, values in method.presets.items()}
