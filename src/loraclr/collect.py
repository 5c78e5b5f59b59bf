"""VERB. Prompts through one adapter at a time -> what every adapted layer saw, as streaming statistics.

A concept is run with its own adapter in the stage at hand and with the *merged* layers of the earlier stages, from the same latent
seed as every other concept. All concepts record the union of adapted layers: where one has no delta, its target is no change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from zlib import crc32

import torch
from torch import Tensor

from loraclr.adapter import Adapter, Layer, LoraLayer, style_of
from loraclr.errors import UsageError
from loraclr.modules import side_by_side
from loraclr.pipeline import Pipeline
from loraclr.scratch import Read, Sample, Scratch
from loraclr.statistics import LayerStats, Moments

# What no prompt says gives way to the concepts: together these say every colour and expression of the toybox. The first three also go
# through the UNet and differ in expression and style; so do the first eight that are preserved, all that `--quick` runs there.
FIT_TEMPLATES = (
    "a photo of a {}", "a sad {} wearing a black hoodie", "a sepia photo of a {}", "a {}", "a portrait of a {} on a beach",
    "a picture of a {} in a forest", "a photo of a {} in a city", "a photo of a {} wearing a red shirt on a blue background",
    "a photo of a serious {} on a red background", "a {} in the snow", "a picture of a {} wearing a white blazer on a gray background",
    "a {} wearing purple overalls in a city", "a photo of a sleeping {} wearing an orange shirt", "a photo of a {} next to a dog",
    "a surprised {} on a green background", "a portrait of a {} in a room wearing a green shirt", "a {} under a tree",
    "a smiling {} wearing a yellow blazer", "a picture of a {} with a cat on a pink background",
    "an angry {} in a house wearing a gray hoodie", "a poster of a {}", "a {} in a desert wearing a blue hoodie",
    "a black and white photo of a {}", "pixel art of a {} in a city",
)  # fmt: skip
HELD_OUT_TEMPLATES = ("a photo of a {} at night", "a picture of a {} wearing a blue hoodie in a field")
# Instead of these two where hyper-parameters are chosen by them.
CHOOSING_TEMPLATES = (
    *HELD_OUT_TEMPLATES, "a sad {} in the snow", "a portrait of a {} wearing a green shirt", "pixel art of a {} on a white background",
    "a smiling {} under a tree",
)  # fmt: skip
PRESERVE_PROMPTS = (
    "", "a sad woman wearing a gray hoodie on a white background", "a woman on the left and a man on the right", "a sepia photo of a woman",
    "a portrait of a man on a green background", "a photo of a dog on a gray background", "pixel art of a woman on a beach",
    "a poster of a man at night", "a photo of a woman", "a photo of a man", "a woman on a beach", "a man in a forest",
    "a portrait of a woman in a city", "a smiling woman wearing a red shirt", "an angry man wearing a blue hoodie", "a photo of a house",
    "a tree in a field", "a serious man on a red background", "a surprised woman at night", "a man wearing purple overalls in a desert",
    "a sleeping man on an orange background", "a picture of a woman on a blue background", "a smiling man wearing a pink shirt on a beach",
    "an angry woman wearing yellow overalls in a field", "a photo of a cat", "a car in a city",
    "a photo of a woman wearing a white blazer on a pink background", "a black and white photo of a man in a city",
    "a black and white photo of a woman", "a sepia photo of a man in a field", "a poster of a dog", "pixel art of a house",
    "a picture of a man in the snow", "a man on the left and a woman on the right on a beach",
)  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """An adapter and the words that call it in a prompt: `rhea woman`, or `<rhea1> <rhea2>`."""

    adapter: Adapter
    call: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.adapter.name

    def said(self, templates: Iterable[str]) -> list[str]:
        """The templates with the call in place of {}. A style is said of something: "a {} at night" is "a dog at night in kalle style",
        but where a template itself says "in {}", "of {}" or "by {}"."""
        style = style_of(self.call)
        return [template.replace("{}", self.call) if style is None else _said(template, style) for template in templates]


def _said(template: str, style: str) -> str:
    if re.search(r"\b(in|of|by) \{\}", template):
        return template.replace("{}", style)
    return f"{template.replace('{}', SHOWN[crc32(template.encode()) % len(SHOWN)])} in {style}"


SHOWN = ("woman", "man", "dog", "house")  # in a style, one for each template wherever it stands
ALL_ROWS = 1 << 31
PRECISIONS = ("float32", "bfloat16")
PIXELS = 512 * 512  # of the pictures that go through the UNet at once: what its passes and rows take stays small
TEXTS = 32  # prompts through a text encoder at once
AHEAD = 256  # prompts of several concepts of which those go together that have as many tokens


@dataclass(frozen=True)
class Collection:
    """Which prompts, how many denoising steps, how many latent seeds."""

    fit: tuple[str, ...] = FIT_TEMPLATES  # templates; {} is where the concept's call goes
    held_out: tuple[str, ...] = HELD_OUT_TEMPLATES  # only judge, but where a method is told to choose by them
    preserve: tuple[str, ...] = PRESERVE_PROMPTS  # prompts without any concept
    steps: int = 4  # denoising steps, all recorded, conditional only
    padded: bool = False  # text rows of the positions that samplers pad to 77, too
    sample: int = 64  # paired rows kept per concept and layer
    seed: int = 0  # of the latents, the same for every concept
    spatial: int | None = 3  # how many of the fit templates also run the UNet; None: all
    spatial_held_out: int | None = None  # of the held-out templates
    spatial_preserve: int | None = None  # and of the prompts without any concept
    precision: str = "float32"  # of the UNet's passes; "bfloat16" halves their time, and is float32 on a device without it

    def __post_init__(self) -> None:
        wrong = [template for template in (*self.fit, *self.held_out) if template.count("{}") != 1]
        if wrong or not self.fit:
            raise UsageError(f"templates need exactly one {{}} for the concept's words, and at least one must be given; seen {wrong}")
        if self.steps < 1 or self.sample < 0 or self.seed < 0 or (self.spatial is not None and self.spatial < 1):
            raise UsageError(
                f"steps {self.steps}, sample {self.sample}, seed {self.seed}, spatial {self.spatial}: steps and spatial are at least 1, "
                "sample and seed at least 0"
            )
        if any(count is not None and count < 0 for count in (self.spatial_held_out, self.spatial_preserve)):
            raise UsageError(f"spatial_held_out {self.spatial_held_out}, spatial_preserve {self.spatial_preserve}: give 0 or more, or None")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r}: give one of {', '.join(PRECISIONS)}")


def check_held_out(settings: Collection, stages: Iterable[str]) -> None:
    """Raises UsageError where one of these stages (`stage_of`) would have no held-out prompts to choose by."""
    if not settings.held_out or (settings.spatial_held_out == 0 and "spatial" in stages):
        where = "runs the UNet" if settings.held_out else "is collected"
        raise UsageError(f"choose=held_out needs held-out prompts, but none {where}; leave --quick out, which has none, or choose=fixed")


# The released code's prompts: no padding, one of them through the UNet, every row kept as it is. It differs in one thing: for keys and
# values the released code drops the begin mark and ordinary words, here all tokens count.
PAPER = Collection(fit=("photo of a {}", "{}"), steps=20, sample=ALL_ROWS, spatial=1)
# A fifth of the default's passes, and none of a further round's: for real pictures on a processor without a GPU.
QUICK = Collection(steps=4, spatial=1, spatial_held_out=0, spatial_preserve=8, precision="bfloat16")
REPEATED = ("steps", "spatial", "padded", "precision")  # what a merged file's header says, for whoever collects again
LATENTS = {"fit": 0, "held_out": 1000, "preserve": 2000}  # added to the seed: what judges must not start from what was learned from


def collection_for(needs: Set[str] = frozenset(), *, quick: bool = False) -> Collection:
    """What a method with these needs collects unless something else is asked for; `quick` with as few passes as QUICK, on the method's
    own prompts."""
    released = bool({"rows", "short"} & needs)
    if not quick:
        chosen = Collection(held_out=CHOOSING_TEMPLATES) if "held_out" in needs else Collection()
        return PAPER if released else chosen
    return replace(QUICK, fit=PAPER.fit, sample=PAPER.sample) if released else QUICK


Kept = tuple[int, Read]  # how many rows, and they themselves


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _Recorder:
    """Sums the moments of one run's rows, and keeps a few rows, chosen alike for every concept.

    `keep` rows of each call: spread over it where calls of all concepts are equally long, else (`ends`) the last of each of its texts,
    where texts of different length agree. Layers that are handed the very same rows, such as the queries, keys and values of one
    attention, share the work and the memory.
    """

    def __init__(self, keep: int = 0, *, ends: bool = False) -> None:
        self.keep, self.ends = keep, ends
        self.texts = 1  # in each call
        self.moments: dict[str, Moments] = {}
        self.kept: dict[str, list[Tensor]] = {}
        self._last: _Seen | None = None

    def add(self, name: str, rows: Tensor) -> None:
        if self._last is None or self._last.rows is not rows:
            self._last = _Seen(rows)
        last, before = self._last, self.moments.get(name)
        if id(before) not in last.sums:
            last.sums[id(before)] = before, (before or Moments.empty(rows.shape[1])).extended(rows)
        self.moments[name] = last.sums[id(before)][1]
        if self.keep:
            kept = self.kept.setdefault(name, [])
            if len(kept) not in last.parts:
                last.parts[len(kept)] = self._chosen(rows, len(kept))
            kept += last.parts[len(kept)]

    def _chosen(self, rows: Tensor, kept: int) -> list[Tensor]:
        if self.ends:
            parts = [text.flip(0)[: -(-self.keep // self.texts)] for text in rows.chunk(self.texts)]
        else:
            stride = max(1, len(rows) // self.keep)
            parts = [rows[kept * 7919 % stride :: stride][: self.keep]]  # other places at each call
        return [part.to("cpu", torch.float32).clone() for part in parts]

    def put(self, scratch: Scratch | None) -> dict[str, list[Kept]]:
        """The rows kept of every layer, in `scratch`; siblings share them."""
        put: dict[int, Kept] = {}
        for part in (part for parts in self.kept.values() for part in parts):
            if id(part) not in put:
                put[id(part)] = len(part), partial(_itself, part) if scratch is None else scratch.tensor(part)
        return {name: [put[id(part)] for part in parts] for name, parts in self.kept.items()}


@dataclass(frozen=True, eq=False)
class _Seen:
    """The rows of one call, and what siblings that are handed the same rows share."""

    rows: Tensor
    sums: dict[int, tuple[Moments | None, Moments]] = field(default_factory=dict)  # by what was there before, which is kept alive
    parts: dict[int, list[Tensor]] = field(default_factory=dict)  # by how many were there before


def collect(
    pipeline: Pipeline,
    concepts: Sequence[Concept],
    names: Sequence[str],
    *,
    settings: Collection | None = None,
    merged: Mapping[str, Layer] | None = None,
    progress: Callable[[str], None] | None = None,
    scratch: Scratch | None = None,
) -> dict[str, LayerStats]:
    """The statistics of one stage's layers `names` for all concepts, with the `merged` layers of earlier stages applied.

    With `scratch` what does not fit into its memory goes to disk at the end of every concept and is read when it is asked for: until
    `scratch` is closed the statistics can be used like any others. Raises PipelineError where a layer is not the pipeline's, FormatError
    on features that are not finite, WriteError when the disk is full.
    """
    settings = settings or Collection()
    stage = stage_of(pipeline, names)
    tokens = {token: rows for concept in concepts for token, rows in concept.adapter.tokens.items()}
    layered = any(len(rows) > 1 for rows in tokens.values())  # then every text counts once per layer, whoever brings the tokens
    found: dict[str, dict[str, Mapping[str, Moments]]] = {"fit": {}, "held_out": {}}  # by kind and concept
    kept: dict[str, dict[str, list[Kept]]] = {}
    preserve = _Recorder()
    fit, held_out, free = settings.fit, settings.held_out, settings.preserve
    if stage == "spatial":
        fit, held_out, free = fit[: settings.spatial], held_out[: settings.spatial_held_out], free[: settings.spatial_preserve]
    calls = settings.steps * len(portions(pipeline, fit)) if stage == "spatial" else len(fit)
    keep, ends = -(-settings.sample // calls), stage != "spatial" and not settings.padded
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(pipeline.applied(dict(merged or {})))
        stack.enter_context(pipeline.with_tokens(tokens))
        asked = [concept.said(templates) for concept in concepts for templates in (fit, held_out)]
        said = _encoded(pipeline, [*asked, list(free)], padded=settings.padded) if stage == "keys" and not layered else None
        for concept in concepts:
            with _changed(pipeline, {} if stage == "keys" else concept.adapter.layers, names, concept.weight):  # texts come before keys
                for kind, templates in (("fit", fit), ("held_out", held_out)):
                    prompts = concept.said(templates)
                    recorder = _Recorder(keep, ends=ends) if kind == "fit" else _Recorder()
                    _record(pipeline, stage, names, prompts, settings, recorder, latents=LATENTS[kind], layered=layered, said=said)
                    found[kind][concept.name] = recorder.moments if scratch is None else scratch.moments(recorder.moments)
                    if kind == "fit":
                        kept[concept.name] = recorder.put(scratch)
            if progress:
                progress(concept.name)
        _record(pipeline, stage, names, list(free), settings, preserve, latents=LATENTS["preserve"], layered=layered, said=said)
        preserved = preserve.moments if scratch is None else scratch.moments(preserve.moments)
        if progress:
            progress("preservation")
    return {
        name: LayerStats(
            name,
            {concept: moments[name] for concept, moments in found["fit"].items()},
            {concept: moments[name] for concept, moments in found["held_out"].items() if held_out},
            preserved.get(name),
            *_rows({concept: parts.get(name, []) for concept, parts in kept.items()}, settings.sample),
        )
        for name in names
    }


@contextmanager
def _changed(pipeline: Pipeline, layers: Mapping[str, Layer], names: Sequence[str], weight: float) -> Iterator[None]:
    """Inside, those of `layers` that are among `names` act: low-rank ones beside the weights, of which they need no copies."""
    own = [layers[name] for name in names if name in layers]
    pipeline.modules.fitting({layer.name: layer for layer in own})
    low = {layer.name: layer for layer in own if isinstance(layer, LoraLayer)}
    whole = {layer.name: layer for layer in own if layer.name not in low}
    with pipeline.applied(whole, scale=weight), side_by_side(pipeline.modules, [(low, weight)]):
        yield


def stage_of(pipeline: Pipeline, names: Sequence[str]) -> str:
    """`text`, `keys` or `spatial`. Raises UsageError where the layers are of several stages."""
    stages = pipeline.stages(names)
    if len(stages) != 1:
        raise UsageError(f"statistics are collected stage by stage, but these {len(names)} layers belong to {len(stages)} stages")
    return pipeline.stage_of(names[0])


def portions(pipeline: Pipeline, prompts: Sequence[str], *, copies: int = 1) -> list[list[int]]:
    """Which prompts go through the UNet together, each `copies` times."""
    height, width = pipeline.check_settings(seeds=(), steps=1, guidance=1, size=None)
    most = max(1, PIXELS // (height * width * copies))
    return [list(range(start, min(start + most, len(prompts)))) for start in range(0, len(prompts), most)]


def _record(
    pipeline: Pipeline,
    stage: str,
    names: Sequence[str],
    prompts: list[str],
    settings: Collection,
    recorder: _Recorder,
    *,
    latents: int,
    layered: bool,
    said: Iterator[list[Tensor]] | None = None,
) -> None:
    """`said` gives the states of these prompts, where nothing that the concept changes acts on texts."""
    if said is not None:
        for rows in next(said):
            for name in names:
                recorder.add(name, rows)
    elif not prompts:
        return
    elif stage == "spatial":
        half = settings.precision == "bfloat16"
        for portion in portions(pipeline, prompts):
            seeds = [settings.seed + latents + index for index in portion]
            with pipeline.captured(names, recorder.add):
                pipeline.run([prompts[index] for index in portion], seeds=seeds, steps=settings.steps, half=half)
    elif layered:
        _record_layered(pipeline, stage, names, prompts, settings, recorder)
    else:
        seen: list[list[tuple[str, Tensor]]] = [[] for _ in prompts]  # of each prompt, so that their order is that of the prompts
        for together in _alike(pipeline, prompts, padded=settings.padded):
            with pipeline.captured(names, _Split([seen[index] for index in together]).add):
                pipeline.encode([prompts[index] for index in together], pad=settings.padded)
        for calls in seen:
            for name, rows in calls:
                recorder.add(name, rows)


def _record_layered(
    pipeline: Pipeline, stage: str, names: Sequence[str], prompts: list[str], settings: Collection, recorder: _Recorder
) -> None:
    """One prompt at a time, each as many texts as there are cross-attention layers."""
    layers = len(pipeline.cross_attention_layers)
    if stage == "text":
        recorder.texts = layers
        with pipeline.captured(names, recorder.add):
            for prompt in prompts:
                pipeline.encode([prompt], pad=settings.padded, layered=True)
        return
    for prompt in prompts:
        states = pipeline.encode([prompt], pad=settings.padded)[0]  # (tokens, dim) or (layers, tokens, dim)
        by_layer = list(states) if states.ndim == 3 else [states] * layers
        for name in names:
            index = pipeline.cross_attention_index(name)
            assert index is not None  # or the layer would be of another stage
            recorder.add(name, by_layer[index])


def _encoded(pipeline: Pipeline, asked: Sequence[list[str]], *, padded: bool) -> Iterator[list[Tensor]]:
    """The states of each prompt of each of `asked`, many of them encoded together."""
    waiting, first = 0, 0
    for index, prompts in enumerate(asked):
        waiting += len(prompts)
        if waiting < AHEAD and index + 1 < len(asked):
            continue
        said = list(dict.fromkeys(chain.from_iterable(asked[first : index + 1])))
        states: dict[str, Tensor] = {}
        for together in _alike(pipeline, said, padded=padded):
            batch = [said[place] for place in together]
            states |= zip(batch, pipeline.encode(batch, pad=padded), strict=True)
        yield from ([states[prompt] for prompt in own] for own in asked[first : index + 1])
        waiting, first = 0, index + 1


def _alike(pipeline: Pipeline, prompts: Sequence[str], *, padded: bool) -> list[list[int]]:
    """Which prompts go through the text encoder together: without padding, those of as many tokens; alone where several encoders read."""
    if not (padded or pipeline.plain):
        return [[index] for index in range(len(prompts))]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        length = pipeline.text_length if padded else min(pipeline.token_count(prompt), pipeline.text_length)
        by_length.setdefault(length, []).append(index)
    return [alike[start : start + TEXTS] for alike in by_length.values() for start in range(0, len(alike), TEXTS)]


class _Split:
    """Hands the rows of a batch of equally long texts to the list of each; siblings' rows stay the very same tensor."""

    def __init__(self, texts: Sequence[list[tuple[str, Tensor]]]) -> None:
        self.texts = texts
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def add(self, name: str, rows: Tensor) -> None:
        if self._last is None or self._last[0] is not rows:
            self._last = rows, rows.chunk(len(self.texts))
        for seen, part in zip(self.texts, self._last[1], strict=True):
            seen.append((name, part))


def _rows(kept: Mapping[str, list[Kept]], limit: int) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The same number of rows of each part for every concept, at most `limit` rows; and all rows, if that are more and all were wanted."""
    if not limit or not all(kept.values()):
        return {}, {}
    reads = {name: [read for _, read in parts] for name, parts in kept.items()}
    counts = [[count for count, _ in part] for part in zip(*kept.values(), strict=True)]
    paired = Sample(reads, [min(part) for part in counts], limit)
    whole = limit >= ALL_ROWS and any(len(set(part)) > 1 for part in counts)
    return paired, Sample(reads, [max(part) for part in counts], limit) if whole else {}
