"""What a strategy is asked for: one picture, and how a strategy answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from loraclr.conditioning import Refine, Region, box_cells
from loraclr.errors import PipelineError, UsageError
from loraclr.pipeline import GUIDANCE, STEPS
from loraclr.strategies.attention import SIDE
from loraclr.strategies.cast import Cast
from loraclr.strategies.words import Part, Words


@dataclass(frozen=True)
class Scene:
    """One picture. Without regions the prompt says who is where to be seen; with them, region k is part k's: its prompt and its place."""

    prompt: str
    seed: int
    size: tuple[int, int]  # pixels
    steps: int = STEPS
    guidance: float = GUIDANCE
    negative: str = ""
    regions: tuple[Region, ...] = ()
    scheduler: str | None = None
    callback: Callable[[int, int], None] | None = field(default=None, compare=False)


class Strategy(Protocol):
    """Sampling with several adapters that were never merged. Fields of the dataclass are its hyper-parameters."""

    name: ClassVar[str]

    def check(self, cast: Cast, scene: Scene) -> None:
        """Raises UsageError or PipelineError for all that `draw` would: words, parts and regions that do not go together, or the size."""

    def draw(self, cast: Cast, scene: Scene) -> Tensor:
        """(1, channels, h, w) latents."""


@dataclass(frozen=True, eq=False)
class Script:
    """A scene encoded: what the base and each part read, and where in each text each part's words stand."""

    base: Tensor  # (1, T, dim)
    negative: Tensor | None  # (1, T, dim), None without guidance
    parts: tuple[Tensor, ...]  # (halves, T, dim) or (halves, L, T, dim) each; the last half is the prompt's
    spots: tuple[dict[int, list[int]], ...]  # of the base's text, then of each part's

    @staticmethod
    def of(cast: Cast, scene: Scene) -> Script:
        """The base reads the prompt with nouns for all. Part k reads region k's prompt, or the prompt with its own words only."""
        pipeline, words, guided = cast.pipeline, Words.of(scene.prompt, cast.parts), scene.guidance > 1
        plain = words.said(cast.parts, None)
        spots, states = [_within(plain.spots(pipeline.token_count), pipeline.text_length)], []
        for number in range(len(cast.parts)):
            own = Words.of(scene.regions[number].prompt, cast.parts) if scene.regions else words.said(cast.parts, number)
            negative = scene.regions[number].negative if scene.regions else scene.negative
            with cast.speaking(number):
                spots.append(_within(own.spots(pipeline.token_count), pipeline.text_length))
                states.append(pipeline.encode([negative, own.text] if guided else [own.text]))
        return Script(pipeline.encode([plain.text]), pipeline.encode([scene.negative]) if guided else None, tuple(states), tuple(spots))

    def drawn(
        self, cast: Cast, scene: Scene, *, refine: Refine | None = None, callback: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """The base's text through the sampler, with whatever hooks are in place: (1, channels, h, w) latents."""
        return cast.pipeline.denoise(
            self.base,
            negative=self.negative,
            seeds=[scene.seed],
            steps=scene.steps,
            size=scene.size,
            guidance=scene.guidance,
            scheduler=scene.scheduler,
            refine=refine,
            callback=callback,
        )


def check_words(prompt: str, parts: Sequence[Part], *, where: str = "the prompt") -> None:
    """Raises UsageError if some part is not called, or without a noun."""
    if missing := Words.of(prompt, parts).missing(parts):
        said = ", ".join(f"{part.call or 'no words'!r} ({part.name})" for part in missing)
        raise UsageError(f"{where} {prompt!r} does not hold {said}; write an adapter's words where it is to be seen")
    for part in parts:
        part.plain  # noqa: B018


def check_regions(parts: Sequence[Part], regions: Sequence[Region]) -> None:
    if regions and len(regions) != len(parts):
        raise UsageError(f"{len(parts)} adapters and {len(regions)} regions; give one region for each adapter, in their order, or none")


def in_box(region: Region, size: tuple[int, int]) -> Tensor:
    """(h, w) bool: the cells that lie wholly inside."""
    inside = torch.zeros(size[0] * size[1], dtype=torch.bool)
    inside[box_cells(region.box, *size)] = True
    return inside.view(size)


def latent_size(cast: Cast, scene: Scene) -> tuple[int, int]:
    scale = int(cast.pipeline.pipe.vae_scale_factor)
    return scene.size[0] // scale, scene.size[1] // scale


def check_maps(cast: Cast, scene: Scene) -> None:
    """Raises PipelineError where no cross-attention map is as coarse as those that are read."""
    deepest = len(cast.pipeline.unet.config.block_out_channels) - 1  # type: ignore[union-attr,arg-type]
    halvings = 0
    for path in cast.pipeline.cross_attention_layers:
        block, number = path.split(".")[:2]
        halvings = max(halvings, deepest if block == "mid_block" else int(number) if block == "down_blocks" else deepest - int(number))
    side = -(-min(latent_size(cast, scene)) // (1 << halvings))
    if side > SIDE:
        raise PipelineError(
            f"the coarsest attention map of a picture of {scene.size[0]}x{scene.size[1]} has {side} cells a side, and masks are read from "
            f"those of {SIDE} or less; draw it smaller, or give each adapter a region"
        )


def _within(spots: dict[int, list[int]], length: int) -> dict[int, list[int]]:
    """What is cut from a prompt that is too long attends to nothing; the end mark stands last."""
    kept = {owner: [spot for spot in found if spot < length - 1] for owner, found in spots.items()}
    if not all(kept.values()):
        raise UsageError(f"an adapter's words stand beyond the {length} tokens that the text encoder reads; shorten the prompt")
    return kept
