"""`loraclr study`: a blind user study, from folders of pictures to a scored table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loraclr.cli import show
from loraclr.errors import UsageError

app = typer.Typer(help="A blind user study: which method's pictures capture the identity?", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _group() -> None:
    pass


@app.command("create")
def create(
    folder: Folder,
    references: Annotated[Path, typer.Option(help="Folder with CONCEPT/*.png: what each concept looks like.", show_default=False)],
    pictures: Annotated[
        list[str],
        typer.Option(
            metavar="METHOD=DIR", help="A method's folder with CONCEPT/NAME.png; equal NAMEs are compared. Repeat.", show_default=False
        ),
    ],
    questions: Annotated[int, typer.Option(min=2, help="How many each person is asked.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the choice of pictures.")] = 0,
    title: Annotated[str, typer.Option(help="What people are asked.")] = "How well does the image capture the identity?",
    note: Annotated[str, typer.Option(help="Shown on the first page: who asks, and why.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a study from folders of pictures. The methods' names never reach the browser."""
    from loraclr.web.study import create as make

    methods: dict[str, Path] = {}
    for entry in pictures:
        name, equals, path = entry.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--pictures {entry!r}: write METHOD=DIR")
        if name in methods:
            raise UsageError(f"--pictures: method {name!r} is given twice")
        methods[name] = Path(path)
    study = make(folder, references=references, methods=methods, questions=questions, seed=seed, title=title, note=note)
    if as_json:
        show.as_json({"folder": folder, "questions": len(study.questions), "methods": study.methods})
    else:
        show.out.print(f"{folder}: {len(study.questions)} questions about {len(study.methods)} methods", markup=False)
        show.out.print(f"next: loraclr study serve {folder}", markup=False)


@app.command("serve")
def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
) -> None:
    """Ask people, in their browsers, until Ctrl-C. Answers are on disk as they come."""
    from loraclr.web.server import make_server
    from loraclr.web.study import Study

    study = Study(folder)
    server = make_server(study, host=host, port=port)
    show.out.print(f"open http://{host}:{server.port}/   (Ctrl-C ends; answers are kept in {folder / 'answers.sqlite'})", markup=False)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        show.line("stopped")
    finally:
        server.server_close()


@app.command("score")
def score(folder: Folder, as_json: AsJson = False) -> None:
    """Each method's mean rating with its 95 % interval, and how far raters agree."""
    from loraclr.web.study import Study
    from loraclr.web.study import score as compute

    study = Study(folder)
    scores, raters, alpha = compute(study)
    if as_json:
        show.as_json({"raters": raters, "krippendorff_alpha": alpha, "methods": [asdict(one) for one in scores]})
    elif not scores:
        show.out.print(f"{folder}: nobody has answered yet; there is nothing to score", markup=False)
    else:
        table = show.table("method", "mean", "95 %", "answers", numbers=("mean", "95 %", "answers"))
        for one in scores:
            table.add_row(one.method, f"{one.mean:.2f}", f"{one.low:.2f} - {one.high:.2f}", str(one.answers))
        show.out.print(table)
        told = "undefined (too few answers to the same questions)" if alpha is None else f"{alpha:.2f}"
        show.out.print(f"{raters} raters; agreement (Krippendorff's alpha, interval): {told}", markup=False)
