"""CLoRA: test-time attention contrast, then each adapter's noise where its own words attend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loraclr.conditioning import Refine, conditioned
from loraclr.errors import UsageError
from loraclr.strategies.attention import SIDE, Watch, masks, saliency, watched
from loraclr.strategies.cast import Cast
from loraclr.strategies.scene import Scene, Script, check_maps, check_regions, check_words, in_box, latent_size


@dataclass(frozen=True)
class Clora:
    """CLoRA (Meral et al. 2024, arXiv 2403.19776): every adapter and the base read the prompt, each with its own words in place of nouns.

    Before a step the latents follow the gradient of a contrast between attention maps: those of one concept's words, in all
    readings, are to be alike, those of different concepts unlike. Then each adapter predicts where its own words attend, or in its region's
    box, overlaps averaged; the base everywhere else. `rate`, `temperature`, `threshold`, `until` and `refine_at` are those of the published
    code as far as we know it; `refinements` is our choice. How far `rate` moves latents depends on the model: in the toybox the gradient's
    norm is about .02, so that the published rate changes next to nothing there and the masks do the work.
    """

    name: ClassVar[str] = "clora"

    rate: float = 0.02
    temperature: float = 0.5
    threshold: float = 0.3  # of a concept's largest attention
    until: float = 0.5  # share of the steps before which latents are refined
    refine_at: tuple[float, ...] = (0.0, 0.2, 0.4)  # shares of the steps at which they are refined `refinements` times
    refinements: int = 5

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.rate < 0 or self.refinements < 1:
            raise UsageError("clora: temperature must be above 0, rate 0 or more, refinements 1 or more")
        if not all(0 <= share < 1 for share in (self.threshold, *self.refine_at)) or not 0 <= self.until <= 1:
            raise UsageError("clora: threshold, until and refine_at are shares; give 0 or more and less than 1")

    def check(self, cast: Cast, scene: Scene) -> None:
        check_words(scene.prompt, cast.parts)
        check_regions(cast.parts, scene.regions)
        for part, region in zip(cast.parts, scene.regions, strict=False):
            check_words(region.prompt, [part], where=f"{part.name}'s region")
        if not scene.regions or self._refines(cast):
            check_maps(cast, scene)
        Script.of(cast, scene)

    def draw(self, cast: Cast, scene: Scene) -> Tensor:
        script, layers, latent = Script.of(cast, scene), cast.pipeline.cross_attentions, latent_size(cast, scene)
        watch = Watch(latent, SIDE)

        def where(number: int, size: tuple[int, int]) -> Tensor:
            if scene.regions:
                return in_box(scene.regions[number], size)
            own = saliency(watch.take()[-1], script.spots[1 + number][number])
            return masks(own[None], size, threshold=self.threshold, exclusive=False)[0]

        layered = any(states.ndim == 4 for states in script.parts)
        with (
            watched(layers, watch),
            conditioned(layers, latent=latent) if layered else nullcontext(),
            cast.blended(script.parts, where, before=watch.forget),
        ):
            return script.drawn(cast, scene, refine=self._refine(cast, script, watch, scene.steps), callback=scene.callback)

    def _refine(self, cast: Cast, script: Script, watch: Watch, steps: int) -> Refine:
        often, last, numbers = {round(share * steps) for share in self.refine_at}, self.until * steps, count()

        def refine(latents: Tensor, time: Tensor, model_input: Callable[[Tensor], Tensor]) -> Tensor:
            number = next(numbers)
            if number >= last or not self._refines(cast):
                return latents
            for _ in range(self.refinements if number in often else 1):
                with torch.inference_mode(False), torch.enable_grad():
                    moved = latents.detach().clone().requires_grad_()
                    loss = self.loss(cast, script, watch, model_input(moved), time)
                    (slope,) = torch.autograd.grad(loss, moved)
                    latents = moved.detach() - self.rate * slope
            return latents

        return refine

    def _refines(self, cast: Cast) -> bool:
        return len(cast.parts) > 1 and self.rate > 0 and self.until > 0

    def loss(self, cast: Cast, script: Script, watch: Watch, sample: Tensor, time: Tensor) -> Tensor:
        """Scalar: the contrast of all concepts' maps in all readings of `sample`, the UNet's input."""
        maps: list[Tensor] = []
        labels: list[int] = []
        watch.forget()
        with cast.undisturbed():
            for reading, states in enumerate((script.base, *script.parts)):
                with nullcontext() if reading == 0 else cast.playing(reading - 1):
                    cast.pipeline.unet(sample.to(cast.pipeline.dtype), time, encoder_hidden_states=states[-1:].to(cast.pipeline.dtype))
                seen = watch.take()[-1].flatten(1)  # (T, cells)
                for concept, spots in script.spots[reading].items():
                    maps += [seen[spot] for spot in spots]
                    labels += [concept] * len(spots)
        return contrast(torch.stack(maps), torch.tensor(labels), temperature=self.temperature)


def contrast(maps: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """(m, cells) attention maps, (m,) whose -> scalar NT-Xent: the mean over pairs (a, p) of one label of
    -log(e^(s_ap) / (e^(s_ap) + sum over n of other labels e^(s_an))), s the cosine of maps scaled to 0..1, over the temperature.

    0 without two maps of one label, and where there is one label only.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    labels = labels.to(maps.device)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    unit = normalize((maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny), dim=1)
    likeness = unit @ unit.T / temperature
    same = labels[:, None] == labels
    others = likeness.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)  # -inf without others
    pairs = same & ~torch.eye(len(labels), dtype=torch.bool, device=maps.device)
    if not bool(pairs.any()) or bool(same.all()):
        return likeness.sum() * 0
    return (torch.logaddexp(likeness, others) - likeness)[pairs].mean()
