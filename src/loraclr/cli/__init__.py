"""The command line. One file a verb: parse, call one function, show. Heavy imports happen inside the commands: `--help` is quick."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TextIO

import typer

from loraclr import __version__
from loraclr.cli import convert, evaluate, generate, inspect, merge, methods, parse, show, study, toybox, train, verify
from loraclr.errors import LoraclrError

__all__ = ["app", "main"]

EXTRAS = {"diffusion": ("accelerate", "diffusers", "transformers"), "train": ("peft",), "study": ("flask", "krippendorff", "werkzeug")}

app = typer.Typer(
    name="loraclr",
    help="Many LoRAs in, one model out: merge diffusion LoRAs without retraining and without their training data.",
    epilog="Start with: loraclr demo",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect.inspect)
app.command("merge")(merge.merge)
app.command("verify")(verify.verify)
app.command("convert")(convert.convert)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("methods")(methods.methods)
app.command("recipes")(train.recipes)
app.command("demo")(toybox.demo)
app.add_typer(toybox.app, name="toybox")
app.add_typer(study.app, name="study")


def _version(asked: bool) -> None:
    if asked:
        print(f"loraclr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for an error that was shown, 2 for wrong usage, 130 for Ctrl-C."""
    with warnings.catch_warnings(), parse.holding():
        warnings.showwarning = _show_warning
        try:
            typer.main.get_command(app).main(args=None if args is None else list(args), prog_name="loraclr")
        except (LoraclrError, OSError) as error:
            show.error(error)
            return 1
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            extra = next((extra for extra, names in EXTRAS.items() if missing in names), None)
            if extra is None:
                raise
            show.error(ModuleNotFoundError(f"{missing} is not installed, and this command needs it; pip install 'loraclr[{extra}]'"))
            return 1
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if code == 130:
                show.line("interrupted", style="red")
            return code
    return 0


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """What this package warns of is for the user, a line of its source is not. Other libraries' warnings stay as Python shows them."""
    if category.__module__.startswith("loraclr") or Path(filename).is_relative_to(Path(__file__).parents[1]):
        show.line(f"warning: {message}", style="yellow")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
