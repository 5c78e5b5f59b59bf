"""Every method that solves layer by layer, on layers of Stable Diffusion 1.5's shapes, beside PEFT.

    python -m benchmarks.methods [--json FILE] [--quick] [--only METHOD ...]

Methods that look at features get synthetic ones (benchmarks/solver.py), ready as statistics. The last row is `loraclr` for all attention
layers of the UNet from Grams on disk (benchmarks/ready.py). Left out: methods that see the whole model, and `pplus`, which touches no
weights. Twelve LoRAs of mixed ranks per layer. Ours is timed from the adapters' factors to the factors of the merged
file, PEFT's is the whole of its `add_weighted_adapter` with the type of the same meaning (those that vote or prune on deltas, "_svd"; for
these ours is cut to the same rank). PEFT keeps its weights in float32, we solve in float64. The error is against the exact weighted sum of
the deltas, for methods that aim at it. Seconds are medians. Memory is the peak above the inputs, in a process of its own that did nothing
before but the same on a tiny layer; unknown where the system does not tell. `--quick` only checks that it runs, and judges no goal.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import ready
from benchmarks.solver import SAMPLE, Kind, Layer, provenance, timed
from loraclr.adapter import LoraLayer
from loraclr.memory import PeakMemory
from loraclr.merge import file_factors
from loraclr.methods import METHODS, LayerMethod, LayerProblem, LayerSolution, make_method
from loraclr.methods.describe import needs_base

RANKS = (4, 4, 8, 8, 8, 16, 16, 32, 32, 32, 64, 64)
SHAPES = {
    "attention 320": (320, 320),
    "k/v 320": (320, 768),
    "attention 640": (640, 640),
    "k/v 1280": (1280, 768),
    "attention 1280": (1280, 1280),
    "feed-forward 640": (640, 2560),
}
FEATURES = {  # rows a concept, and how much of them is its own: where methods that look at features are measured, too
    "attention 320": (4096, 0.3),
    "k/v 320": (300, 1.0),
    "attention 640": (2048, 0.3),
    "k/v 1280": (300, 1.0),
    "attention 1280": (1600, 0.3),
}
CUT = 64  # the rank to which dense merges and `svd` are cut, ours and PEFT's
PEFTS = {
    "sum": "cat",
    "svd": "svd",
    "ties": "ties_svd",
    "dare-linear": "dare_linear_svd",
    "dare-ties": "dare_ties_svd",
    "magnitude-prune": "magnitude_prune_svd",
    "linear": "linear",
}
SUMS = ("sum", "orthogonal", "svd", "dare-linear", "magnitude-prune", "linear")
GOALS = {("svd", (1280, 1280)): 10.0}  # times as fast as PEFT; where not said, not slower
DENSITY = 0.3


@dataclass(frozen=True)
class Row:
    """One method on one layer. Seconds and megabytes, ours and PEFT's; errors against the exact sum."""

    layer: str
    method: str
    seconds: float
    megabytes: float | None
    rank: int
    error: float | None
    peft_seconds: float | None
    peft_megabytes: float | None
    peft_error: float | None
    apart: float | None  # relative distance of ours and PEFT's, where both are deterministic
    goal: bool | None


def problem(shape: tuple[int, int], ranks: tuple[int, ...], name: str = "unet.layer", seed: int = 0) -> LayerProblem:
    """Adapters as large as trained ones: each 5 % of a weight of variance 1 / in."""
    make = torch.Generator().manual_seed(seed)
    out, width = shape
    layers = []
    for rank in ranks:
        down, up = torch.randn(rank, width, generator=make), torch.randn(out, rank, generator=make)
        layers.append(LoraLayer(name, down, up * (0.05 * out**0.5 / float((up @ down).norm()))))  # in `up`: `linear` looks at factors
    names = tuple(f"concept{index}" for index in range(len(ranks)))
    return LayerProblem(name, shape, names, tuple(layers), (1.0,) * len(ranks), generator=torch.Generator().manual_seed(seed))


