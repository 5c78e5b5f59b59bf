"""`loraclr merge`: adapter files in, one adapter file and its receipt out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from loraclr.cli import parse, show
from loraclr.cli.base import SOURCE, BaseConfig, BaseDtype, Device, Offload, open_base
from loraclr.cli.options import Allow, BlockWeights, CollectionSeed, FitPrompts, Preserve, Quick, Scratch, Triggers, Weights
from loraclr.errors import UsageError

if TYPE_CHECKING:
    from loraclr.merge import LayerReceipt, MergeResult
    from loraclr.methods import Method


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Adapter files, or PEFT folders.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="OUT", help="The file to write; its folder must exist.", show_default=False)],
    base: Annotated[str | None, typer.Option(help=f"{SOURCE} Weight-only methods need none.", show_default=False)] = None,
    method: Annotated[str, typer.Option(help="A method, or METHOD:PRESET; see 'loraclr methods'.")] = "loraclr",
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method; repeatable.", show_default=False)
    ] = [],  # noqa: B006
    weight: Weights = [],  # noqa: B006
    block_weights: BlockWeights = [],  # noqa: B006
    trigger: Triggers = [],  # noqa: B006
    rank: Annotated[int | None, typer.Option(min=1, help="The most per layer.", show_default="what the solution needs")] = None,
    format: Annotated[
        Literal["kohya", "diffusers", "peft", "edlora", "diff", "bundle"], typer.Option(help="Names and layout of the output.")
    ] = "kohya",
    dtype: Annotated[Literal["fp16", "fp32"], typer.Option(help="Precision of the output.")] = "fp16",
    seed: CollectionSeed = 0,
    quick: Quick = False,
    prompts: FitPrompts = None,
    preserve: Preserve = None,
    allow: Allow = [],  # noqa: B006
    no_sources: Annotated[bool, typer.Option("--no-sources", help="Leave out of the file what it was merged from.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Report residuals also for methods that need no features.")] = False,
    device: Device = "auto",
    base_dtype: BaseDtype = "fp32",
    offload: Offload = False,
    base_config: BaseConfig = None,
    scratch: Scratch = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Merge adapters into one file, with a receipt of how well every concept survived.

    Example: loraclr merge rhea.safetensors theo.safetensors --base toy/base --output both.safetensors
    """
    parse.hold_output(output, format, companions(output), force=force)
    names = [parse.adapter_name(path) for path in files]
    weights = parse.weights(weight, names)
    blocks = parse.block_weights(block_weights)
    calls = dict(parse.pair(text, "--trigger") for text in trigger)

    import torch

    from loraclr.collect import collection_for
    from loraclr.merge import merge as run
    from loraclr.methods import find_method, make_method, parameters

    known = parameters(find_method(method.partition(":")[0]))
    solver = make_method(method, **parse.settings(set_, {row.name: row.type for row in known}))
    _check_read(solver, prompts, preserve, quick=quick, measure=measure)
    collection = parse.collection(collection_for(solver.needs, quick=quick), prompts, preserve)
    pipeline = None if base is None else open_base(base, device, base_dtype, offload=offload, config=base_config)
    with show.progress(quiet=json) as tell:
        result = run(
            files,
            base=pipeline,
            method=solver,
            weights=weights,
            block_weights=blocks,
            calls=calls,
            rank=rank,
            seed=seed,
            collection=collection,
            measure=measure,
            allow=allow,
            format=format,
            name=output.name if format == "peft" else output.stem,
            progress=tell,
            scratch=scratch or output.absolute().parent,
        )
    written = result.save(output, format=format, dtype={"fp16": torch.float16, "fp32": torch.float32}[dtype], sources=not no_sources)
    show_result(result, written, json=json)


def _check_read(solver: Method, prompts: Path | None, preserve: Path | None, *, quick: bool, measure: bool) -> None:
    """Nothing is given of prompts and passes that nobody reads."""
    learns = measure or bool({"statistics", "sample", "predictions"} & solver.needs)
    if prompts is not None and not learns:
        raise UsageError(f"--prompts {prompts}: {solver.name} learns from no prompts; leave it out, or add --measure")
    if quick and not learns:
        raise UsageError(f"--quick: {solver.name} runs nothing that could be quicker; leave it out, or add --measure")
    if preserve is not None and "preserve" not in solver.needs:
        raise UsageError(f"--preserve {preserve}: {solver.name} with these parameters preserves no prompts; leave it out")


