"""Several adapters on one model, one at a time: changed in no time, and blended in the predicted noise where masks say.

Memory: one more copy of the adapted UNet weights for each adapter. Time: one more UNet pass per adapter and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraclr.errors import UsageError
from loraclr.pipeline import Pipeline
from loraclr.strategies.words import Part


class Cast:
    """The parts of a scene on one pipeline, which stays as it was outside of `playing`."""

    def __init__(self, pipeline: Pipeline, parts: Sequence[Part]) -> None:
        if not parts:
            raise UsageError("a strategy needs at least one adapter; give one for each concept of the scene")
        self.pipeline, self.parts = pipeline, tuple(parts)
        self._idle = True
        self._weights = [self._changed(part) for part in parts]

    @contextmanager
    def playing(self, number: int) -> Iterator[None]:
        """Inside, the UNet is that of part `number`. The very same parameters come back on exit.

        Parameters are exchanged, not their contents: a graph that was recorded with one part's weights must keep them.
        """
        modules = {name: self.pipeline.modules[name] for name in self._weights[number]}
        kept = {name: module.weight for name, module in modules.items()}
        try:
            for name, module in modules.items():
                module.weight = self._weights[number][name]
            yield
        finally:
            for name, module in modules.items():
                module.weight = kept[name]

    @contextmanager
    def speaking(self, number: int | None) -> Iterator[None]:
        """Inside, text encoders and tokens are those of part `number`; of the base for None."""
        if number is None:
            yield
            return
        part = self.parts[number]
        text = {name: layer for name, layer in part.adapter.layers.items() if name.startswith("text_encoder")}
        with self.pipeline.applied(part.adapter.with_(layers=text), scale=part.scale):
            yield

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, UNet passes are ordinary, not blended."""
        before, self._idle = self._idle, False
        try:
            yield
        finally:
            self._idle = before

    @contextmanager
    def blended(
        self,
        states: Sequence[Tensor],
        mask: Callable[[int, tuple[int, int]], Tensor],
        *,
        since: float = 0.0,
        before: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Inside, every UNet pass predicts with each part where its mask says, with the base elsewhere; overlaps are averaged.

        `states` are what each part reads, (halves, T, dim) or (halves, L, T, dim). `before()` is called before each part's pass, and
        `mask(number, (h, w))`, (h, w) bool, right after it. `since` is the share of the noise that the base takes away alone.
        """
        latest = (1 - since) * int(self.pipeline.pipe.scheduler.config.num_train_timesteps) + 1  # older models' times count from 1

        def blend(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            sample, time = inputs[:2]
            if not self._idle or float(time) > latest:
                return None
            size = (sample.shape[-2], sample.shape[-1])
            total, count = torch.zeros_like(output[0]), output[0].new_zeros(size)
            with self.undisturbed():
                for number, own in enumerate(states):
                    before()
                    with self.playing(number):
                        (predicted,) = module(sample, time, encoder_hidden_states=own.to(sample), return_dict=False)
                    where = mask(number, size).to(count)
                    total += where * predicted
                    count += where
            return (torch.where(count > 0, total / count.clamp(min=1), output[0]),)

        handle = self.pipeline.unet.register_forward_hook(blend)
        try:
            yield
        finally:
            handle.remove()

    def _changed(self, part: Part) -> dict[str, nn.Parameter]:
        names = [name for name in part.adapter.layers if not name.startswith("text_encoder")]
        with self.pipeline.applied(part.adapter, scale=part.scale):
            return {name: nn.Parameter(self.pipeline.base_weight(name).clone(), requires_grad=False) for name in names}
