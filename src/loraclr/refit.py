"""The denoiser's blocks once more: what the merged model misses behind each of them is made good by the block's last layer.

`collect` runs a concept with its own adapter in the whole stage. In the merged model every layer is a compromise, and what it misses is a
part of the next one's input. Here transformer blocks are visited in the order in which the denoiser runs them, each with all that is
merged before it. A concept's own layers and the merged ones see the same latents, those of the own run, in one batch; behind a block the
two hidden states differ by all that was missed on the way. The last adapted layer of the block that is added to them learns to add the
difference, too. Each visit goes on where the one before it stopped (resume.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from collections.abc import Collection as Collected
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from loraclr import loading
from loraclr.adapter import Layer
from loraclr.collect import LATENTS, Collection, Concept, portions
from loraclr.conditioning import conditioned
from loraclr.errors import UsageError
from loraclr.methods.problem import LayerProblem, LayerSolution
from loraclr.modules import canonical, rows, side_by_side
from loraclr.pipeline import Pipeline
from loraclr.resume import Outputs, Parts, Room
from loraclr.scratch import Scratch
from loraclr.statistics import Gap

PLACES = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")  # of a block, whose outputs are added to its hidden states
Changes = tuple[Mapping[str, Layer], float]  # and their weight


@dataclass(frozen=True, eq=False)
class Pass:
    """What the denoiser was called with, and what it gave so far."""

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    outputs: Outputs


@runtime_checkable
class Refits(Protocol):
    """A method that can go through the blocks again, `rounds` - 1 times; with None once, where it can and `further` says that it should."""

    @property
    def rounds(self) -> int | None: ...

    @property
    def further(self) -> bool: ...

    def refit(self, problem: LayerProblem, before: Tensor, gaps: Iterable[tuple[str | None, Gap]]) -> LayerSolution: ...


@dataclass(frozen=True, eq=False)
class Writer:
    """A layer whose output is added to the hidden states of a block, and where these are seen next."""

    layer: str
    module: nn.Module
    behind: nn.Module
    whole: bool  # they are what `behind` gives; else what it is given


def check_again(pipeline: Pipeline, names: Collected[str], settings: Collection) -> None:
    """Raises UsageError where a further round has nothing to fit, or would learn from a single prompt: in the toybox worse than none."""
    if len(settings.fit[: settings.spatial]) < 2:
        raise UsageError("a further round needs at least two prompts a concept through the UNet; leave --quick out, or rounds at 1")
    if not _writers(pipeline, names):
        raise UsageError(
            "rounds: none of these adapters changes a layer that a UNet's blocks add to their hidden states "
            f"({', '.join(PLACES)}), which is where a further round makes good what is missing; leave rounds at 1"
        )


def rounds_of(method: Refits, pipeline: Pipeline | None, names: Collected[str], settings: Collection) -> int:
    """`method.rounds`, or where that is None 2 if a pipeline is at hand, the method is for it and `check_again`, too; else 1."""
    if method.rounds is not None or pipeline is None or not method.further:
        return method.rounds or 1
    try:
        check_again(pipeline, names, settings)
    except UsageError:
        return 1
    return 2


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
    scratch: Scratch | None = None,
) -> Iterator[tuple[LayerProblem, LayerSolution]]:
    """One layer of each block, solved anew in forward order, once for every round after the first; `names` are the stage's layers.

    `merged` has all layers of this and of earlier stages, and is read anew for every block: whoever takes a solution puts it there before
    asking for the next. `settings` are those of the collection; held-out prompts are not run. `check_again` says what it cannot do. Passes
    that do not fit into memory wait in `scratch`.
    """
    earlier = {name: layer for name, layer in merged.items() if name not in set(names)}
    tokens = {token: rows for concept in concepts for token, rows in concept.adapter.tokens.items()}
    runs: dict[str | None, tuple[Changes, list[Pass]]] = {}  # by concept; None: prompts without any
    tell = progress or (lambda phase, share: None)
    with torch.inference_mode(), pipeline.applied(earlier), pipeline.with_tokens(tokens):
        order, room = _in_order(pipeline, _writers(pipeline, names)), Room(scratch=scratch)
        for index, concept in enumerate(concepts):
            own = {name: layer for name, layer in concept.adapter.layers.items() if name in set(names)}, concept.weight
            said = concept.said(settings.fit[: settings.spatial])
            runs[concept.name] = own, _passes(pipeline, said, settings, LATENTS["fit"], own, room)
            tell("every adapter's own run once more", (index + 1) / len(concepts))
        if free := list(settings.preserve)[: settings.spatial_preserve]:
            runs[None] = ({}, 1.0), _passes(pipeline, free, settings, LATENTS["preserve"], ({}, 1.0), room)
    parts, visits = Parts(pipeline.unet, [writer.module for writer in order]), [*enumerate(order)] * ((method.rounds or 1) - 1)
    for index, (place, writer) in enumerate(visits):
        if place == 0:
            for given in (one.outputs for _, passes in runs.values() for one in passes):
                given.clear()
        now = {name: merged[name] for name in names}

        def gap(own: Changes, passes: Sequence[Pass], place: int = place, writer: Writer = writer, now: Mapping[str, Layer] = now) -> Gap:
            half = loading.half(pipeline.device, settings.precision == "bfloat16")
            with torch.inference_mode(), half, parts.resuming(place) as begin:  # the prompts' states are in the passes
                return _gap(pipeline, writer, passes, own, now, begin)

        one, before = problem(writer.layer), merged[writer.layer].delta().double().flatten(1)
        with pipeline.applied(earlier):
            solution = method.refit(one, before, ((name, gap(own, passes)) for name, (own, passes) in runs.items()))
        yield one, solution
        tell("catching up with the adapters, block after block", (index + 1) / len(visits))


def _writers(pipeline: Pipeline, names: Collected[str]) -> list[Writer]:
    """Of each block the last layer among `names` that is added to its hidden states."""
    from diffusers.models.attention import BasicTransformerBlock

    found: dict[str, Writer] = {}
    for path, block in pipeline.unet.named_modules():
        if isinstance(block, BasicTransformerBlock) and block.norm_type == "layer_norm":
            behinds = block.norm3 if block.attn2 is None else block.norm2, block.norm3, block
            for own, behind in zip(PLACES, behinds, strict=True):
                if (name := canonical("unet", f"{path}.{own}")) in names:
                    found[path] = Writer(name, block.get_submodule(own), behind, behind is block)
    return list(found.values())


def _in_order(pipeline: Pipeline, writers: Sequence[Writer]) -> list[Writer]:
    """As the denoiser comes to them."""
    order: dict[str, None] = {}
    with pipeline.captured([writer.layer for writer in writers], lambda name, rows: order.setdefault(name)):
        pipeline.run([""], seeds=[0], steps=1)
    by_layer = {writer.layer: writer for writer in writers}
    return [by_layer[name] for name in order]


def _passes(pipeline: Pipeline, prompts: list[str], settings: Collection, latents: int, own: Changes, room: Room) -> list[Pass]:
    """What the denoiser is called with when it draws these prompts by a concept's own layers."""
    seen: list[Pass] = []

    def see(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(Pass(inputs, named, Outputs(room)))

    handle = pipeline.unet.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with side_by_side(pipeline.modules, [own]):
            for portion in portions(pipeline, prompts, copies=2):
                said, seeds = [prompts[index] for index in portion], [settings.seed + latents + index for index in portion]
                pipeline.run(said, seeds=seeds, steps=settings.steps, half=settings.precision == "bfloat16")
    finally:
        handle.remove()
    return seen


class _SeenError(Exception):
    """Ends a pass behind the layer of interest."""


def _gap(
    pipeline: Pipeline,
    writer: Writer,
    passes: Sequence[Pass],
    own: Changes,
    merged: Mapping[str, Layer],
    begin: Callable[[Outputs], None] = lambda outputs: None,
) -> Gap:
    """Over all passes: what the writer is given in the merged model, and what the hidden states behind it lack. `begin` is told of each."""
    total: list[Gap] = []
    given: list[Tensor] = []

    def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given[:] = [inputs[0]]

    def compare(hidden: Tensor) -> None:
        (theirs, ours), x = hidden.float().chunk(2), given[0].chunk(2)[1]
        gap = Gap.of((theirs - ours).flatten(0, -2), rows(writer.module, x))
        total[:] = [gap + total[0] if total else gap]
        raise _SeenError

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        compare(inputs[0])

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        compare(output)

    with ExitStack() as stack:
        stack.enter_context(side_by_side(pipeline.modules, [own, (merged, 1.0)]))
        stack.callback(writer.module.register_forward_pre_hook(take).remove)
        behind = writer.behind
        stack.callback((behind.register_forward_hook(after) if writer.whole else behind.register_forward_pre_hook(before)).remove)
        for one in passes:
            begin(one.outputs)
            inputs, named = one.inputs, one.named
            latents = inputs[0] if inputs else named["sample"]
            twice, twice_named = _twice(inputs, len(latents)), _twice(named, len(latents))
            layered = named["encoder_hidden_states"].ndim == 4
            attentions = pipeline.cross_attentions if layered else []
            try:
                with conditioned(attentions, latent=(latents.shape[2], latents.shape[3])):
                    pipeline.unet(*twice, **twice_named)
            except _SeenError:
                pass
    return total[0]


def _twice(given: Any, batch: int) -> Any:
    """The same with every batch of tensors in it twice."""
    if isinstance(given, dict):
        return {key: _twice(value, batch) for key, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(_twice(value, batch) for value in given)
    return torch.cat([given, given]) if isinstance(given, Tensor) and given.ndim and len(given) == batch else given
