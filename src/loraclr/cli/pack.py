"""`loraclr pack`: statistics of concepts kept one by one, so that any of them are merged later without the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from loraclr import disk
from loraclr.cli import parse, show
from loraclr.cli.base import SOURCE, BaseConfig, BaseDtype, Device, Offload, open_base
from loraclr.cli.options import BlockWeights, CollectionSeed, FitPrompts, Preserve, Scratch, Triggers

if TYPE_CHECKING:
    from loraclr.pack import Pack

app = typer.Typer(help="Concepts kept with their statistics, to merge any of them without collecting again.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(metavar="PACK", help="The pack's folder.", show_default=False)]
Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Adapter files, or PEFT folders.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("create")
def create(
    files: Files,
    base: Annotated[str, typer.Option(help=SOURCE, show_default=False)],
    output: Annotated[Path, typer.Option(metavar="PACK", help="The folder to make.", show_default=False)],
    trigger: Triggers = [],  # noqa: B006
    seed: CollectionSeed = 0,
    prompts: FitPrompts = None,
    preserve: Preserve = None,
    device: Device = "auto",
    base_dtype: BaseDtype = "fp32",
    offload: Offload = False,
    base_config: BaseConfig = None,
    scratch: Scratch = None,
    json: AsJson = False,
) -> None:
    """Make a pack of adapters. Stopped or killed, the same command goes on with those that are missing.

    Example: loraclr pack create rhea.safetensors theo.safetensors --base toy/base --output people
    """
    calls = dict(parse.pair(text, "--trigger") for text in trigger)
    parse.hold(disk.reserved(output))

    from loraclr.collect import Collection
    from loraclr.pack import Pack

    collection = parse.collection(Collection(seed=seed), prompts, preserve)
    pipeline = open_base(base, device, base_dtype, offload=offload, config=base_config)
    with show.progress(quiet=json) as tell:
        made = Pack.create(output, files, base=pipeline, calls=calls, collection=collection, progress=tell, scratch=scratch)
    _show(made, json=json)


@app.command("add")
def add(
    pack: Folder,
    files: Files,
    base: Annotated[str | None, typer.Option(help="The base of the pack.", show_default="where it was when the pack was made")] = None,
    trigger: Triggers = [],  # noqa: B006
    device: Device = "auto",
    base_dtype: BaseDtype = "fp32",
    offload: Offload = False,
    base_config: BaseConfig = None,
    scratch: Scratch = None,
    json: AsJson = False,
) -> None:
    """Add adapters. The files of those that are there stay as they are."""
    calls = dict(parse.pair(text, "--trigger") for text in trigger)

    from loraclr.pack import Pack

    opened = Pack.open(pack)
    pipeline = open_base(base or opened.base, device, base_dtype, offload=offload, config=base_config)
    with show.progress(quiet=json) as tell:
        opened = opened.add(files, base=pipeline, calls=calls, progress=tell, scratch=scratch)
    _show(opened, json=json)


@app.command("remove")
def remove(
    pack: Folder,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Concepts, as `loraclr pack show` names them.", show_default=False)],
    json: AsJson = False,
) -> None:
    """Take concepts out. The files of the others stay as they are."""
    from loraclr.pack import Pack

    _show(Pack.open(pack).remove(names), json=json)


@app.command("show")
def show_(pack: Folder, json: AsJson = False) -> None:
    """Say what is in a pack."""
    from loraclr.pack import Pack

    _show(Pack.open(pack), json=json)


@app.command("build")
def build(
    pack: Folder,
    output: Annotated[Path, typer.Option(metavar="OUT", help="The file to write; its folder must exist.", show_default=False)],
    method: Annotated[str, typer.Option(help="A method that learns from statistics alone, or METHOD:PRESET.")] = "loraclr",
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method, such as ridge; repeatable.", show_default=False),
    ] = [],  # noqa: B006
    weight: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]NUMBER", help="Strength of a concept, by name or in the order of names; repeatable.", show_default="1"
        ),
    ] = [],  # noqa: B006
    block_weights: BlockWeights = [],  # noqa: B006
    rank: Annotated[int | None, typer.Option(min=1, help="The most per layer.", show_default="what the solution needs")] = None,
    format: Annotated[Literal["kohya", "diffusers", "peft", "edlora"], typer.Option(help="Names and layout of the output.")] = "kohya",
    dtype: Annotated[Literal["fp16", "fp32"], typer.Option(help="Precision of the output.")] = "fp16",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Merge the concepts of a pack into one file, with a receipt. Needs no base.

    Example: loraclr pack build people --output people.safetensors
    """
    from loraclr.cli import merge as merging

    parse.hold_output(output, format, merging.companions(output), force=force)

    import torch

    from loraclr.methods import find_method, make_method, parameters
    from loraclr.pack import Pack

    known = parameters(find_method(method.partition(":")[0]))
    chosen = parse.settings(set_, {row.name: row.type for row in known})
    make_method(method, **chosen)  # what is wrong with it is said before anything is read
    opened = Pack.open(pack)
    numbers, blocks = parse.weights(weight, opened.concepts), parse.block_weights(block_weights)
    with show.progress(quiet=json) as tell:
        result = opened.build(
            method=method,
            parameters=chosen,
            weights=None if numbers is None else dict(zip(opened.concepts, numbers, strict=True)),
            block_weights=blocks,
            rank=rank,
            name=output.name if format == "peft" else output.stem,
            progress=tell,
        )
    written = result.save(output, format=format, dtype={"fp16": torch.float16, "fp32": torch.float32}[dtype])
    merging.show_result(result, written, json=json)


def _show(pack: Pack, *, json: bool) -> None:
    rows = []
    for name in pack.concepts:
        held, files = pack.held(name), [one for one in pack.files if one.concept == name]
        size = sum(one.path.stat().st_size for one in files)
        rows.append({"name": name, "call": held.about["call"], "layers": len(held.adapted), "bytes": size, **held.about["input"]})
    whole = sum(one.path.stat().st_size for one in pack.files)
    if json:
        show.as_json(
            {"pack": pack.path, "base": pack.files[0].about["base"], "bytes": whole, "concepts": rows, "collection": vars(pack.collection)}
        )
        return
    concepts = show.table("concept", "called by", "layers", "size", "file", numbers=("layers", "size"))
    for row in rows:
        words = Text(str(row["call"])), str(row["layers"]), show.size(int(row["bytes"])), Text(str(row["file"] or "-"))
        concepts.add_row(Text(str(row["name"])), *words)
    show.out.print(concepts, "")
    show.out.print(f"{pack.path}: {len(rows)} concepts, {show.size(whole)}, on {pack.base}", markup=False)
    show.out.print(f"next: loraclr pack build {pack.path} --output merged.safetensors", markup=False)