def companions(output: Path) -> list[Path]:
    """What a merge writes beside its output: the receipt and the learned tokens."""
    return [output.with_name(f"{output.name}.json"), output.with_name(output.name.removesuffix(".safetensors") + ".tokens.safetensors")]


def show_result(result: MergeResult, written: Path, *, json: bool) -> None:
    """What became of a merge that was written, as tables or as the whole receipt."""
    from loraclr.merge import FEW, mean_residual

    sidecar = next((path for path in companions(written)[1:] if path.exists()), None)
    if json:
        show.as_json({"output": str(written), "tokens": None if sidecar is None else str(sidecar), **result.receipt()})
        return
    columns = ("layers", "rank", "lost", "fit", "held out", "hinge")
    stages = show.table("stage", *columns, numbers=columns, title=f"{result.method}, {len(result.inputs)} adapters")
    for stage in sorted({layer.stage for layer in result.layers}):
        layers = [layer for layer in result.layers if layer.stage == stage]
        ranks = sorted({layer.rank for layer in layers})
        stages.add_row(
            _stage_name([layer.layer for layer in layers]),
            str(len(layers)),
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
            show.percent(max(layer.lost for layer in layers)),
            _residual(mean_residual(layers, "fit")),
            _residual(mean_residual(layers, "held_out")),
            _hinge(layers),
        )
    numbers = ("weight", "fit", "held out", "strength")
    concepts = show.table("concept", "called by", *numbers, numbers=numbers)
    strengths = result.cross_talk.after.diagonal().tolist() if result.cross_talk else [math.nan] * len(result.inputs)
    for entry, strength in zip(result.inputs, strengths, strict=True):
        name = str(entry["name"])
        residuals = (_residual(result.mean_residual(kind, concept=name)) for kind in ("fit", "held_out"))
        share = "-" if math.isnan(strength) else f"{strength:.2f}"
        concepts.add_row(name, Text(str(entry["call"] or "not stated")), f"{entry['weight']:g}", *residuals, share)
    show.out.print(stages, "", concepts, "")
    if any(layer.residuals for layer in result.layers):
        show.out.print("fit, held out: mean residual; 0 is the adapter's own behaviour, 1 the base's", style="dim", markup=False)
        if result.parameters.get("choose") == "held_out":
            show.out.print("held out: not unseen, ridge, prior and preservation were chosen on these prompts", style="dim", markup=False)
        said = "what is left of each adapter; how loud others are on it is in the receipt"
        if result.cross_talk is None:
            said = f"not measured for more than {FEW} adapters; loraclr compare does, if it may take long"
        show.out.print(f"strength: {said}", style="dim", markup=False)
    advised = [layer for layer in result.layers if layer.advice]
    for layer in advised[:3]:
        show.out.print(f"{layer.layer}: {layer.advice}", style="yellow", markup=False)
    if len(advised) > 3:
        show.out.print(f"and advice on {len(advised) - 3} more layers in the receipt", style="yellow")
    if peak := result.memory.get("peak"):
        show.out.print(f"peak memory {peak / 1e9:.1f} GB, {(result.memory['disk'] or 0) / 1e9:.1f} GB on disk", style="dim", markup=False)
    show.out.print(f"written: {written}\nreceipt: {written.name}.json", markup=False)
    if result.prompt:
        show.out.print(f"prompt: {result.prompt}", markup=False)
    if sidecar is not None:
        show.out.print(f"learned tokens: {sidecar} (keep it beside the merged file)", markup=False)


def _stage_name(layers: Sequence[str]) -> str:
    from loraclr.adapter import stage_of

    stages = {stage_of(name) for name in layers}
    titles = {"text": "text encoder", "keys": "cross-attention keys and values", "spatial": "other layers"}
    return titles[stages.pop()] if len(stages) == 1 else "all layers"


def _hinge(layers: Sequence[LayerReceipt]) -> str:
    """In how many layers the hinge is active, and in how many that is not known."""
    told = [layer.diagnostics["hinge_active"] for layer in layers if "hinge_active" in layer.diagnostics]
    unknown = sum(layer.status == "undecided" for layer in layers)
    without = sum(layer.status == "refitted" for layer in layers)  # by a further round, which knows no hinge
    known = f"{sum(map(bool, told))} of {len(layers) - unknown - without}" if told else ""
    return ", ".join(part for part in (known, f"{unknown} undecided" if unknown else "") if part) or "-"


def _residual(mean: float) -> str:
    return "-" if math.isnan(mean) else f"{mean:.3f}"
