"""`loraclr compare`: many methods on the same adapters, as a table and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from loraclr import disk
from loraclr.cli import evaluate, parse, show
from loraclr.cli.base import SOURCE, BaseConfig, BaseDtype, Device, Offload, open_base
from loraclr.cli.options import Allow, Batch, BlockWeights, CollectionSeed, Guidance, Quick, Scratch, Size, Steps, Triggers, Weights
from loraclr.errors import UsageError

if TYPE_CHECKING:
    from loraclr.adapter import Adapter
    from loraclr.compare import Comparison, Entry
    from loraclr.compare.pictures import Drawing
    from loraclr.methods import Method

TOYBOX = "toybox"


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Adapter files, or PEFT folders.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help=f"{SOURCE} Without it only weight-only methods merge and nothing is measured.", show_default=False),
    ] = None,
    methods: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[:PRESET][:KEY=VALUE],...",
            help="Methods and their parameters, such as loraclr,sum:scale=0.15; or all; repeatable.",
        ),
    ] = ["all"],  # noqa: B006
    output: Annotated[Path, typer.Option(metavar="PAGE", help="The page to write; its folder must exist.")] = Path("compare.html"),
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything as JSON, too; - prints it.", show_default=False)
    ] = None,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep every merged file; made if missing.", show_default=False)] = None,
    weight: Weights = [],  # noqa: B006
    block_weights: BlockWeights = [],  # noqa: B006
    trigger: Triggers = [],  # noqa: B006
    rank: Annotated[int | None, typer.Option(min=1, help="The most per layer.", show_default="what each solution needs")] = None,
    seed: CollectionSeed = 0,
    quick: Quick = False,
    allow: Allow = [],  # noqa: B006
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw every method at equal seeds into this folder.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One prompt a line, {} or <TOK> for the concept's words.", show_default=False)
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="JUDGE", help="Score the pictures: clip:PATH_OR_ID, or toybox with its own prompts.", show_default=False),
    ] = None,
    face_judge: Annotated[
        str | None, typer.Option(metavar="JUDGE", help="arcface:FILE.onnx, dlib or toyface: also identity.", show_default=False)
    ] = None,
    references: Annotated[
        Path | None, typer.Option(metavar="DIR", help="CONCEPT/ folders of pictures, for --judge.", show_default=False)
    ] = None,
    class_: Annotated[
        list[str],
        typer.Option(
            "--class", metavar="[CONCEPT=]WORDS", help="What kind of thing it is; repeatable.", show_default="last word of the call"
        ),
    ] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures per concept and prompt: seeds 0 to N-1.")] = 1,
    steps: Steps = 20,
    guidance: Guidance = 4.0,
    size: Size = None,
    batch: Batch = 4,
    device: Device = "auto",
    base_dtype: BaseDtype = "fp32",
    offload: Offload = False,
    base_config: BaseConfig = None,
    scratch: Scratch = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Merge the same adapters with many methods, and measure all of them alike.

    Example: loraclr compare loras/*.safetensors --base toy/base --methods loraclr,average,sum:scale=0.15
    """
    printed = json == Path("-")
    for path in (output, *([] if json is None or printed else [json])):
        _check(path, force=force)
    if output.suffix != ".html":
        raise UsageError(f"--output {output}: the page is HTML; end its name in .html")
    _check_pictures(base, pictures, prompts, judge, face_judge, references)
    parse.hold(disk.reserved(output))
    if json is not None and not printed:
        parse.hold(disk.reserved(json))
    for path in (output, *([] if json is None or printed else [json])):  # another run may have ended in between
        _check(path, force=force)
    asked = None if size is None else parse.size(size)
    weights = parse.weights(weight, [parse.adapter_name(path) for path in files])
    blocks = parse.block_weights(block_weights)
    calls = dict(parse.pair(text, "--trigger") for text in trigger)

    from loraclr.collect import collection_for
    from loraclr.compare import compare as run
    from loraclr.compare.page import write_page
    from loraclr.compare.pictures import draw
    from loraclr.formats import load_adapter

    chosen = _methods(methods)
    pipeline = None if base is None else open_base(base, device, base_dtype, offload=offload, config=base_config)
    drawing, alone = None, {}
    if pictures is not None and pipeline is not None:
        alone = {parse.adapter_name(path): load_adapter(path, base=pipeline) for path in files}
        called = {name: calls.get(name) or adapter.call for name, adapter in alone.items()}
        settings = {"seeds": range(seeds), "steps": steps, "guidance": guidance, "size": asked, "batch_size": batch}
        drawing = _drawing(alone, called, prompts, judge, face_judge, references, class_, settings)
        drawing.check(pipeline, alone, chosen, pictures, replace=force)

    def write(found: Comparison) -> None:
        write_page(found, output)
        if json is not None and not printed:
            found.save(json)

    with show.progress(quiet=printed) as tell:
        found = run(
            files,
            base=pipeline,
            methods=chosen,
            weights=weights,
            block_weights=blocks,
            calls=calls,
            rank=rank,
            seed=seed,
            collection=partial(collection_for, quick=quick),
            allow=allow,
            keep=keep,
            scratch=scratch or output.absolute().parent,
            progress=tell,
        )
        write(found)  # before pictures, which take longest
        if drawing is not None and pipeline is not None and pictures is not None:
            found = draw(pipeline, found, alone, pictures, drawing, progress=tell)
            write(found)
    if printed:
        show.as_json(found.report())
    else:
        _show(found, output)


