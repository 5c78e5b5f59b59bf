"""`loraclr methods`: every merge method and its parameters, from the methods themselves."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from loraclr.cli import show


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Only this one, with its description.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the merge methods, their presets and their parameters."""
    from loraclr.methods import METHODS, make_method

    if name is not None and name not in METHODS:
        make_method(name)  # says what is wrong with the name, unless it has a preset
        name = name.partition(":")[0]
    chosen: list[Any] = [METHODS[name]] if name else list(METHODS.values())
    if json:
        show.as_json([record(method) | {"needs": sorted(method().needs)} for method in chosen])
        return
    if name is None:
        overview = show.table("method", "what it does", "needs a base", "presets")
        for method in chosen:
            overview.add_row(method.name, method.summary, "yes" if method().needs else "no", " ".join(_presets(method)))
        show.out.print(overview)
    for method in chosen:
        describe(method, described=name is not None)


def describe(method: Any, *, described: bool) -> None:
    """A method, or a recipe: name, reference, with `described` what it is, and its hyper-parameters."""
    from loraclr.methods import parameters

    if not described:
        show.out.print()
    show.out.print(f"{method.name}  ({method.reference})", style="bold", markup=False)
    if described:
        show.out.print("\n".join(line.strip() for line in (method.__doc__ or "").strip().splitlines()), markup=False)
    table = show.table("  parameter", "default", "meaning")
    for row in parameters(method):
        choices = f" [{', '.join(row.choices)}]" if row.choices else ""
        table.add_row(f"  {row.name}", _word(row.default), Text(row.help + choices))
    for preset, values in _presets(method).items():
        words = ", ".join(f"{key}={_word(value)}" for key, value in values.items())
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


def _presets(method: Any) -> dict[str, dict[str, object]]:
    return {preset: dict(values) for preset, values in method.presets.items()}


def _word(value: object) -> str:
    """As `--set` reads it back."""
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value:g}" if isinstance(value, float) else str(value)
