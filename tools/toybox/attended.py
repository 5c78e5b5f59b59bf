"""An experiment of study.py: pixels count more for the merge where a concept's own words are attended to. Not part of the package."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from loraclr.pipeline import Pipeline
from loraclr.strategies.words import Part, Words

collecting = importlib.import_module("loraclr.collect")
SIDE = 16  # cells of the maps' sides


@contextmanager
def attended(parts: Sequence[Part], more: float) -> Iterator[None]:
    """Inside, a spatial row of a prompt that calls one of `parts` weighs 1 + `more` * share, divided by the picture's mean of that.

    `share` is how much the row's cell attends to the call's tokens, over all layers and steps of a first pass, as a part of the most.
    """
    usual = collecting._record

    def record(pipeline: Pipeline, stage: str, names: Any, prompts: list[str], settings: Any, recorder: Any, **where: Any) -> None:
        spots = [[spot for found in Words.of(prompt, parts).spots(pipeline.token_count).values() for spot in found] for prompt in prompts]
        if stage != "spatial" or not prompts or not all(spots):
            usual(pipeline, stage, names, prompts, settings, recorder, **where)
            return
        half = settings.precision == "bfloat16"
        for portion in collecting.portions(pipeline, prompts):
            said, seeds = [prompts[index] for index in portion], [settings.seed + where["latents"] + index for index in portion]
            look = partial(pipeline.run, said, seeds=seeds, steps=settings.steps, half=half)
            maps = attention(pipeline, look)
            share = torch.stack([one[spots[index]].sum(0) for one, index in zip(maps, portion, strict=True)])
            weights = 1 + more * share / share.amax((1, 2), keepdim=True)
            with pipeline.captured(names, Weigher(recorder.add, weights / weights.mean((1, 2), keepdim=True)).add):
                look()

    with mock.patch.object(collecting, "_record", record):
        yield


def attention(pipeline: Pipeline, look: Callable[[], object]) -> Tensor:
    """(B, tokens, SIDE, SIDE): what cross-attention attends to while `look` runs, the mean over heads, layers and steps."""
    queries: dict[str, Tensor] = {}
    seen: list[Tensor] = []

    def query(path: str, module: Any, inputs: Any, output: Tensor) -> None:
        queries[path] = output.float()

    def key(path: str, heads: int, module: Any, inputs: Any, output: Tensor) -> None:
        q, k = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (queries[path], output.float()))
        found = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).mean(1)  # (B, cells, tokens)
        side = math.isqrt(found.shape[1])
        seen.append(interpolate(found.transpose(1, 2).unflatten(2, (side, side)), (SIDE, SIDE), mode="bilinear"))

    with ExitStack() as hooks:
        for path, module in ((path, pipeline.unet.get_submodule(path)) for path in pipeline.cross_attention_layers):
            hooks.callback(module.to_q.register_forward_hook(partial(query, path)).remove)
            hooks.callback(module.to_k.register_forward_hook(partial(key, path, module.heads)).remove)
        look()
    return torch.stack(seen).mean(0)


class Weigher:
    """Hands rows on, each times the root of its cell's weight; siblings' rows stay the very same tensor."""

    def __init__(self, add: Callable[[str, Tensor], None], weights: Tensor) -> None:
        self.add_weighed, self.weights = add, weights  # (B, SIDE, SIDE)
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, rows: Tensor) -> None:
        if self._last is None or self._last[0] is not rows:
            side = math.isqrt(len(rows) // len(self.weights))
            weights = interpolate(self.weights[:, None], (side, side), mode="area").flatten()
            self._last = rows, rows * weights.sqrt()[:, None]
        self.add_weighed(name, self._last[1])
