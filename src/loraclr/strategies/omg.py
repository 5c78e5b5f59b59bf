"""OMG: the base draws the layout, then each adapter's noise is blended in inside its mask."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraclr.conditioning import conditioned
from loraclr.errors import UsageError
from loraclr.strategies.attention import SIDE, Watch, masks, saliency, watched
from loraclr.strategies.cast import Cast
from loraclr.strategies.scene import Scene, Script, check_maps, check_regions, check_words, in_box, latent_size


@dataclass(frozen=True)
class Omg:
    """Two-stage noise blending after OMG (Kong et al. 2024, arXiv 2403.10983).

    Stage 1 draws the prompt with plain nouns and finds where they are. Stage 2 starts from the same noise; once the base has
    taken away `start` of it (15 of 50 steps in the released code), each adapter's prediction, conditional and unconditional, replaces
    the base's inside its mask.

    The released code finds masks with a detector and a segmenter on the finished layout. Here they are the regions' boxes, or the
    cross-attention of the nouns averaged over stage 1, which tells two of one class apart by their places in the prompt. It also
    copies stage 1's attention maps into stage 2's base passes; these have the same prompt and noise, so that nothing would change
    before `start`, and what would after it is left out.
    """

    name: ClassVar[str] = "omg"

    start: float = 0.3
    threshold: float = 0.3  # of a noun's largest attention, for masks from attention

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1 or not 0 <= self.threshold < 1:
            raise UsageError(f"omg: start {self.start:g} and threshold {self.threshold:g} are shares; give 0 or more and less than 1")

    def check(self, cast: Cast, scene: Scene) -> None:
        check_regions(cast.parts, scene.regions)
        if not scene.regions:
            check_words(scene.prompt, cast.parts)
            check_maps(cast, scene)
        Script.of(cast, scene)

    def draw(self, cast: Cast, scene: Scene) -> Tensor:
        script, layers = Script.of(cast, scene), cast.pipeline.cross_attentions
        total = 1 if scene.regions else 2

        def run(stage: int) -> Tensor:
            callback = scene.callback
            tell = None if callback is None else lambda step, steps: callback(stage * steps + step, total * steps)
            return script.drawn(cast, scene, callback=tell)

        where: Callable[[int, tuple[int, int]], Tensor]
        if scene.regions:
            where = lambda number, size: in_box(scene.regions[number], size)  # noqa: E731
        else:
            seen = self._look(cast, scene, script, lambda: run(0))
            where = lambda number, size: masks(seen, size, threshold=self.threshold, exclusive=True)[number]  # noqa: E731
        layered = any(states.ndim == 4 for states in script.parts)
        with (
            conditioned(layers, latent=latent_size(cast, scene)) if layered else nullcontext(),
            cast.blended(script.parts, where, since=self.start),
        ):
            return run(total - 1)

    def _look(self, cast: Cast, scene: Scene, script: Script, stage: Callable[[], Tensor]) -> Tensor:
        """(parts, h, w): attention to each part's noun, over all steps of stage 1."""
        watch = Watch(latent_size(cast, scene), SIDE)
        with watched(cast.pipeline.cross_attentions, watch):
            stage()
        maps = watch.take()  # steps and layers are averaged alike
        return torch.stack([saliency(maps[-1], script.spots[0][number]) for number in range(len(cast.parts))])
