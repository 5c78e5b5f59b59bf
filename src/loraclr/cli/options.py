"""Options that several commands share: one name, one help text, wherever they stand. Those of the base model are in `base.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Triggers = Annotated[
    list[str],
    typer.Option(metavar="NAME=WORDS", help="The words that call an adapter in a prompt; repeatable.", show_default="as the files say"),
]
Weights = Annotated[
    list[str],
    typer.Option(metavar="[NAME=]NUMBER", help="Strength of an adapter, by its file's name or in order; repeatable.", show_default="1"),
]
BlockWeights = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=N,N,...",
        help="Strength of an adapter by block: BASE, then each attention block in the order down, mid, up "
        "(17 numbers for Stable Diffusion 1); repeatable.",
        show_default=False,
    ),
]
Allow = Annotated[
    list[str],
    typer.Option(metavar="CHECK", help="Merge in spite of distilled, edit or prediction; repeatable.", show_default=False),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="A fifth of the passes through the UNet, no further round, bfloat16 if the device can: for large models without GPU.",
    ),
]
FitPrompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="One prompt a line to learn from, {} or <TOK> for the concept's words; those under [held out] only judge.",
        show_default="prompts of people",
    ),
]
Preserve = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="One prompt a line without any concept: what is to stay as it is.",
        show_default="prompts of people, two together, and a few things",
    ),
]
CollectionSeed = Annotated[int, typer.Option(help="Of the noise that features are collected on.")]
SCRATCH = "Where that goes which does not fit into memory; nothing stays."
Scratch = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help=SCRATCH, show_default="beside what is written"),
]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(help="How strictly prompts are followed; 1 switches guidance off.")]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="Height and width in pixels.", show_default="the model's own")]
Batch = Annotated[int, typer.Option(help="Pictures drawn at once.")]
