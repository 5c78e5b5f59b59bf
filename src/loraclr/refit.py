"""The denoiser's layers once more, block after block: what the merged model sees there, beside what each adapter alone sees.

`collect` runs a concept with its own adapter in the whole stage. The merged model's inputs are others: each of its layers is a compromise,
and every layer behind it starts from there. Here the blocks are visited in the order in which the denoiser runs them, each with all that is
merged before it, and a method may make good what those missed. Both runs share one batch and one latent: its first half goes through the
concept's own layers, its second through the merged ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from loraclr.adapter import Layer
from loraclr.collect import LATENTS, Collection, Concept, portions
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.modules import side_by_side
from loraclr.pipeline import Pipeline
from loraclr.statistics import Twin

BLOCK = re.compile(r".*blocks\.\d+")  # as far as it reaches: one block is fitted at once


@runtime_checkable
class Refits(Protocol):
    """A method that can go through the blocks again, `rounds` - 1 times."""

    @property
    def rounds(self) -> int: ...

    def refit(self, problem: LayerProblem, twins: Mapping[str, Twin], preserve: Twin | None) -> LayerSolution: ...


def refitted(
    pipeline: Pipeline,
    concepts: Sequence[Concept],
    names: Sequence[str],
    *,
    method: Refits,
    problem: Callable[[str], LayerProblem],
    settings: Collection,
    merged: MutableMapping[str, Layer],
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[tuple[LayerProblem, LayerSolution]]:
    """The layers `names` of one stage, solved anew in forward order, once for every round after the first.

    `merged` has all layers of this and of earlier stages, and is read anew for every block: whoever takes a solution puts it there before
    asking for the next. `settings` are those of the collection; held-out prompts are not run.
    """
    earlier = {name: layer for name, layer in merged.items() if name not in set(names)}
    tokens = {token: rows for concept in concepts for token, rows in concept.adapter.tokens.items()}
    with torch.inference_mode(), pipeline.applied(earlier), pipeline.with_tokens(tokens):
        blocks = [list(block) for _, block in groupby(_in_order(pipeline, names), _block)]
    visits = blocks * (method.rounds - 1)
    for index, block in enumerate(visits):
        found: dict[str, dict[str, Twin]] = {}
        with torch.inference_mode(), pipeline.applied(earlier), pipeline.with_tokens(tokens):
            now = {name: merged[name] for name in names}
            for concept in concepts:
                own = {name: layer for name, layer in concept.adapter.layers.items() if name in now}
                prompts = concept.said(settings.fit[: settings.spatial])
                found[concept.name] = _run(pipeline, block, prompts, settings, LATENTS["fit"], own, concept.weight, now)
            free = list(settings.preserve)[: settings.spatial_preserve]
            kept = _run(pipeline, block, free, settings, LATENTS["preserve"], {}, 1.0, now) if free else {}
        for name in block:
            one = problem(name)
            yield one, method.refit(one, {concept: twins[name] for concept, twins in found.items()}, kept.get(name))
        if progress:
            progress("fitting block after block to the merged model", (index + 1) / len(visits))


def _in_order(pipeline: Pipeline, names: Sequence[str]) -> list[str]:
    """`names` as the denoiser comes to them."""
    seen: dict[str, None] = {}
    with pipeline.captured(names, lambda name, rows: seen.setdefault(name)):
        pipeline.run([""], seeds=[0], steps=1)
    return list(seen)


def _block(name: str) -> str:
    found = BLOCK.match(name)
    return found[0] if found else name


def _run(
    pipeline: Pipeline,
    names: Sequence[str],
    prompts: list[str],
    settings: Collection,
    latents: int,
    own: Mapping[str, Layer],
    weight: float,
    merged: Mapping[str, Layer],
) -> dict[str, Twin]:
    sums = _Sums()
    for portion in portions(pipeline, prompts, copies=2):
        said, seeds = [prompts[index] for index in portion], [settings.seed + latents + index for index in portion]
        with ExitStack() as stack:
            stack.enter_context(one_latent(pipeline.unet))
            stack.enter_context(side_by_side(pipeline.modules, [(own, weight), (merged, 1.0)]))
            stack.enter_context(pipeline.captured(names, sums.add))
            pipeline.run(said * 2, seeds=seeds * 2, steps=settings.steps, half=settings.precision == "bfloat16")
    return sums.twins()


@contextmanager
def one_latent(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the second half of every batch starts from the first half's latents."""

    def copy(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def doubled(latents: Tensor) -> Tensor:
            return torch.cat([latents.chunk(2)[0]] * 2)

        if inputs:
            return (doubled(inputs[0]), *inputs[1:]), named
        key = next(key for key in ("sample", "hidden_states") if key in named)
        return inputs, {**named, key: doubled(named[key])}

    handle = denoiser.register_forward_pre_hook(copy, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Sums:
    """Twins of a run's layers; those that are handed the very same rows share one."""

    def __init__(self) -> None:
        self._sums: dict[str, Twin] = {}
        self._shares: dict[str, str] = {}  # layer -> the first one that is handed the same rows
        self._last: tuple[Tensor, str] | None = None

    def add(self, name: str, rows: Tensor) -> None:
        if self._last is not None and self._last[0] is rows:
            self._shares[name] = self._last[1]
            return
        self._last, self._shares[name] = (rows, name), name
        twin = Twin.of(*rows.chunk(2))
        self._sums[name] = self._sums[name] + twin if name in self._sums else twin

    def twins(self) -> dict[str, Twin]:
        return {name: self._sums[first] for name, first in self._shares.items()}
