"""VERB. N adapters -> one adapter and its receipt. One loop over stages and layers: problem -> method -> factors -> receipt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from loraclr import __version__, disk
from loraclr.adapter import Adapter, Layer, LoraLayer
from loraclr.blocks import weighted
from loraclr.collect import ALL_ROWS, PAPER, REPEATED, Collection, Concept, check_held_out, collect, collection_for, stage_of
from loraclr.errors import MergeError, MergeWarning, UsageError
from loraclr.formats import check_layers, load_adapter, provenance, save_adapter, sidecar
from loraclr.formats.files import digest, tensor_digest
from loraclr.linalg import Truncation, factor, lowest_rank, truncate, truncate_aware, truncate_dense
from loraclr.lockstep import settled
from loraclr.memory import peak_memory
from loraclr.methods import METHODS, CrossTalk, make_method
from loraclr.methods.crosstalk import meeting, residuals_of, tables_of
from loraclr.methods.options import Checked
from loraclr.methods.problem import AdapterMethod, LayerProblem, LayerSolution, Method, Siblings, residuals
from loraclr.pipeline import Pipeline
from loraclr.predictions import model_problem
from loraclr.preflight import check_fit, concepts_of, nothing_left, union, without_base
from loraclr.refit import Refits, check_again, refitted, rounds_of
from loraclr.scratch import Scratch
from loraclr.statistics import LayerStats

TOLD = (*REPEATED, "under")  # of what was collected: in a file's header


FEW = 16  # adapters up to which a receipt has their cross-talk: it takes the cube of their number, and would outlast the merge


@dataclass(frozen=True)
class LayerReceipt:
    """What became of one layer."""

    layer: str
    stage: int
    adapted_by: tuple[str, ...]
    rank: int
    lost: float  # relative error of all that was cut off, by the method and to that rank, in the metric it was cut in
    rows: int  # collected rows of all concepts
    width: int  # input features; fewer rows than this leave the layer under-determined
    status: str
    advice: str
    residuals: Mapping[str, float]  # "fit/CONCEPT" and "held_out/CONCEPT": 0 is the adapter's own behaviour, 1 the base's
    cross_talk: Mapping[str, float]  # `CrossTalk.summary`
    diagnostics: Mapping[str, float | str | bool]
    distances: Mapping[str, list[list[float]]]  # with certificate=exact: "merged" and "alone", as docs/method.md says


def mean_residual(layers: Sequence[LayerReceipt], kind: str, *, concept: str | None = None) -> float:
    """The mean over layers and concepts (or of one concept) of the `fit` or `held_out` residual; NaN if none was measured."""
    values = [
        value
        for layer in layers
        for key, value in layer.residuals.items()
        if key.startswith(f"{kind}/") and concept in (None, key.split("/", 1)[1])
    ]
    return sum(values) / len(values) if values else float("nan")


@dataclass(frozen=True, eq=False)
class MergeResult:
    """The merged adapter, and enough to run the merge again."""

    adapter: Adapter
    method: str
    parameters: Mapping[str, Any]
    rank: int | None  # the most that was asked for
    base: str | None
    inputs: tuple[Mapping[str, Any], ...]  # name, file, sha256, tensor_sha256, weight, block_weights, call
    layers: tuple[LayerReceipt, ...]
    versions: Mapping[str, str]
    seed: int
    collection: Mapping[str, Any] | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    cross_talk: CrossTalk | None = None  # over all layers, where features were collected and adapters are FEW
    memory: Mapping[str, int | None] = field(default_factory=dict)  # bytes: the process's `peak` so far, and the most on the `disk`

    def mean_residual(self, kind: str = "held_out", *, concept: str | None = None) -> float:
        """`mean_residual` of all layers."""
        return mean_residual(self.layers, kind, concept=concept)

    def receipt(self) -> dict[str, Any]:
        """Everything, ready for JSON. Numbers that JSON has no word for are None (not measured) or the text `inf`."""
        whole = {
            "method": self.method,
            "parameters": dict(self.parameters),
            "rank": self.rank,
            "base": self.base,
            "seed": self.seed,
            "inputs": [dict(entry) for entry in self.inputs],
            "triggers": list(self.adapter.triggers),
            "collection": self.collection,
            "versions": dict(self.versions),
            "residual": {kind: _rounded(self.mean_residual(kind)) for kind in ("fit", "held_out")},
            "cross_talk": None if self.cross_talk is None else disk.plain(self.cross_talk.report(), digits=6),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "seconds": dict(self.seconds),
            "memory": dict(self.memory),
        }
        plain: dict[str, Any] = disk.plain(whole)
        return plain

    @property
    def _told(self) -> tuple[str, ...]:
        """What a file's header says of the collection: the prompts, but not the released code's where its method takes those."""
        if self.collection is None:
            return TOLD
        usual = self.method in METHODS and collection_for(make_method(self.method).needs).fit == PAPER.fit
        return TOLD if usual and tuple(self.collection["fit"]) == PAPER.fit else (*TOLD, "fit")

    @property
    def prompt(self) -> str:
        """One to begin with."""
        return provenance.prompt([str(entry["call"]) for entry in self.inputs])

    def header(self) -> dict[str, str]:
        """The compact receipt for the file's own header: no timings and no paths, so that equal merges are equal bytes."""
        compact = {
            "method": self.method,
            "parameters": dict(self.parameters),
            "rank": self.rank,
            "seed": self.seed,
            "inputs": [{key: value for key, value in entry.items() if key != "file"} for entry in self.inputs],
            "residual": {kind: _rounded(self.mean_residual(kind)) for kind in ("fit", "held_out")},
            "versions": dict(self.versions),
            "collection": {key: value for key, value in self.collection.items() if key in self._told} if self.collection else None,
        }
        return {
            provenance.RECEIPT: json.dumps(disk.plain(compact), sort_keys=True, allow_nan=False),
            "modelspec.title": self.adapter.name,
            "modelspec.description": f"{len(self.inputs)} adapters merged by loraclr {__version__}, method {self.method}",
            "modelspec.trigger_phrase": ", ".join(self.adapter.triggers),
            "modelspec.usage_hint": provenance.usage([str(entry["call"]) for entry in self.inputs]),
        }

    def save(self, path: str | Path, *, format: str = "kohya", dtype: torch.dtype = torch.float16, sources: bool = True) -> Path:
        """The adapter's file with the compact receipt in its header, and the whole receipt in PATH.json beside it: all or nothing.

        Without `sources` the file itself says nothing of the adapters it was made of; the receipt beside it still does. Errors are those
        of `save_adapter`.
        """
        target = Path(path)
        adapter, header = self.adapter, self.header()
        if not sources:
            adapter, header = adapter.with_(metadata=provenance.withheld(adapter.metadata)), provenance.withheld(header)
        receipt = target.with_name(f"{target.name}.json")
        with disk.reserved(target, receipt, sidecar.path_for(target)), disk.together():
            disk.write(receipt, json.dumps(self.receipt(), indent=1, sort_keys=True, allow_nan=False) + "\n")
            return save_adapter(adapter, target, format=format, dtype=dtype, metadata=header)


