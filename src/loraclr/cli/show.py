"""What all commands show alike: tables and JSON on standard output; progress, warnings and errors on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def line(text: str, *, style: str = "") -> None:
    """One line on standard error, whatever its length and whatever brackets are in it."""
    err.print(Text(" ".join(text.split()), style=style))


def error(problem: Exception) -> None:
    err.print(Text.assemble(("error: ", "bold red"), " ".join(str(problem).split())))


def as_json(value: Any) -> None:
    """Plain JSON on standard output, for other programs. Paths become text."""
    print(json.dumps(value, indent=2, default=str, allow_nan=False))


def table(*columns: str, title: str | None = None, numbers: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """An open table; `numbers` are the columns that stand to the right, `whole` those of which nothing is broken in two."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold", no_wrap=column in whole)
    return made


def fits(table: Table) -> bool:
    """Whether the table stands on the screen with no cell broken in two."""
    return Measurement.get(out, out.options.update(width=10_000), table).maximum <= out.width


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def percent(share: float) -> str:
    return "0" if share == 0 else f"{share:.1%}" if share >= 5e-4 else "<0.1%"


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Gives `tell(what, share)`, share from 0 to 1: a bar with the time left for every phase, the part of `what` before a colon.

    Nothing is drawn where standard error is no terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, share: float) -> None:
            phase = what.partition(": ")[0]
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=1.0)
            bar.update(tasks[phase], completed=share, description=what if share < 1 else phase)

        yield tell
