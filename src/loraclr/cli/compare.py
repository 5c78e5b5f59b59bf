"""`loraclr compare`: many methods on the same adapters, as a table and a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from loraclr import disk
from loraclr.cli import evaluate, parse, show
from loraclr.cli.base import SOURCE, BaseConfig, BaseDtype, Device, Offload, open_base
from loraclr.cli.options import (
    Allow,
    Batch,
    BlockWeights,
    CollectionSeed,
    FitPrompts,
    Guidance,
    Preserve,
    Quick,
    Scratch,
    Size,
    Steps,
    Triggers,
    Weights,
)
from loraclr.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from loraclr.adapter import Adapter
    from loraclr.collect import Collection
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
    fit_prompts: FitPrompts = None,
    preserve: Preserve = None,
    allow: Allow = [],  # noqa: B006
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw every method at equal seeds into this folder.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt a line to draw, {} or <TOK> for the concept's words.", show_default=False),
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

    from loraclr.compare import compare as run
    from loraclr.compare.page import write_page
    from loraclr.compare.pictures import draw
    from loraclr.formats import load_adapter

    chosen = _methods(methods)
    _check_prompts(base, chosen, fit_prompts, preserve, quick=quick)
    collection = _collections(chosen, fit_prompts, preserve, quick=quick)
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
            collection=collection,
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
        raise UsageError(
            "--prompts, --judge, --face-judge and --references are for pictures; give --pictures DIR, too (to learn from: --fit-prompts)"
        )
    if pictures is not None and base is None:
        raise UsageError("--pictures needs a model to draw with; give --base")
    if judge == TOYBOX and (prompts or face or references):
        raise UsageError("--judge toybox brings its own prompts and references; leave --prompts, --face-judge and --references out")
    if (judge != TOYBOX and bool(judge) != bool(references)) or (face and not judge):
        raise UsageError("judges compare with pictures of the concepts: give --judge and --references DIR together")


def _check_prompts(base: str | None, chosen: Mapping[str, Method], prompts: Path | None, preserve: Path | None, *, quick: bool) -> None:
    """Nothing is given of prompts and passes that nobody reads; the common measure reads `--fit-prompts`."""
    files = {"--fit-prompts": prompts, "--preserve": preserve}
    given = [f"{option} {file}" for option, file in files.items() if file is not None] + ["--quick"] * quick
    if base is None and given:
        raise UsageError(f"{given[0]}: without a base nothing is learned from prompts or measured; give --base PATH_OR_ID, or leave it out")
    if preserve is not None and not any("preserve" in method.needs for method in chosen.values()):
        raise UsageError(f"--preserve {preserve}: none of {', '.join(chosen)} preserves prompts; leave it out")


def _collections(
    chosen: Mapping[str, Method], prompts: Path | None, preserve: Path | None, *, quick: bool
) -> Callable[[Set[str]], Collection]:
    """By a method's needs what it collects with these files, as `merge` does; by none what all are measured on."""
    from loraclr.collect import collection_for

    asked: list[Set[str]] = [frozenset(), *(method.needs for method in chosen.values())]
    found = {frozenset(needs): parse.collection(collection_for(needs, quick=quick), prompts, preserve) for needs in asked}
    return lambda needs: found[frozenset(needs)]


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
    columns = {entry.label: (_measures(entry) if measured else {}, _costs(entry)) for entry in found.merged}
    title = f"{len(found.merged)} methods on {len(found.settings['inputs'])} adapters"
    table = _table(title, {label: measures | costs for label, (measures, costs) in columns.items()})
    if show.fits(table) or not measured:
        show.out.print(table, "")
    else:
        costs = _table("what they cost", {label: costs for label, (_, costs) in columns.items()})
        show.out.print(_table(title, {label: measures for label, (measures, _) in columns.items()}), "", costs, "")
    if scores := found.scores():
        names = list(dict.fromkeys(name for values in scores.values() for name in values))
        table = show.table("scores of pictures", *names, numbers=tuple(names), whole=("scores of pictures",))
        for label, values in scores.items():
            table.add_row(Text(label), *(f"{values[name].mean:.2f}" if name in values else "-" for name in names))
        show.out.print(table, "")
    if measured:
        said = "held out, fit: mean residual on each concept's features; 0 is the adapter's own behaviour, 1 the base's"
        show.out.print(said, style="dim", markup=False)
        said = f"strength: what is left of each adapter; cross-talk: how loud another still is beside it, unmerged {found.before:.2f}"
        show.out.print(said, style="dim", markup=False)
    if any(entry.lost for entry in found.merged):
        show.out.print("lost: the most that the cut to its rank took from a layer", style="dim", markup=False)
    for why, labels in found.reasons().items():
        show.out.print(Text(f"not merged by {', '.join(labels)}: {why}", style="yellow"))
    show.out.print(f"written: {output}", markup=False)


def _table(title: str, cells: Mapping[str, Mapping[str, str]]) -> Table:
    """Label -> column -> cell."""
    columns = tuple(next(iter(cells.values())))
    table = show.table("method", *columns, numbers=columns, title=title, whole=("method",))
    for label, row in cells.items():
        table.add_row(Text(label), *row.values())
    return table


def _measures(entry: Entry) -> dict[str, str]:
    talk = entry.measure.cross_talk.summary() if entry.measure else {}
    held_out, fit = (entry.measure.residual(kind) if entry.measure else math.nan for kind in ("held_out", "fit"))
    values = {"held out": held_out, "fit": fit, "strength": talk.get("strength", math.nan), "cross-talk": talk.get("after", math.nan)}
    return {name: _number(value) for name, value in values.items()}


def _costs(entry: Entry) -> dict[str, str]:
    low, high = entry.ranks
    return {
        "rank": str(low) if low == high else f"{low}-{high}",
        "lost": show.percent(entry.lost),
        "file": show.size(entry.size),
        "s": f"{entry.seconds:.1f}",
        "memory": "-" if math.isnan(entry.megabytes) else f"{entry.megabytes:.0f} MB",
    }


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
