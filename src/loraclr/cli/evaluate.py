"""`loraclr evaluate`: how well adapters keep their concepts, on any base, with the user's judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from loraclr.cli import parse, show
from loraclr.cli.base import SOURCE, BaseConfig, BaseDtype, Device, Offload, open_base
from loraclr.cli.options import Batch, Guidance, Size, Steps
from loraclr.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

    from loraclr.adapter import Adapter
    from loraclr.evaluate import Ensemble, Estimate, Evaluation, Subject, Variant
    from loraclr.pipeline import Pipeline

# What the table shows of a picture's values, in order.
METRICS = {
    "text": "text (CLIPScore)",
    "image": "image",
    "identity": "identity",
    "identity_any": "identity, any reference",
    "face_cosine": "cosine of faces",
    "face_distance": "distance of faces",
    "no_face": "no face",
    "leakage": "leakage",
}


def evaluate(
    base: Annotated[str, typer.Option(help=SOURCE, show_default=False)],
    lora: Annotated[
        list[str],
        typer.Option(
            metavar="[LABEL=]FILE[:SCALE]",
            help="Adapter to evaluate, or a folder with a CONCEPT.* file for each concept; repeatable, on equal prompts and seeds.",
            show_default=False,
        ),
    ],
    references: Annotated[
        Path, typer.Option(metavar="DIR", help="Pictures of the concept, or CONCEPT/ folders of them.", show_default=False)
    ],
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One prompt a line, {} or <TOK> for the concept's words.", show_default=False)
    ] = None,
    scenes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead: several people in each picture, a box for everybody.", show_default=False),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="JUDGE", help="clip:PATH_OR_ID or toyclip; not for scenes.", show_default=False)
    ] = None,
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for pictures and evaluation.json; made if missing."),
    ] = Path("evaluation"),
    face_judge: Annotated[
        str | None, typer.Option(metavar="JUDGE", help="arcface:FILE.onnx, dlib or toyface; without one, no identity.", show_default=False)
    ] = None,
    trigger: Annotated[
        list[str],
        typer.Option(metavar="[CONCEPT=]WORDS", help="The words that call a concept; repeatable.", show_default="as the files say"),
    ] = [],  # noqa: B006
    class_: Annotated[
        list[str],
        typer.Option(
            "--class",
            metavar="[CONCEPT=]WORDS",
            help="What kind of thing it is, such as woman, for the base and the text judge; repeatable.",
            show_default="last word of the call",
        ),
    ] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures per concept and prompt: seeds 0 to N-1.")] = 4,
    steps: Steps = 20,
    guidance: Guidance = 4.0,
    negative: Annotated[str, typer.Option(help="What to stay away from.")] = "",
    size: Size = None,
    batch: Batch = 4,
    device: Device = "auto",
    base_dtype: BaseDtype = "fp32",
    offload: Offload = False,
    base_config: BaseConfig = None,
    download: Annotated[bool, typer.Option("--download", help="Let clip: fetch a hub id that is not cached.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Text, image and identity alignment of adapters, beside the base without them, with intervals.

    Pictures of the same settings are kept from run to run: an interrupted evaluation goes on where it stopped.
    """
    asked = None if size is None else parse.size(size)
    if (prompts is None) == (scenes is None):
        raise UsageError("what to draw? give either --prompts, for one concept in each picture, or --scenes, for several")
    if (judge is None) == (scenes is None) or (scenes is not None and face_judge is None):
        raise UsageError("--prompts are judged by --judge, and by --face-judge if it is given; --scenes by --face-judge alone")

    from loraclr.evaluate import evaluate as run
    from loraclr.evaluate import evaluate_scenes, read_prompts, read_references, read_scenes
    from loraclr.judges import open_face_judge, open_picture_judge

    templates, shown = {} if prompts is None else read_prompts(prompts), read_references(references)
    pipeline = open_base(base, device, base_dtype, offload=offload, config=base_config)
    several: list[Ensemble] = []
    if scenes is not None:
        several = read_scenes(scenes, pipeline.check_settings(seeds=range(seeds), steps=steps, guidance=guidance, size=asked))
        shown = {name: pictures for name, pictures in shown.items() if any(name in scene.people for scene in several)}
    variants = _variants(lora, list(shown), pipeline)
    subjects = subjects_of(shown, variants, trigger, class_)
    eyes = None if judge is None else open_picture_judge(judge, download=download)
    face = None if face_judge is None else open_face_judge(face_judge)
    drawing: dict[str, Any] = {"steps": steps, "guidance": guidance, "negative": negative, "size": asked, "batch_size": batch}
    with show.progress(quiet=json) as tell:
        drawing |= {"output": output, "seeds": range(seeds), "progress": tell}
        if scenes is not None:
            assert face is not None
            found = evaluate_scenes(pipeline, variants, subjects, scenes=several, face=face, **drawing)
        else:
            assert eyes is not None
            found = run(pipeline, variants, subjects, prompts=templates, judge=eyes, face=face, **drawing)
    if json:
        show.as_json(found.report())
    else:
        _show(found, output / ("evaluation.json" if scenes is None else "scenes.json"))


