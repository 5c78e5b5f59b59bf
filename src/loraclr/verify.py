"""After a merge, whoever made it: is the file what its sources ask for? Layers, numbers, and each concept's strength and residual."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraclr.adapter import Adapter, DenseLayer, Layer, ProductLayer
from loraclr.blocks import weighted
from loraclr.collect import REPEATED, Collection, Concept, collect, collection_for
from loraclr.errors import LoraclrError, UsageError
from loraclr.formats import FileReport, examine, load_adapter, provenance
from loraclr.methods import make_method
from loraclr.methods.crosstalk import CrossTalk, inner_products, meeting
from loraclr.methods.problem import LayerProblem
from loraclr.pipeline import Pipeline
from loraclr.preflight import check_fit, union
from loraclr.scratch import Scratch
from loraclr.statistics import LayerStats, Moments

TOLERANCE = 0.25  # of a strength, either way
SLACK = 0.05  # of the mean residual, above what a merge by features measured itself
MOST_STEPS, MOST_PROMPTS = 1000, 1000  # a header may say anything
# In half precision an entry below 6e-5 is rounded to a multiple of 2^-24. Entries of this root mean square lose a thousandth by that.
_SUBNORMAL = 2**-24 / 12**0.5 / 1e-3


@dataclass(frozen=True)
class Kept:
    """One concept in the merged file: its strength at 1.0, and how far its layers are from what was meant, relative to its own change.

    By features what was meant is its own adapter: 0 is its behaviour, 1 the base's. By weights it is the weighted sum of all.
    """

    name: str
    meant: float
    strength: float
    residual: float  # mean over its layers
    worst: str  # the layer where it is largest
    worst_residual: float


@dataclass(frozen=True)
class Verification:
    """`wrong` is empty where the file is good. `space` is what was measured in: `features` of a base, or `weights`."""

    path: Path
    space: str
    concepts: tuple[Kept, ...]
    missing: tuple[str, ...]  # layers that some source changes and the file does not
    extra: tuple[str, ...]  # layers that no source changes
    underflow: tuple[str, ...]  # layers whose stored numbers lost more than a thousandth to half precision's smallest step
    wrong: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.wrong


def verify(
    merged: str | Path,
    sources: Sequence[str | Path],
    *,
    base: Pipeline | None = None,
    weights: Sequence[float] | None = None,
    calls: Mapping[str, str] | None = None,
    collection: Collection | None = None,
    progress: Callable[[str, float], None] | None = None,
    scratch: str | Path | None = None,
) -> Verification:
    """Whether the file at `merged`, applied at strength 1, keeps every one of `sources`.

    `weights` are the strengths that were meant; by default those of the file's receipt, else 1; weights by block are the receipt's. On a
    `base` strength and residual are those of each concept's features, stage by stage as they are merged, earlier stages with the merged
    layers (of what was built from a pack: with the concept's own); without one, of the weights themselves. What was not merged by features
    is judged by its weights, which are exact, and on a base by its residuals too; a merge by features, which trades strength for keeping
    concepts apart, by residuals alone and by those in its receipt. NaN and infinite values are a FormatError of the reader. Raises
    UsageError where a merge by features is to be judged without a base. `scratch` is a folder for statistics that do not fit into memory,
    the system's for temporary files without it.
    """
    merged = Path(merged)
    whole, file = examine(merged, base=base)
    adapters = [load_adapter(source, base=base) for source in sources]
    names = [adapter.name for adapter in adapters]
    if not adapters or len(set(names)) < len(names):
        raise UsageError("give the files it was merged from, each under a name of its own")
    if unknown := sorted(set(calls or {}) - set(names)):
        raise UsageError(f"a trigger was given for {unknown[0]!r}, but the sources are {', '.join(names)}")
    receipt = _receipt(whole, merged)
    if base is None and "statistics" in _needs(receipt):
        raise UsageError(f"{merged} was merged by features ({receipt['method']}), which only a base can show; pass --base")
    meant = list(weights) if weights is not None else [_meant(receipt, name) for name in names]
    if len(meant) != len(adapters):
        raise UsageError(f"{len(adapters)} sources and {len(meant)} weights; give one for each")
    if blocks := _blocks(receipt, names):
        adapters = weighted(adapters, blocks, None if base is None else base.cross_attention_layers)
    shapes = union(adapters)
    union([*adapters, whole])
    missing, extra = sorted(shapes.keys() - whole.layers.keys()), sorted(whole.layers.keys() - shapes.keys())
    underflow = sorted(layer.name for layer in whole if _underflows(layer))
    by_features = "statistics" in _needs(receipt)
    plain = _Measure(names, adapters, meant)
    for name in [] if by_features else shapes:
        plain.add(name, shapes[name], whole, None)
    measure = plain
    if base is not None:
        settings, own = collection or _collected(receipt), _Measure(names, adapters, meant)
        measure = _featured(own, whole, shapes, base, calls or {}, settings, _packed(receipt), progress, scratch)
    kept = measure.kept()
    wrong = _misshapen(whole, adapters, file, missing, underflow)
    for one, exact in zip(kept, plain.kept(), strict=True):
        if not by_features and abs(exact.strength - exact.meant) > TOLERANCE * abs(exact.meant):
            wrong.append(f"{one.name} has strength {exact.strength:.2f} at 1.0 where {one.meant:g} was meant")
        if base is not None and one.residual >= 1:
            wrong.append(f"{one.name} is no nearer to its own adapter than the base is (residual {one.residual:.2f})")
    promised, mean = _promised(receipt), measure.mean()
    if by_features and promised is not None and mean > promised + SLACK:
        wrong.append(f"the mean residual is {mean:.2f} where its receipt says {promised:.2f}: the file was changed, or the base is another")
    notes = [f"{len(extra)} layers are of none of the sources, the first is {extra[0]}"] if extra else []
    space = "weights" if base is None else "features"
    return Verification(merged, space, kept, tuple(missing), tuple(extra), tuple(underflow), tuple(wrong), (*notes, *file.warnings))


def _misshapen(whole: Adapter, adapters: Sequence[Adapter], file: FileReport, missing: list[str], underflow: list[str]) -> list[str]:
    """What is wrong with the file whatever it does."""
    wrong = [f"{len(missing)} layers are missing, the first is {missing[0]}"] if missing else []
    if underflow:
        wrong.append(f"{len(underflow)} layers underflow in half precision, the first is {underflow[0]}; write it in fp32")
    tokens = {token: rows for adapter in adapters for token, rows in adapter.tokens.items()}
    if lost := [token for token, rows in tokens.items() if token not in whole.tokens or not torch.equal(whole.tokens[token], rows)]:
        wrong.append(f"the learned tokens {', '.join(lost)} are missing or others; keep the .tokens.safetensors of the merge beside it")
    stated = whole.metadata.get("modelspec.hash_sha256", "").removeprefix("0x")
    if stated and file.tensor_sha256 and stated != file.tensor_sha256:
        wrong.append("its header was written for other tensors (modelspec.hash_sha256 differs)")
    return wrong


def _featured(
    measure: _Measure,
    whole: Adapter,
    shapes: Mapping[str, tuple[int, ...]],
    base: Pipeline,
    calls: Mapping[str, str],
    settings: Collection,
    alone: bool,
    progress: Callable[[str, float], None] | None,
    scratch: str | Path | None,
) -> _Measure:
    """`measure` with all layers, on the features of `base`: behind the merged earlier stages, or `alone`, as in a pack."""
    check_fit(shapes, base)
    named = zip(measure.adapters, measure.weights, strict=True)
    concepts = [Concept(adapter, calls.get(adapter.name) or adapter.call, weight) for adapter, weight in named]
    if silent := [concept.name for concept in concepts if not concept.call]:
        raise UsageError(f"{', '.join(silent)} says no trigger words; give them with --trigger {silent[0]}=WORDS")
    stages = base.stages(list(shapes))
    for number, stage in enumerate(stages):
        before = {name: whole.layers[name] for one in stages[:number] for name in one if name in whole.layers}
        with Scratch(scratch) as room:
            if alone:
                seen = [_alone(base, concept, stage, settings, room) for concept in concepts]
            else:
                seen = [collect(base, concepts, stage, settings=settings, merged=before, scratch=room)]
            for name in stage:
                fit = {concept: moments for statistics in seen for concept, moments in statistics[name].fit.items()}
                measure.add(name, shapes[name], whole, fit)
        if progress:
            progress("measuring", (number + 1) / len(stages))
    return measure


def _alone(base: Pipeline, concept: Concept, stage: Sequence[str], settings: Collection, room: Scratch) -> dict[str, LayerStats]:
    """What one concept sees with its whole adapter, at weight 1, and nobody else's: what packs keep."""
    rest = {name: layer for name, layer in concept.adapter.layers.items() if name not in stage}
    return collect(base, [dataclasses.replace(concept, weight=1.0)], stage, settings=settings, merged=rest, scratch=room)


class _Measure:
    """Cross-talk and residuals of the merged change, summed over layers; every layer in which a concept acts counts alike."""

    def __init__(self, names: Sequence[str], adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
        self.names, self.adapters, self.weights = list(names), list(adapters), list(weights)
        self.talk: CrossTalk | None = None
        self.residuals: dict[str, dict[str, float]] = {name: {} for name in self.names}

    def add(self, layer: str, shape: tuple[int, ...], merged: Adapter, seen: Mapping[str, Moments] | None) -> None:
        """One layer, by what each concept saw there, or by the weights themselves."""
        number = len(self.names)
        layers = tuple(adapter.layers.get(layer) for adapter in (*self.adapters, merged))
        changes = LayerProblem(layer, shape, (*self.names, ""), layers, (1.0,) * (number + 1)).factors  # the merged one is the last
        tables = inner_products(changes, [None]) * number if seen is None else inner_products(changes, [seen[name] for name in self.names])
        heard = meeting(tables, self.names, number)
        self.talk = heard if self.talk is None else self.talk + heard
        weights = torch.tensor(self.weights, dtype=torch.float64)
        for index, (name, table) in enumerate(zip(self.names, tables, strict=True)):
            apart = torch.ones(number + 1, dtype=torch.float64)
            apart[:number] = -weights if seen is None else 0.0
            apart[index] = -weights[index]
            if (own := float(weights[index] ** 2 * table[index, index])) > 0:
                self.residuals[name][layer] = (max(float(apart @ table @ apart), 0.0) / own) ** 0.5

    def mean(self) -> float:
        """Of all residuals, as `MergeResult.mean_residual`."""
        values = [value for mine in self.residuals.values() for value in mine.values()]
        return sum(values) / len(values) if values else 0.0

    def kept(self) -> tuple[Kept, ...]:
        found = []
        strengths = self.weights if self.talk is None else self.talk.after.diagonal().tolist()
        for name, meant, strength in zip(self.names, self.weights, strengths, strict=True):
            mine = self.residuals[name]
            worst = max(mine, key=lambda layer: mine[layer]) if mine else ""
            mean = sum(mine.values()) / len(mine) if mine else 0.0
            found.append(Kept(name, meant, strength if mine else meant, mean, worst, mine.get(worst, 0.0)))
        return tuple(found)


def _underflows(layer: Layer) -> bool:
    """Products of small factors (LoHa, LoKr) are not looked at: they are float32 by the time that they are a change."""
    stored: tuple[Tensor, ...] = ()
    if not isinstance(layer, ProductLayer):
        stored = (layer.change,) if isinstance(layer, DenseLayer) else (layer.down, layer.up)
    halves = [part[part != 0].double() for part in stored if part.dtype == torch.float16]  # zeros lose nothing
    return any(len(part) > 0 and float(part.square().mean().sqrt()) < _SUBNORMAL for part in halves)


def _receipt(adapter: Adapter, path: Path) -> dict[str, object]:
    """The one in the file's header; of a file that was to say nothing of its sources, the one beside it."""
    beside = path.with_name(f"{path.name}.json")
    try:
        receipt = json.loads(adapter.metadata.get(provenance.RECEIPT) or (beside.read_text() if beside.is_file() else "{}"))
    except (ValueError, OSError):
        return {}
    return receipt if isinstance(receipt, dict) else {}


def _needs(receipt: Mapping[str, object]) -> frozenset[str]:
    try:
        return make_method(str(receipt["method"])).needs if "method" in receipt else frozenset()
    except LoraclrError:  # of a later version
        return frozenset()


def _collected(receipt: Mapping[str, object]) -> Collection:
    """What this merge collected, without what only it needs; where its header says nothing sensible, what its method usually does."""
    usual = collection_for(_needs(receipt))
    seed, said = receipt.get("seed"), receipt.get("collection")
    values = {key: said[key] for key in REPEATED} if isinstance(said, dict) and said.keys() >= set(REPEATED) else {}
    fit = said.get("fit") if isinstance(said, dict) else None
    if values and isinstance(fit, list) and len(fit) <= MOST_PROMPTS:
        values["fit"] = tuple(map(str, fit))
    if type(values.get("steps")) is int and values["steps"] <= MOST_STEPS and isinstance(values["spatial"], int | None):
        with suppress(UsageError, TypeError):
            usual = dataclasses.replace(usual, **values)
    return dataclasses.replace(usual, preserve=(), sample=0, held_out=(), seed=seed if isinstance(seed, int) and seed >= 0 else 0)


def _promised(receipt: Mapping[str, object]) -> float | None:
    residual = receipt.get("residual")
    fit = residual.get("fit") if isinstance(residual, dict) else None
    return float(fit) if isinstance(fit, int | float) and math.isfinite(fit) else None


def _packed(receipt: Mapping[str, object]) -> bool:
    """Whether each concept was collected under its own adapter alone."""
    said = receipt.get("collection")
    return isinstance(said, dict) and "under" in said


def _meant(receipt: Mapping[str, object], name: str) -> float:
    """The weight that the receipt states for the input of that name, else 1."""
    weight = _entry(receipt, name).get("weight")
    return float(weight) if isinstance(weight, int | float) and math.isfinite(weight) else 1.0


def _blocks(receipt: Mapping[str, object], names: Sequence[str]) -> dict[str, list[float]]:
    """The weights by block that the receipt states, by name."""
    stated = {name: _entry(receipt, name).get("block_weights") for name in names}
    return {
        name: numbers
        for name, numbers in stated.items()
        if isinstance(numbers, list) and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    }


def _entry(receipt: Mapping[str, object], name: str) -> Mapping[str, object]:
    """What the receipt says of the input of that name."""
    inputs = receipt.get("inputs")
    found = [entry for entry in inputs if isinstance(entry, dict) and entry.get("name") == name] if isinstance(inputs, list) else []
    return found[0] if found else {}
