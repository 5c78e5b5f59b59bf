"""All concepts side by side through the prompts that were collected: every layer compares what they see there and then, and keeps no rows.

Distances between concepts need the rows of all of them at once, which statistics of one concept after the other do not hold. Texts are
short and go prompt by prompt through `collect`. The UNet runs one batch of all concepts, each picture with its own adapter's changes,
from the same seed; the N x N sums are exact up to float32 features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from loraclr.adapter import Layer
from loraclr.collect import ALL_ROWS, LATENTS, Collection, Concept, collect, stage_of
from loraclr.methods.contrast import Tally
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.modules import side_by_side
from loraclr.pipeline import Pipeline


def settled(
    pipeline: Pipeline,
    concepts: Sequence[Concept],
    solved: Sequence[tuple[LayerProblem, LayerSolution]],
    *,
    settings: Collection,
    merged: Mapping[str, Layer],
) -> Iterator[tuple[LayerProblem, LayerSolution]]:
    """One stage's layers, solved, with their claims settled by exact distances over all paired rows of the fit prompts.

    The pass is done at once; layers are settled as they are asked for, and then let go of.
    `settings` and the `merged` layers of earlier stages are those of the collection. Texts of different length are paired from their
    ends, as far as the shortest. A solution without a claim stays as it is.
    """
    claims = {problem.layer: (problem, solution.claim) for problem, solution in solved if solution.claim is not None}
    tallies = {name: Tally(problem, claim.space, claim.changes) for name, (problem, claim) in claims.items()}
    if tallies:
        run = _spatial if stage_of(pipeline, list(tallies)) == "spatial" else _texts
        with torch.inference_mode():
            run(pipeline, concepts, tallies, settings, merged)
    return _settle(deque(solved), tallies)


def _settle(left: deque[tuple[LayerProblem, LayerSolution]], tallies: dict[str, Tally]) -> Iterator[tuple[LayerProblem, LayerSolution]]:
    while left:
        problem, solution = left.popleft()
        yield problem, solution if solution.claim is None else solution.claim.settle(tallies.pop(problem.layer).distances())


def _texts(
    pipeline: Pipeline, concepts: Sequence[Concept], tallies: Mapping[str, Tally], settings: Collection, merged: Mapping[str, Layer]
) -> None:
    for template in settings.fit:
        one = replace(settings, fit=(template,), held_out=(), preserve=(), sample=ALL_ROWS)
        statistics = collect(pipeline, concepts, list(tallies), settings=one, merged=merged)
        for name, tally in tallies.items():
            tally.add(torch.stack([statistics[name].sample[concept.name] for concept in concepts]))


def _spatial(
    pipeline: Pipeline, concepts: Sequence[Concept], tallies: Mapping[str, Tally], settings: Collection, merged: Mapping[str, Layer]
) -> None:
    tokens = {token: rows for concept in concepts for token, rows in concept.adapter.tokens.items()}

    def add(name: str, rows: Tensor) -> None:
        tallies[name].add(rows.cpu().view(len(concepts), -1, rows.shape[1]))

    with ExitStack() as stack:
        stack.enter_context(pipeline.applied(dict(merged)))
        stack.enter_context(pipeline.with_tokens(tokens))
        stack.enter_context(side_by_side(pipeline.modules, [(_among(concept, tallies), concept.weight) for concept in concepts]))
        stack.enter_context(pipeline.captured(list(tallies), add))
        for index, template in enumerate(settings.fit[: settings.spatial]):
            prompts = [prompt for concept in concepts for prompt in concept.said([template])]
            seed = settings.seed + LATENTS["fit"] + index
            half = settings.precision == "bfloat16"
            pipeline.run(prompts, seeds=[seed] * len(concepts), steps=settings.steps, half=half)


def _among(concept: Concept, names: Container[str]) -> dict[str, Layer]:
    return {name: layer for name, layer in concept.adapter.layers.items() if name in names}
