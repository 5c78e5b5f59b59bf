"""After a merge, whoever made it: is the file what its sources ask for? Layers, numbers, and each concept's strength and residual."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraclr.adapter import Adapter, LoraLayer
from loraclr.collect import PAPER, Collection, Concept, collect
from loraclr.errors import LoraclrError, UsageError
from loraclr.formats import FileReport, examine, load_adapter, provenance
from loraclr.methods import make_method
from loraclr.methods.problem import LayerProblem, residuals
from loraclr.pipeline import Pipeline
from loraclr.preflight import check_fit, union

TOLERANCE = 0.25  # of a strength, either way
SLACK = 0.05  # of the mean residual, above what a merge by features measured itself
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
) -> Verification:
    """Whether the file at `merged`, applied at strength 1, keeps every one of `sources`.

    `weights` are the strengths that were meant; by default those of the file's receipt, else 1. On a `base` strength and residual are
    those of each concept's features, stage by stage as they are merged, earlier stages with the merged layers; without one, of the
    weights themselves. What was not merged by features is judged by its weights, which are exact, and on a base by its residuals too;
    a merge by features, which trades strength for keeping concepts apart, by residuals alone and by those in its receipt.
    NaN and infinite values are a FormatError of the reader. Raises UsageError where a merge by features is to be judged without a base.
    """
    merged = Path(merged)
    whole, file = examine(merged, base=base)
    adapters = [load_adapter(source, base=base) for source in sources]
    names = [adapter.name for adapter in adapters]
    if not adapters or len(set(names)) < len(names):
        raise UsageError("give the files it was merged from, each under a name of its own")
    receipt = _receipt(whole)
    if base is None and "statistics" in _needs(receipt):
        raise UsageError(f"{merged} was merged by features ({receipt['method']}), which only a base can show; pass --base")
    meant = list(weights) if weights is not None else [_meant(receipt, name) for name in names]
    if len(meant) != len(adapters):
        raise UsageError(f"{len(adapters)} sources and {len(meant)} weights; give one for each")
    shapes = union(adapters)
    union([*adapters, whole])
    missing, extra = sorted(shapes.keys() - whole.layers.keys()), sorted(whole.layers.keys() - shapes.keys())
    underflow = sorted(layer.name for layer in whole if isinstance(layer, LoraLayer) and _underflows(layer))
    by_features = "statistics" in _needs(receipt)
    plain = _Measure(names, adapters, meant)
    for name in [] if by_features else shapes:
        plain.add(name, plain.problem(name, shapes[name]), whole, None)
    measure = plain
    if base is not None:
        settings = collection or _collected(receipt)
        measure = _featured(_Measure(names, adapters, meant), whole, shapes, base, calls or {}, settings, progress)
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
    progress: Callable[[str, float], None] | None,
) -> _Measure:
    """`measure` with all layers, on the features of `base`."""
    check_fit(shapes, base)
    named = zip(measure.adapters, measure.weights, strict=True)
    concepts = [Concept(adapter, calls.get(adapter.name) or adapter.call, weight) for adapter, weight in named]
    if silent := [concept.name for concept in concepts if not concept.call]:
        raise UsageError(f"{', '.join(silent)} says no trigger words; give them with --trigger {silent[0]}=WORDS")
    stages = base.stages(list(shapes))
    for number, stage in enumerate(stages):
        before = {name: whole.layers[name] for one in stages[:number] for name in one if name in whole.layers}
        statistics = collect(base, concepts, stage, settings=settings, merged=before)
        for name in stage:
            problem = dataclasses.replace(measure.problem(name, shapes[name]), statistics=statistics[name])
            measure.add(name, problem, whole, {one: statistics[name].fit[one].gram() for one in measure.names})
        if progress:
            progress("measuring", (number + 1) / len(stages))
    return measure


class _Measure:
    """Normal equations of the merged change in the sources' own, summed over layers; every layer in which a concept acts counts alike."""

    def __init__(self, names: Sequence[str], adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
        self.names, self.adapters, self.weights = list(names), list(adapters), list(weights)
        count = len(self.names)
        self.inner = torch.zeros(count, count, count, dtype=torch.float64)  # of concept i: <D_k, D_l> on its features
        self.onto = torch.zeros(count, count, dtype=torch.float64)  # of concept i: <D, D_k>
        self.residuals: dict[str, dict[str, float]] = {name: {} for name in self.names}

    def problem(self, layer: str, shape: tuple[int, ...]) -> LayerProblem:
        layers = tuple(adapter.layers.get(layer) for adapter in self.adapters)
        return LayerProblem(layer, shape, tuple(self.names), layers, tuple(self.weights))

    def add(self, layer: str, problem: LayerProblem, merged: Adapter, grams: Mapping[str, Tensor] | None) -> None:
        """One layer, by the Grams of each concept's features, or by the weights themselves."""
        change = merged.layers[layer].delta(torch.float64).flatten(1) if layer in merged.layers else torch.zeros(problem.out, problem.width)
        own = LayerProblem(problem.layer, problem.shape, problem.concepts, problem.layers, (1.0,) * len(self.names)).deltas()
        targets, flat = torch.stack(own), change.double()
        meant = torch.stack(problem.deltas()).sum(0)
        for index, name in enumerate(self.names):
            seen = targets if grams is None else targets @ grams[name]
            inner = torch.einsum("koi,loi->kl", seen, targets)
            size = float(inner[index, index])
            if size > 0:
                self.inner[index] += inner / size
                self.onto[index] += torch.einsum("koi,oi->k", seen, flat) / size
                if grams is None and (norm := float(problem.delta(index).norm())) > 0:
                    self.residuals[name][layer] = float((flat - meant).norm()) / norm
        for key, value in residuals(problem, flat).items():
            kind, name = key.split("/", 1)
            if kind == "fit":
                self.residuals[name][layer] = value

    def mean(self) -> float:
        """Of all residuals, as `MergeResult.mean_residual`."""
        values = [value for mine in self.residuals.values() for value in mine.values()]
        return sum(values) / len(values) if values else 0.0

    def kept(self) -> tuple[Kept, ...]:
        found = []
        for index, name in enumerate(self.names):
            coefficients = torch.linalg.pinv(self.inner[index], hermitian=True) @ self.onto[index]
            mine = self.residuals[name]
            worst = max(mine, key=lambda layer: mine[layer]) if mine else ""
            mean = sum(mine.values()) / len(mine) if mine else 0.0
            strength = float(coefficients[index]) if mine else self.weights[index]
            found.append(Kept(name, self.weights[index], strength, mean, worst, mine.get(worst, 0.0)))
        return tuple(found)


def _underflows(layer: LoraLayer) -> bool:
    parts = [part for part in (layer.down, layer.up) if part.dtype == torch.float16]
    return any(0 < float(part.double().square().mean().sqrt()) < _SUBNORMAL for part in parts)


def _receipt(adapter: Adapter) -> dict[str, object]:
    try:
        receipt = json.loads(adapter.metadata.get(provenance.RECEIPT, "{}"))
    except ValueError:
        return {}
    return receipt if isinstance(receipt, dict) else {}


def _needs(receipt: Mapping[str, object]) -> frozenset[str]:
    try:
        return make_method(str(receipt["method"])).needs if "method" in receipt else frozenset()
    except LoraclrError:  # of a later version
        return frozenset()


def _collected(receipt: Mapping[str, object]) -> Collection:
    """What a merge by this method and seed collects for itself, without what only it needs."""
    usual = PAPER if {"rows", "short"} & _needs(receipt) else Collection()
    seed = receipt.get("seed")
    return dataclasses.replace(usual, preserve=(), sample=0, held_out=(), seed=seed if isinstance(seed, int) and seed >= 0 else 0)


def _promised(receipt: Mapping[str, object]) -> float | None:
    residual = receipt.get("residual")
    fit = residual.get("fit") if isinstance(residual, dict) else None
    return float(fit) if isinstance(fit, int | float) else None


def _meant(receipt: Mapping[str, object], name: str) -> float:
    """The weight that the receipt states for the input of that name, else 1."""
    inputs = receipt.get("inputs")
    for entry in inputs if isinstance(inputs, list) else []:
        if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get("weight"), int | float):
            return float(entry["weight"])
    return 1.0