def _check(path: Path, *, force: bool) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already; give another name, or --force to replace")


def _check_pictures(base: str | None, pictures: Path | None, prompts: Path | None, *judging: object) -> None:
    judge, face, references = judging
    if pictures is None and (prompts or judge or face or references):
        raise UsageError("--prompts, --judge, --face-judge and --references are for pictures; give --pictures DIR, too")
    if pictures is not None and base is None:
        raise UsageError("--pictures needs a model to draw with; give --base")
    if judge == TOYBOX and (prompts or face or references):
        raise UsageError("--judge toybox brings its own prompts and references; leave --prompts, --face-judge and --references out")
    if (judge != TOYBOX and bool(judge) != bool(references)) or (face and not judge):
        raise UsageError("judges compare with pictures of the concepts: give --judge and --references DIR together")


def _methods(texts: Sequence[str]) -> dict[str, Method]:
    """`NAME[:PRESET][:KEY=VALUE...]`, with commas between; further numbers after a comma belong to the value before."""
    from loraclr.compare import every_method
    from loraclr.methods import find_method, make_method, parameters

    labels: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        if labels and "=" in labels[-1] and part.replace(".", "", 1).isdecimal():
            labels[-1] += f",{part}"
        elif part:
            labels.append(part)
    found: dict[str, Method] = {}
    for label in labels:
        words = label.split(":")
        name = ":".join(word for word in words if "=" not in word)
        made: Mapping[str, Method]
        if name == "all":
            made = every_method()
        else:
            types = {row.name: row.type for row in parameters(find_method(name.partition(":")[0]))}
            made = {label: make_method(name, **parse.settings([word for word in words if "=" in word], types, what=label))}
        found |= {key: method for key, method in made.items() if key not in found}
    return found


def _drawing(
    adapters: Mapping[str, Adapter],
    calls: Mapping[str, str],
    prompts: Path | None,
    judge: str | None,
    face: str | None,
    references: Path | None,
    classes: Sequence[str],
    settings: dict[str, Any],
) -> Drawing:
    """What the options say of pictures, all of it read and opened."""
    from loraclr.compare.pictures import ALONE, PROMPTS, Drawing, by_toybox
    from loraclr.evaluate import Subject, Variant, read_prompts, read_references
    from loraclr.judges import open_face_judge, open_picture_judge

    if judge == TOYBOX:
        return by_toybox(calls, **settings)
    settings["prompts"] = PROMPTS if prompts is None else read_prompts(prompts)
    if judge is None or references is None:
        return Drawing([Subject(name, call, "", ()) for name, call in calls.items()], **settings)
    shown = read_references(references)
    if missing := sorted(set(adapters) - set(shown)):
        raise UsageError(f"--references {references} has no pictures of {', '.join(missing)}; give each a folder of its name")
    shown = {name: shown[name] for name in adapters}
    subjects = evaluate.subjects_of(shown, {ALONE: Variant(adapters)}, [f"{name}={call}" for name, call in calls.items() if call], classes)
    return Drawing(subjects, judge=open_picture_judge(judge), face=None if face is None else open_face_judge(face), **settings)


def _show(found: Comparison, output: Path) -> None:
    measured = any(entry.measure for entry in found.merged)
    columns = [*(["held out", "fit", "strength", "cross-talk"] if measured else []), "rank", "file", "s", "memory"]
    title = f"{len(found.merged)} methods on {len(found.settings['inputs'])} adapters"
    table = show.table("method", *columns, numbers=tuple(columns), title=title)
    for entry in found.merged:
        table.add_row(Text(entry.label), *_cells(entry, measured))
    show.out.print(table, "")
    if scores := found.scores():
        names = list(dict.fromkeys(name for values in scores.values() for name in values))
        table = show.table("scores of pictures", *names, numbers=tuple(names))
        for label, values in scores.items():
            table.add_row(Text(label), *(f"{values[name].mean:.2f}" if name in values else "-" for name in names))
        show.out.print(table, "")
    if measured:
        said = "held out, fit: mean residual on each concept's features; 0 is the adapter's own behaviour, 1 the base's"
        show.out.print(said, style="dim", markup=False)
        said = f"strength: what is left of each adapter; cross-talk: how loud another still is beside it, unmerged {found.before:.2f}"
        show.out.print(said, style="dim", markup=False)
    for entry in found.entries:
        if entry.result is None:
            show.out.print(Text(f"not merged by {entry.label}: {entry.why}", style="yellow"))
    show.out.print(f"written: {output}", markup=False)


def _cells(entry: Entry, measured: bool) -> list[str]:
    cells = []
    if measured:
        talk = entry.measure.cross_talk.summary() if entry.measure else {}
        residuals = [entry.measure.residual(kind) if entry.measure else math.nan for kind in ("held_out", "fit")]
        cells = [_number(value) for value in (*residuals, talk.get("strength", math.nan), talk.get("after", math.nan))]
    low, high = entry.ranks
    memory = "-" if math.isnan(entry.megabytes) else f"{entry.megabytes:.0f} MB"
    return [*cells, str(low) if low == high else f"{low}-{high}", show.size(entry.size), f"{entry.seconds:.1f}", memory]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