def _variants(texts: Sequence[str], concepts: Sequence[str], pipeline: Pipeline) -> dict[str, Variant]:
    """Label -> adapter, or adapters by concept where a folder holds one file for each."""
    from loraclr.evaluate import Variant
    from loraclr.formats import load_adapter

    found: dict[str, Variant] = {}
    for text in texts:
        label, equals, rest = text.partition("=")
        path, scale = parse.lora(rest if equals and not Path(text).exists() else text)
        name = label if equals and not Path(text).exists() else parse.adapter_name(path)
        if name in found:
            raise UsageError(f"--lora: two adapters are called {name!r}; write LABEL=FILE")
        if path.is_dir() and not any((path / part / "adapter_config.json").is_file() for part in ("", "unet", "text_encoder")):
            files = {concept: _of_concept(path, concept) for concept in concepts}
            found[name] = Variant({concept: load_adapter(file, base=pipeline) for concept, file in files.items()}, scale)
        else:
            found[name] = Variant(load_adapter(path, base=pipeline), scale)
    return found


def _of_concept(folder: Path, concept: str) -> Path:
    from loraclr.formats.files import READ  # whatever else lies beside them: previews, notes

    named = [path for path in sorted(folder.iterdir()) if parse.adapter_name(path) == concept]
    files = [path for path in named if path.suffix in READ or path.is_dir()]
    if len(files) != 1:
        seen = ", ".join(path.name for path in files) or "no file"
        raise UsageError(f"--lora {folder}: {seen} for concept {concept}; a folder needs one adapter named after each concept")
    return files[0]


def subjects_of(
    shown: Mapping[str, Sequence[Image]], variants: Mapping[str, Variant], triggers: Sequence[str], classes: Sequence[str]
) -> list[Subject]:
    from loraclr.evaluate import Subject, call_of, noun_of

    calls, nouns = parse.by_name(triggers, list(shown), "--trigger"), parse.by_name(classes, list(shown), "--class")
    subjects, problems = [], []
    for name, pictures in shown.items():
        own = ((variant.of(name), not _is_one(variant.adapters) or len(shown) == 1) for variant in variants.values())
        call = calls.get(name) or next(filter(None, (call_of(adapter, name, alone=alone) for adapter, alone in own)), None)
        noun = nouns.get(name) or (noun_of(call) if call else None)
        if call is None:
            problems.append(f"no file says which words call {name}: --trigger {name}=WORDS")
        elif noun is None:
            problems.append(f"what kind of thing is {name}, called by {call!r}? --class {name}=WORDS")
        else:
            subjects.append(Subject(name, call, noun, pictures))
    if problems:
        raise UsageError("; ".join(problems))
    return subjects


def _is_one(adapters: Adapter | Mapping[str, Adapter]) -> bool:
    return not isinstance(adapters, Mapping)


def _show(found: Evaluation, written: Path) -> None:
    count = len(found.rows[-1].concepts)
    show.out.print(_metrics(found, f"{len(found.settings['concepts'])} concept(s), {count} pictures a row"), "")
    if found.settings["groups"]:
        show.out.print(_groups(found), "")
    names = [concept["name"] for concept in found.settings["concepts"]]
    for row in found.rows:
        if row.confusion is not None:
            passes = show.table(f"{row.label}: asked", *names, numbers=tuple(names), title="share that passes for each concept")
            for name, rates in zip(names, row.confusion, strict=True):
                passes.add_row(name, *(f"{rate:.2f}" for rate in rates))
            show.out.print(passes, "")
    limit = found.settings["limit"]
    if limit is not None:
        sign = ">=" if limit["kind"] == "cosine" else "<="
        said = f"{found.settings['face_judge']}: one person at {limit['kind']} {sign} {limit['value']:g}"
        show.out.print(said, style="dim", markup=False)
    show.out.print("intervals: 95 % bootstrap over concepts, prompts and seeds; differences of the same ones", style="dim", markup=False)
    kept = f", {found.kept} were there" if found.kept else ""
    show.out.print(f"drawn: {found.drawn} pictures{kept}\nwritten: {written}", markup=False)


def _metrics(found: Evaluation, title: str) -> Table:
    """A block for each metric, a line for each row, with its differences to the base and to the first adapter."""
    from loraclr.evaluate.evaluation import REFERENCES

    base, first, *others = [row.label for row in found.rows if row.label != REFERENCES]
    against = [base, first] if others else [base]
    differences = {(of, to): estimates for of, to, estimates in found.differences()}
    estimates = {row.label: row.estimates() for row in found.rows}
    columns = ["mean", "95 %", *(f"minus {label}" for label in against)]
    table = show.table("", *columns, numbers=tuple(columns), title=title)
    names = METRICS | {metric: metric for metric in estimates[first] if "present, " in metric}
    for metric, name in names.items():
        if any(metric in values for values in estimates.values()):
            table.add_row(Text(name, style="bold"))
        for label, values in estimates.items():
            if metric in values and values[metric].count:
                own = values[metric]
                less = [differences.get((label, to), {}).get(metric) for to in against]
                cells = ["" if one is None or not one.count else f"{one.mean:+.3f} {_range(one, '+.3f')}" for one in less]
                table.add_row(Text(f"  {label}"), f"{own.mean:.3f}", _range(own, ".3f"), *cells)
    return table


def _groups(found: Evaluation) -> Table:
    """Means by the prompts' groups."""
    means = {row.label: row.by_group(found.settings["groups"]) for row in found.rows[1:]}
    groups = list(dict.fromkeys(group for rows in means.values() for group in rows))
    table = show.table("", *groups, numbers=tuple(groups), title="means by group")
    for metric in ("text", "image", "identity"):
        lines = [(label, rows) for label, rows in means.items() if any(metric in values for values in rows.values())]
        if lines:
            table.add_row(Text(METRICS[metric], style="bold"))
        for label, rows in lines:
            table.add_row(Text(f"  {label}"), *(f"{rows[group][metric]:.3f}" for group in groups))
    return table


def _range(value: Estimate, form: str) -> str:
    return escape(f"[{value.low:{form}}, {value.high:{form}}]")