class Peft:
    """The same adapters in PEFT, on one linear layer."""

    def __init__(self, given: LayerProblem) -> None:
        from peft import LoraConfig, get_peft_model

        base = nn.Sequential(nn.Linear(given.width, given.out, bias=False))
        for index, (name, layer) in enumerate(zip(given.concepts, given.layers, strict=True)):
            assert isinstance(layer, LoraLayer)
            config = LoraConfig(r=layer.rank, lora_alpha=layer.rank, target_modules=["0"])
            if index:
                self.model.add_adapter(name, config)
            else:
                self.model: Any = get_peft_model(base, config, adapter_name=name)
            module = self.model.base_model.model[0]
            module.lora_A[name].weight.data.copy_(layer.down)
            module.lora_B[name].weight.data.copy_(layer.up)
        self.names = list(given.concepts)

    def merge(self, kind: str, rank: int) -> Tensor:
        """(out, in), float64. PEFT does nothing where the name is taken, so that it is freed first."""
        if "merged" in self.model.peft_config:
            self.model.delete_adapter("merged")
        settings: dict[str, object] = {"svd_rank": rank} if kind.endswith("svd") else {}
        if kind.startswith(("ties", "dare", "magnitude")):
            settings["density"] = DENSITY
        self.model.add_weighted_adapter(self.names, [1.0] * len(self.names), "merged", combination_type=kind, **settings)
        module = self.model.base_model.model[0]
        product: Tensor = module.lora_B["merged"].weight.detach().double() @ module.lora_A["merged"].weight.detach().double()
        return product * module.scaling["merged"]


def with_features(given: LayerProblem, layer: Layer, method: str) -> LayerProblem:
    """The adapters of `given` and what `layer` saw: all rows for a method that wants them, else statistics and a few paired rows."""
    seen = layer.streamed()
    assert seen.statistics is not None
    if "rows" in METHODS[method]().needs:
        rows = dict(zip(seen.concepts, layer.features, strict=True))
        seen = replace(seen, statistics=replace(seen.statistics, sample=rows))
    return replace(seen, layer=given.layer, layers=given.layers)


