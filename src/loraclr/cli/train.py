"""`loraclr train`: a folder of pictures in, one adapter file out. `loraclr recipes`: what can be trained, with all settings."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraclr.cli import parse, show
from loraclr.cli.base import SOURCE, BaseConfig, Device, open_base
from loraclr.cli.methods import present, record
from loraclr.errors import UsageError

if TYPE_CHECKING:
    from loraclr.adapter import Adapter


def train(
    pictures: Annotated[Path, typer.Argument(metavar="DIR", help="Pictures of one concept, with NAME.txt and masks/NAME.png if at hand.")],
    base: Annotated[str, typer.Option(help=SOURCE, show_default=False)],
    trigger: Annotated[str, typer.Option(metavar="WORD", help="The rare word that will call the concept.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write; its folder must exist.", show_default=False)],
    recipe: Annotated[str, typer.Option(help="A recipe, or RECIPE:PRESET; see 'loraclr recipes'.")] = "lora",
    class_word: Annotated[
        str | None, typer.Option("--class", metavar="WORD", help="What it is: woman, dog, chair.", show_default=False)
    ] = None,
    class_pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures of the class, for prior preservation.", show_default="the base draws them")
    ] = None,
    template: Annotated[
        list[str],
        typer.Option(
            metavar="PROMPT", help="For pictures without a caption, {} is the concept; repeatable.", show_default="the recipe's own"
        ),
    ] = [],  # noqa: B006
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of the recipe; repeatable.", show_default=False)
    ] = [],  # noqa: B006
    beside: Annotated[
        list[Path], typer.Option(metavar="FILE", help="An orthogonal adapter to be merged with; repeatable.", show_default=False)
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    sample_every: Annotated[
        int | None, typer.Option(min=0, help="Steps between sample pictures; 0: none.", show_default="a quarter")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    format: Annotated[
        Literal["kohya", "diffusers", "peft", "edlora", "embedding"] | None,
        typer.Option(help="Names and layout of the output.", show_default="edlora for .pth, else kohya, or embedding for a token alone"),
    ] = None,
    dtype: Annotated[Literal["fp16", "fp32"], typer.Option(help="Precision of the output.")] = "fp16",
    device: Device = "auto",
    base_config: BaseConfig = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where an unfinished training is found.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing FILE.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train one adapter. Stopped or killed, the same command goes on where it was.

    Loss curve, sample pictures and the checkpoint appear in FILE.train/.
    Example: loraclr train references/rhea --base toy/base --recipe edlora:toybox --trigger rhea --class woman --output rhea.pth
    """
    form = format or ("edlora" if output.suffix in parse.ENDINGS["edlora"] else "kohya")
    parse.hold_output(output, form, [], force=force, more=[_tokens(output)])

    import torch

    from loraclr.formats import embedding, load_adapter, save_adapter
    from loraclr.train import RECIPES, make_recipe, parameters
    from loraclr.train import train as run

    known = RECIPES.get(recipe.partition(":")[0])
    chosen = make_recipe(recipe, **parse.settings(set_, {row.name: row.type for row in parameters(known)} if known else {}))
    if chosen.only_tokens and format is None and form == "kohya":
        form = "embedding"
    if chosen.only_tokens != (form == "embedding") and (chosen.only_tokens, form) != (True, "edlora"):
        made = "a learned token and no layers; leave --format out" if chosen.only_tokens else "layers; choose another --format"
        raise UsageError(f"--format {form}: recipe {chosen.name!r} makes {made}")
    if chosen.whole_layers and form != "kohya":
        raise UsageError(f"--format {form} cannot hold whole matrices; end the output in .safetensors, or --set rank=8")
    others = [load_adapter(path) for path in beside]
    work = output.with_name(f"{output.name}.train")
    pipeline = open_base(base, device, "fp32", offload=False, config=base_config)
    layers = len(pipeline.cross_attention_layers)
    if form == "embedding" and chosen.layerwise and layers != len(embedding.XTI):
        raise UsageError(
            f"--output {output}: a token with {layers} layers has no place in embedding files, which have 16; end its name in .pth"
        )
    with show.progress(quiet=json) as tell:
        adapter = run(
            pictures,
            base=pipeline,
            recipe=chosen,
            trigger=trigger,
            class_word=class_word,
            class_pictures=class_pictures,
            templates=template,
            beside=others,
            name=output.name if form == "peft" else output.stem,
            seed=seed,
            work=work,
            restart=restart,
            checkpoint_every=checkpoint_every,
            sample_every=sample_every,
            progress=tell,
        )
    written = save_adapter(adapter, output, format=form, dtype={"fp16": torch.float16, "fp32": torch.float32}[dtype])
    (work / "checkpoint.pt").unlink(missing_ok=True)
    _show(adapter, written, work, form, json=json)


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Only this one, with its description.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the training recipes, their presets and their settings."""
    from loraclr.train import RECIPES, make_recipe

    if name is not None and name not in RECIPES:
        make_recipe(name)  # says what is wrong with the name, unless it has a preset
        name = name.partition(":")[0]
    chosen: list[Any] = [RECIPES[name]] if name else list(RECIPES.values())
    if json:
        show.as_json([record(recipe) for recipe in chosen])
        return
    if name is None:
        overview = show.table("recipe", "what it trains", "presets")
        for recipe in chosen:
            overview.add_row(recipe.name, recipe.summary, " ".join(recipe.presets))
        show.out.print(overview)
        show.out.print("\nloraclr recipes RECIPE shows its settings", style="dim", markup=False)
        return
    present(chosen[0], described=True)


def _tokens(output: Path) -> Path:
    """Where learned tokens go that the format does not hold."""
    return output.with_name(output.name.removesuffix(".safetensors") + ".tokens.safetensors")


def _show(adapter: Adapter, written: Path, work: Path, form: str, *, json: bool) -> None:
    about = json_.loads(adapter.metadata["loraclr.training"])
    tokens = _tokens(written) if adapter.tokens and form not in ("edlora", "embedding") else None
    if json:
        shown = {"output": str(written), "tokens": None if tokens is None else str(tokens), "work": str(work)}
        show.as_json(shown | {"call": adapter.triggers[0]} | about)
        return
    show.out.print(f"written: {written}\ncalled by: {adapter.triggers[0]}", markup=False)
    if tokens is not None:
        show.out.print(f"learned tokens: {tokens} (keep it beside the file)", markup=False)
    lost = f", {about['lost']:.1%} of the change lost to the rank" if "lost" in about else ""
    show.out.print(f"loss: {about['loss']:.4f}{lost}; curve and samples: {work}", markup=False)