def merge(
    adapters: Sequence[Adapter | str | Path],
    *,
    base: Pipeline | None = None,
    method: str | Method = "loraclr",
    parameters: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    block_weights: Mapping[str, Sequence[float]] | None = None,
    calls: Mapping[str, str] | None = None,
    rank: int | None = None,
    seed: int | None = None,
    collection: Collection | None = None,
    score: Callable[[Adapter], float] | None = None,
    measure: bool = False,
    allow: Sequence[str] = (),
    format: str | None = None,
    name: str = "merged",
    progress: Callable[[str, float], None] | None = None,
    scratch: str | Path | None = None,
    statistics: Mapping[str, LayerStats] | None = None,
) -> MergeResult:
    """Merge adapters (or their files) into one.

    `weights` scale each adapter's change, 1 by default; `block_weights`, by adapter name, multiply that by block: BASE, then the UNet's
    attention blocks in the order down, mid, up, as `blocks.py` says. `calls` gives, by adapter name, the words that call it in a prompt;
    otherwise its learned tokens or its first trigger. `rank` is the most that the result may have per layer; without it a low-rank
    solution keeps its exact rank and a dense one gets the sum of the input ranks. `measure` collects statistics also for methods
    that need none, to report residuals. `collection` says what is collected; without it, methods that want all rows get the
    released code's prompts. `score` judges a merged adapter, higher is better, for a method that searches (`lorahub`). `allow` makes
    warnings of refusals that are judgements, those in `JUDGED` of `preflight.py`. `format` is the one it will be saved in:
    layers that it cannot hold are a FormatError before any work. `progress` is told a phase and its share done, 0..1.
    `scratch` is a folder for what does not fit into memory, the system's for temporary files without it; nothing stays there.
    `statistics`, by layer, are used instead of collecting any (pack.py). Raises MergeError, UsageError.
    """
    started = time.perf_counter()
    solver = make_method(method, **(parameters or {})) if isinstance(method, str) else method
    if not isinstance(method, str) and parameters:
        raise UsageError("parameters go with a method's name; a method that is already made has its own")
    sources = [
        (adapter, None, None) if isinstance(adapter, Adapter) else (load_adapter(adapter, base=base), Path(adapter), _hashes(Path(adapter)))
        for adapter in adapters  # the hashes now: the file may be another one by the end
    ]
    prompted = bool({"statistics", "sample", "predictions"} & solver.needs) or measure
    concepts = concepts_of([adapter for adapter, *_ in sources], weights, calls or {}, needed=prompted, base=base, allow=allow)
    if isinstance(solver, Checked):
        solver.check(len(concepts))
        solver.check_tokens(sum(len(concept.adapter.tokens) for concept in concepts))
    if block_weights:
        attentions = None if base is None else base.cross_attention_layers
        concepts = [
            dataclasses.replace(concept, adapter=adapter)
            for concept, adapter in zip(concepts, weighted([c.adapter for c in concepts], block_weights, attentions), strict=True)
        ]
    shapes = union([concept.adapter for concept in concepts])
    stated = (concept.adapter.family for concept in concepts if concept.adapter.family)
    family = next(stated, None if base is None else base.family)
    if format is not None and shapes:
        check_layers(shapes, format, family=family)
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: give at least 1")
    if rank is not None and "rank" in _fields(solver) and _fields(solver)["rank"] is None:
        solver = dataclasses.replace(solver, rank=rank)  # type: ignore[type-var]  # it cuts by itself: once is enough
    collecting = statistics is None and (measure or bool({"statistics", "sample", "preserve"} & solver.needs))
    if score is not None and "score" not in solver.needs:
        raise UsageError(f"{solver.name} searches for nothing, so it takes no score; use lorahub")
    if base is None and (collecting or "base" in solver.needs):
        raise without_base(solver.name, measure=not solver.needs & {"base", "statistics", "sample", "preserve"})
    settings = collection or collection_for(solver.needs)
    seed = settings.seed if seed is None else seed
    settings = dataclasses.replace(
        settings,
        seed=seed,
        sample=ALL_ROWS if "rows" in solver.needs else settings.sample if "sample" in solver.needs else 0,
        preserve=settings.preserve if "preserve" in solver.needs else (),
    )
    if isinstance(solver, Refits):
        solver = dataclasses.replace(solver, rounds=rounds_of(solver, base if collecting else None, shapes, settings))  # type: ignore[type-var]
    stages = [list(shapes)] if base is None else base.stages(list(shapes))
    if base is not None:
        check_fit(shapes, base)
        if "predictions" in solver.needs and score is None:
            base.check_plain(f"method {solver.name!r}")
        if collecting and "held_out" in solver.needs:
            check_held_out(settings, [stage_of(base, names) for names in stages])
        if "gaps" in solver.needs:
            check_again(base, shapes, settings)
    seconds = {"load": time.perf_counter() - started, "collect": 0.0, "solve": 0.0}
    solved: dict[str, LayerSolution] = {}
    if isinstance(solver, AdapterMethod) and base is not None:
        began = time.perf_counter()
        layers = {layer: _problem(layer, shapes, concepts, base, None, seed) for layer in shapes}
        solved = solver.solve_model(model_problem(base, concepts, layers, settings=settings, score=score))
        seconds["solve"] += time.perf_counter() - began
    merged: dict[str, Layer] = {}
    receipts: list[LayerReceipt] = []
    talk: CrossTalk | None = None
    spilled = 0
    for stage, names in enumerate(stages):
        room = Scratch(scratch)  # closed by itself where an error ends the merge
        seen: Mapping[str, LayerStats] = statistics or {}
        if collecting and base is not None:
            began, done = time.perf_counter(), 0

            def tell(what: str, stage: int = stage) -> None:
                nonlocal done
                done += 1
                if progress:
                    progress(f"collecting stage {stage + 1} of {len(stages)}: {what}", done / (len(concepts) + 1))

            seen = collect(base, concepts, names, settings=settings, merged=merged, progress=tell, scratch=room)
            seconds["collect"] += time.perf_counter() - began
        began = time.perf_counter()
        siblings = Siblings()

        def problem_of(layer: str, seen: Mapping[str, LayerStats] = seen, siblings: Siblings = siblings) -> LayerProblem:
            return dataclasses.replace(_problem(layer, shapes, concepts, base, seen.get(layer), seed), siblings=siblings)

        problems = map(problem_of, _together(names, seen) if collecting else names)  # what is given may be on disk
        pairs: Iterable[tuple[LayerProblem, LayerSolution]] = (
            (problem, solved[problem.layer] if isinstance(solver, AdapterMethod) else solver.solve(problem)) for problem in problems
        )
        if base is not None and "lockstep" in solver.needs:
            if progress:
                progress(f"certifying stage {stage + 1} of {len(stages)}", 0.0)
            pairs = [(dataclasses.replace(problem), solution) for problem, solution in pairs]  # without the factors it has made
            second = time.perf_counter()
            pairs = settled(base, concepts, pairs, settings=settings, merged=merged)
            spent = time.perf_counter() - second
            seconds["certify"], began = seconds.get("certify", 0.0) + spent, began + spent
        if base is not None and isinstance(solver, Refits) and "gaps" in solver.needs and stage_of(base, names) == "spatial":
            again = refitted(
                base, concepts, names, method=solver, problem=problem_of, settings=settings, merged=merged, progress=progress, scratch=room
            )  # fmt: skip
            pairs = chain(pairs, again)
        found: dict[str, tuple[LayerReceipt, CrossTalk | None]] = {}
        for index, (problem, solution) in enumerate(pairs):
            merged[problem.layer], receipt, heard = _receipt(problem, solution, solver.name, rank, stage)
            found[problem.layer] = receipt, heard
            if progress and index < len(names):
                progress(f"solving stage {stage + 1} of {len(stages)}", (index + 1) / len(names))
        for receipt, heard in (found[name] for name in names):
            receipts.append(receipt)
            talk = heard if talk is None or heard is None else talk + heard
        seconds["solve"] += time.perf_counter() - began
        spilled = max(spilled, room.written)
        room.close()
    if said := nothing_left(solver, [source for source, *_ in sources], list(merged.values()), told=all(row.advice for row in receipts)):
        warnings.warn(said, MergeWarning, stacklevel=2)
    return MergeResult(
        Adapter(
            merged,
            name=name,
            tokens={token: rows for concept in concepts for token, rows in concept.adapter.tokens.items()},
            triggers=tuple(dict.fromkeys(words for concept in concepts for words in (concept.call, *concept.adapter.triggers) if words)),
            family=family,
            metadata=provenance.joined([concept.adapter for concept in concepts]),
        ),
        solver.name,
        _fields(solver),
        rank,
        None if base is None else base.source,
        tuple(
            {
                "name": concept.name,
                "file": None if path is None else path.name,
                "sha256": hashes and hashes[0],
                "tensor_sha256": hashes and hashes[1],
                "weight": concept.weight,
                "block_weights": list((block_weights or {}).get(concept.name, ())) or None,
                "call": concept.call,
            }
            for concept, (_, path, hashes) in zip(concepts, sources, strict=True)
        ),
        tuple(receipts),
        {
            "loraclr": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **({name: version(name) for name in ("diffusers", "transformers")} if base is not None else {}),
        },
        seed,
        dataclasses.asdict(settings) if collecting or prompted else None,
        {key: round(value, 3) for key, value in seconds.items()},
        talk,
        {"peak": peak_memory(), "disk": spilled},
    )


