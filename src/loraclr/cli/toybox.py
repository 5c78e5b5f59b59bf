"""`loraclr toybox` and `loraclr demo`: the bundled offline world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loraclr import disk
from loraclr.cli import parse, show

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(help="The bundled offline world: a small base model and adapters for it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.", show_default=False)],
    split: Annotated[Literal["development", "test", "objects", "styles"], typer.Option(help="Which concepts.")] = "development",
    json: AsJson = False,
) -> None:
    """Write base/, loras/ and references/ into a folder, to try the other commands on."""
    from loraclr.toybox import open_toybox

    written = open_toybox().export(folder, split)
    if json:
        show.as_json({part: str(written / part) for part in ("base", "loras", "references")})
    else:
        show.out.print(f"written: {written}", markup=False)


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures, the merged file and the page go.")] = Path("demo"),
    json: AsJson = False,
) -> None:
    """Merge the toybox's adapters and show that it worked: offline, without a GPU, in minutes."""
    parse.hold(disk.folder(output))

    from loraclr.toybox.demo import run_demo

    made = run_demo(output, console=show.err if json else show.out)
    if json:
        show.as_json({"page": str(made.page), "merged": str(made.merged), "scores": made.scores, "seconds": made.seconds})