@dataclass(frozen=True)
class Case:
    """One method on one layer: what a row is made from, in any process."""

    layer: str
    shape: tuple[int, int]
    method: str
    ranks: tuple[int, ...]
    seen: Kind | None = None  # by methods that look at features

    @property
    def most(self) -> int:
        """The rank to cut to: PEFT's "svd" types raise where it is above out or in."""
        return min(CUT, min(self.shape) // 2)

    def tiny(self) -> Case:
        kind = self.seen and replace(self.seen, out=64, width=48, rows=64)
        return replace(self, shape=(64, 48), ranks=(2, 4, 4), seen=kind)

    def given(self) -> LayerProblem:
        """`linear` and PEFT's type of that name can only add factors of one rank: all get the mean rank."""
        count = len(self.ranks)
        ranks = (max(sum(self.ranks) // count, 1),) * count if self.method == "linear" else self.ranks
        found = problem(self.shape, ranks, "unet.attn2.to_k" if self.layer.startswith("k/v") else "unet.layer")
        return found if self.seen is None else with_features(found, Layer(self.seen, count), self.method)

    def ours(self, given: LayerProblem) -> Callable[[], LayerSolution]:
        fields = METHODS[self.method].__dataclass_fields__  # type: ignore[attr-defined]
        cut = self.most if "density" in fields and self.method not in ("knots", "core-space") else None
        parameters: dict[str, object] = ({"density": DENSITY} if "density" in fields else {}) | (
            {"rank": self.most} if self.method == "svd" else {}
        )
        made = make_method(self.method, **parameters)

        def run() -> LayerSolution:
            fresh = replace(given)  # factors are kept once they are made
            up, down, _ = file_factors(fresh, made.solve(fresh), cut)
            return LayerSolution(up, down)

        return run

    def theirs(self, given: LayerProblem) -> Callable[[], LayerSolution]:
        peft = Peft(given)
        return lambda: LayerSolution(change=peft.merge(PEFTS[self.method], self.most))


def megabytes(case: Case, peft: bool = False) -> float | None:
    """What the case takes above its inputs, by us or by PEFT: in a process of its own, as memory that was used may count for the next."""
    server = "forkserver" in get_all_start_methods()
    ways = get_context("forkserver" if server else "spawn")
    if server:
        ways.set_forkserver_preload(["benchmarks.ready", "peft"])  # imported once, and nothing else done there
    with ProcessPoolExecutor(1, mp_context=ways) as alone:
        found = alone.submit(_taken, case, peft).result()
    return None if math.isnan(found) else found


def _taken(case: Case, peft: bool) -> float:
    for one in (case.tiny(), case):  # the first: what libraries set up once
        given = one.given()
        run = one.theirs(given) if peft else one.ours(given)
        with PeakMemory() as memory:
            run()
    return memory.megabytes


def measure(case: Case, repeats: int) -> Row:
    given = case.given()
    run = case.ours(given)
    solution, seconds = timed(run, repeats)
    exact = torch.stack(given.deltas()).sum(0)
    summed = case.method in SUMS
    error = _relative(solution.delta(), exact) if summed else None
    peft_seconds = peft_megabytes = peft_error = apart = None
    goal = None
    if case.method in PEFTS:
        found, peft_seconds = timed(case.theirs(given), repeats)
        peft_megabytes = megabytes(case, peft=True)
        peft_error = _relative(found.delta(), exact) if summed else None
        apart = None if case.method.startswith("dare") else _relative(solution.delta(), found.delta())
        goal = peft_seconds / seconds >= wanted(case.method, case.shape)
    assert solution.up is not None
    rank = solution.up.shape[1]
    return Row(case.layer, case.method, seconds, megabytes(case), rank, error, peft_seconds, peft_megabytes, peft_error, apart, goal)


def wanted(method: str, shape: tuple[int, int]) -> float:
    """How many times as fast as PEFT."""
    return GOALS.get((method, shape), 1.0)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def table(rows: list[Row]) -> Table:
    made = Table(title="merges layer by layer, beside PEFT's add_weighted_adapter")
    for column in (
        "layer",
        "method",
        "s",
        "PEFT s",
        "times faster",
        "MB",
        "PEFT MB",
        "rank",
        "error to the sum",
        "PEFT's",
        "apart",
        "goal",
    ):
        made.add_column(column)
    show: Callable[[float | None, str], str] = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    for row in rows:
        faster = None if row.peft_seconds is None else row.peft_seconds / row.seconds
        made.add_row(
            row.layer,
            row.method,
            f"{row.seconds:.4f}",
            show(row.peft_seconds, ".4f"),
            show(faster, ".1f"),
            show(row.megabytes, ".1f"),
            show(row.peft_megabytes, ".1f"),
            str(row.rank),
            show(row.error, ".1e"),
            show(row.peft_error, ".1e"),
            show(row.apart, ".1e"),
            {None: "-", True: "[green]pass[/]", False: "[red]FAIL[/]"}[row.goal],
        )
    return made


def by_layer() -> list[str]:
    """The methods that solve layer by layer and change weights, in the order in which they are listed everywhere."""
    return [name for name, method in METHODS.items() if isinstance(method(), LayerMethod) and name != "pplus"]


def verdicts(rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """Of every goal whether it is met, and by what: a method's on all layers without a number of its own are one."""
    own = {(method, f"{out} x {width}"): times for (method, (out, width)), times in GOALS.items()}
    found: list[tuple[bool, str]] = []
    for method in PEFTS:
        judged = [row for row in rows if row.method == method and row.goal is not None]
        faster = {row: (row.peft_seconds or math.nan) / row.seconds for row in judged}
        usual = [row for row in judged if (method, row.layer.split(", ")[-1]) not in own]
        for row in judged:
            if row not in usual:
                times = own[method, row.layer.split(", ")[-1]]
                found.append((bool(row.goal), f"{method}, {row.layer}: {times:g} times as fast as PEFT (here {faster[row]:.1f})"))
        if usual:
            slow = [row for row in usual if not row.goal]
            told = [f"{faster[row]:.2f} on {row.layer.split(', ')[0]}" for row in slow or [min(usual, key=lambda row: faster[row])]]
            share = f"{len(usual) - len(slow)} of {len(usual)} layers"
            found.append((not slow, f"{method}: not slower than PEFT, {share} ({'' if slow else 'at least '}{', '.join(told)})"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="two small layers, one run each: does it run?")
    parser.add_argument("--only", nargs="*", choices=by_layer(), metavar="METHOD", help="only these methods")
    options = parser.parse_args()
    methods = [name for name in by_layer() if not options.only or name in options.only]
    shapes, ranks, repeats = SHAPES, RANKS, 3
    if options.quick:
        shapes, ranks, repeats = {"small": (160, 96), "wide": (80, 192)}, (4, 8, 8, 16), 1
    console, rows = Console(width=None if sys.stdout.isatty() else 160), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        measure(Case("warm-up", (64, 48), "svd", (2, 4)), 1)
        for layer, shape in shapes.items():
            name = f"{layer}, {shape[0]} x {shape[1]}"
            kind = Kind(layer, *shape, *FEATURES.get(layer, (SAMPLE, 1.0))) if layer in FEATURES or options.quick else None
            rows += [measure(Case(name, shape, method, ranks), repeats) for method in methods if not needs_base(METHODS[method])]
            if kind is not None:
                rows += [measure(Case(name, shape, method, ranks, kind), 1) for method in methods if needs_base(METHODS[method])]
            console.print(f"{layer}: done")
    if options.quick:
        rows = [replace(row, goal=None) for row in rows]
    console.print(table(rows))
    settings: dict[str, object] = {"ranks": ranks, "cut": CUT, "density": DENSITY, "quick": options.quick}
    if "loraclr" in methods:
        whole = ready.measure(options.quick)
        ready.show(whole, console)
        settings["ready"] = asdict(whole)
    for met, goal in verdicts(rows):
        console.print(f"{'[green]pass[/]' if met else '[red]FAIL[/]'}: {goal}")
    if options.json:
        options.json.write_text(json.dumps({**provenance(), **settings, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