def _hashes(path: Path) -> tuple[str, str | None]:
    """Of the whole file, and of its tensors alone."""
    return digest(path), tensor_digest(path)


def _together(names: Sequence[str], seen: Mapping[str, LayerStats]) -> list[str]:
    """`names`, those that saw the very same rows one after the other."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(map(id, seen[name].fit.values())) if name in seen else (), []).append(name)
    return [name for group in groups.values() for name in group]


def _problem(
    layer: str,
    shapes: Mapping[str, tuple[int, ...]],
    concepts: Sequence[Concept],
    base: Pipeline | None,
    statistics: LayerStats | None,
    seed: int,
) -> LayerProblem:
    return LayerProblem(
        layer,
        shapes[layer],
        tuple(concept.name for concept in concepts),
        tuple(concept.adapter.layers.get(layer) for concept in concepts),
        tuple(concept.weight for concept in concepts),
        base.base_weight(layer).flatten(1).cpu() if base is not None else None,
        statistics,
        torch.Generator().manual_seed(_seed_of(layer, seed)),
    )


def _receipt(
    problem: LayerProblem, solution: LayerSolution, method: str, rank: int | None, stage: int
) -> tuple[Layer, LayerReceipt, CrossTalk | None]:
    parts = [part for part in (solution.change, solution.up, solution.down) if part is not None]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise MergeError(f"{problem.layer}: {method} gave NaN or infinity; raise its regularisation or check this layer of the inputs")
    exact_up, exact_down, lost = file_factors(problem, solution, rank)
    up, down = exact_up.float(), exact_down.float()  # all layers together have no room in double precision; judged is what is kept
    layer: Layer = LoraLayer(
        problem.layer,
        down.view(-1, *problem.shape[1:]),
        up.view(*up.shape, *([1, 1] if len(problem.shape) == 4 else [])),
    )
    moments = list(problem.statistics.fit.values()) if problem.statistics else []
    tables = tables_of(problem, up, down) if problem.statistics and len(problem.concepts) <= FEW else None
    heard = None if tables is None else meeting(tables, problem.concepts, len(problem.concepts))
    apart = residuals(problem, (up, down), ("fit", "held_out") if tables is None else ("held_out",))
    if tables is not None:
        apart |= {f"fit/{concept}": value for concept, value in residuals_of(tables, problem.concepts, len(problem.concepts)).items()}
    diagnostics = {**solution.diagnostics, **({"sketched": True} if any(m.sketched for m in moments) else {})}  # else exact
    receipt = LayerReceipt(
        problem.layer,
        stage,
        tuple(concept for concept, own in zip(problem.concepts, problem.layers, strict=True) if own is not None),
        up.shape[1],
        _rounded((solution.lost**2 + (1 - solution.lost**2) * lost**2) ** 0.5),  # what both cuts take away is orthogonal
        sum(m.count for m in moments),
        problem.width,
        solution.status,
        solution.advice,
        {key: _rounded(value) for key, value in sorted(apart.items())},
        {key: _rounded(value) for key, value in heard.summary().items()} if heard else {},
        {key: _rounded(value) if isinstance(value, float) else value for key, value in diagnostics.items()},
        {} if (exact := solution.distances) is None else {"merged": _table(exact.found), "alone": _table(exact.natural)},
    )
    return layer, receipt, heard


def file_factors(problem: LayerProblem, solution: LayerSolution, rank: int | None = None) -> Truncation:
    """The solution as float64 up (out, rank) and down (rank, in), as the merged file has them: exact where it can be, else cut where it
    hurts least. A dense one is cut to `rank`, or without that to the sum of the input ranks.
    """
    if solution.change is None:
        assert solution.up is not None and solution.down is not None
        up, down = lowest_rank(solution.up, solution.down)
        limit = rank or up.shape[1]
    else:
        limit = rank or sum(layer.rank for layer in problem.layers if layer is not None)
        if problem.statistics is None:
            up, down, lost = truncate_dense(solution.change, limit)
            if lost:
                return Truncation(up, down, lost)
        else:
            up, down = factor(solution.change)
    if up.shape[1] == 0:
        nothing = torch.zeros(problem.out, 1, dtype=torch.float64), torch.zeros(1, problem.width, dtype=torch.float64)
        return Truncation(*nothing, 0.0)
    if limit >= up.shape[1]:
        return Truncation(up, down, 0.0)
    if solution.metric is not None:
        return truncate_aware(up, down, limit, metric=solution.metric())
    if problem.statistics is None:
        return truncate(up, down, limit)
    per_row = [m.scaled(1 / m.count) for m in problem.statistics.fit.values() if m.count]
    metric = sum((m.gram() for m in per_row[1:]), per_row[0].gram())
    return truncate_aware(up, down, limit, metric=metric, mu=1e-3 * float(metric.diagonal().mean()))


def _fields(solver: Method) -> dict[str, Any]:
    return {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)}  # type: ignore[arg-type]


def _seed_of(layer: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}".encode()).digest()[:7], "big")


def _table(values: torch.Tensor) -> list[list[float]]:
    return [[_rounded(value) for value in row] for row in values.tolist()]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
