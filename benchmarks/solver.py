"""The closed form against the released code's optimiser, on synthetic layers of Stable Diffusion 1.5's shapes.

    python -m benchmarks.solver [--json FILE] [--quick] [--only KIND ...]

For every layer kind: `loraclr-reference:official` in float32 after 50 steps (the released code's number) and 300, against the optimum
of the very same objective (`loraclr:exact`; the extra 0.1 MSE is a factor on the data term), streaming of the Gram matrices included,
and against our default. Nothing is extrapolated. Features have a mean and rows that all concepts share, directions of each concept's
own, and a decaying spectrum; adapters look at the features they were trained on. `--quick` only checks that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loraclr.adapter import LoraLayer
from loraclr.memory import PeakMemory
from loraclr.methods import LayerProblem, LayerSolution, make_method, residuals
from loraclr.methods.loraclr_reference import LoraclrReference
from loraclr.statistics import LayerStats, Moments

CONCEPTS, RANK, SAMPLE = 12, 32, 256
DECAY = 0.75  # the k-th principal direction of what is not concept or mean has amplitude k^-DECAY
STEPS = (50, 300)
FASTER = {50: 30.0, 300: 100.0}  # the goals: times faster than so many steps


@dataclass(frozen=True)
class Kind:
    """A layer kind: out, in, and rows per concept. The released code collects 176 rows in the text encoder (2 prompts in 16 variants,
    unpadded), 6 for k/v, and 20 steps of all positions in the UNet: 81920, 20480, 5120 or 1280, of which we take what fits a benchmark."""

    name: str
    out: int
    width: int
    rows: int
    own: float  # rms of what is the concept's own in its features: much in text, little in pictures


KINDS = (
    Kind("text q/k/v/out", 768, 768, 176, 1.0),
    Kind("text fc1", 3072, 768, 176, 1.0),
    Kind("text fc2", 768, 3072, 176, 1.0),
    Kind("k/v 320", 320, 768, 6, 1.0),
    Kind("k/v 640", 640, 768, 6, 1.0),
    Kind("k/v 1280", 1280, 768, 6, 1.0),
    Kind("spatial 320", 320, 320, 4096, 0.3),
    Kind("spatial 640", 640, 640, 2048, 0.3),
    Kind("spatial 1280", 1280, 1280, 1280, 0.3),
)


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds (median), memory in MB above the inputs, residuals averaged over concepts."""

    kind: Kind
    seconds: dict[str, float]
    repeats: dict[str, int]
    peak_megabytes: dict[str, float]
    objective: dict[str, float]
    held_out: dict[str, float]
    certificate: str
    goals: dict[str, bool]


class Layer:
    """A synthetic layer: raw features per concept, adapters and base."""

    def __init__(self, kind: Kind, concepts: int, seed: int = 0) -> None:
        self.kind, self.names = kind, tuple(f"concept {index}" for index in range(concepts))
        make = torch.Generator().manual_seed(seed)
        width = kind.width

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make)

        decay = torch.arange(1, width + 1).float() ** -DECAY
        colour = torch.linalg.qr(draw(width, width))[0] * (decay / decay.square().mean().sqrt())[:, None]
        mean, common = draw(width), draw(kind.rows, width) @ colour
        own = [draw(4, width) for _ in self.names]  # what the concept's own tokens look like, at four places of a prompt or picture

        def rows(concept: int | None, shared: Tensor) -> Tensor:
            found: Tensor = mean + 0.7 * shared + 0.3 * draw(len(shared), width) @ colour
            if concept is None:
                return found
            strength = kind.own * (0.5 + torch.rand(len(shared), 1, generator=make))
            found += strength * own[concept][torch.arange(len(shared)) % 4]
            return found

        self.features = [rows(index, common) for index in range(concepts)]
        self.base = draw(kind.out, width) * width**-0.5
        layers = []
        for seen in self.features:
            down = draw(RANK, min(len(seen), 64)) @ seen[:64] / 8 + draw(RANK, width)
            up = draw(kind.out, RANK)
            layers.append(LoraLayer("layer", down, up, 0.05 * float(self.base.norm() / (up @ down).norm())))
        fresh = draw(max(256, kind.rows // 8), width) @ colour
        self.held_out = {name: Moments.of(rows(index, fresh)) for index, name in enumerate(self.names)}
        self.preserve = Moments.of(rows(None, draw(256, width) @ colour))
        self.problem = LayerProblem(
            "layer", (kind.out, width), self.names, tuple(layers), (1.0,) * concepts, self.base, LayerStats("layer", {}, self.held_out)
        )

    def raw(self) -> LayerProblem:
        """For the reference: all rows are the sample."""
        return self._with(LayerStats("layer", {}, self.held_out, None, dict(zip(self.names, self.features, strict=True))))

    def streamed(self) -> LayerProblem:
        """For the solver: the statistics, accumulated here and now, and a few paired rows."""
        fit = {}
        for name, rows in zip(self.names, self.features, strict=True):
            fit[name] = Moments.empty(self.kind.width)
            for part in rows.split(4096):
                fit[name] = fit[name] + Moments.of(part)
        sample = {name: rows[:SAMPLE] for name, rows in zip(self.names, self.features, strict=True)}
        return self._with(LayerStats("layer", fit, self.held_out, self.preserve, sample))

    def objective(self, delta: Tensor) -> float:
        """The released code's loss, without its rounding: float64."""
        rows, weight = torch.stack(self.features).double(), self.base.double()
        targets = rows @ (weight + torch.stack(self.problem.deltas())).mT
        reference = make_method("loraclr-reference:official")
        assert isinstance(reference, LoraclrReference)
        with torch.no_grad():
            return float(reference.loss(delta.double(), rows, weight, targets).total)

    def _with(self, stats: LayerStats) -> LayerProblem:
        return replace(self.problem, statistics=stats)


def timed(run: Callable[[], LayerSolution], repeats: int) -> tuple[LayerSolution, float]:
    """The last solution and the median time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        solution = run()
        times.append(time.perf_counter() - start)
    return solution, statistics.median(times)


def measure(kind: Kind, concepts: int, repeats: dict[str, int]) -> Row:
    layer = Layer(kind, concepts)
    factor = 1 + 0.1 / (kind.rows * kind.out)  # the data term plus 0.1 MSE is the data term times this
    exact = make_method("loraclr:exact", anchor="prediction", importance=(factor,) * concepts)
    default = make_method("loraclr")
    runs: dict[str, Callable[[], LayerSolution]] = {
        "exact": lambda: exact.solve(layer.streamed()),
        "default": lambda: default.solve(layer.streamed()),
    }
    for steps in STEPS:
        official = make_method("loraclr-reference:official", steps=steps)
        runs[f"official {steps}"] = lambda official=official: official.solve(layer.raw())  # type: ignore[misc]

    seconds, peak, objective, held_out = {}, {}, {}, {}
    certificate = ""
    for name, run in runs.items():
        solution, seconds[name] = timed(run, repeats[name])
        if name != f"official {STEPS[-1]}":  # more steps take no more memory
            with PeakMemory() as memory:
                run()
            peak[name] = memory.megabytes
        objective[name] = layer.objective(solution.delta())
        found = residuals(layer.problem, solution.delta())
        held_out[name] = statistics.mean(found[f"held_out/{concept}"] for concept in layer.names)
        if name == "exact":
            certificate = str(solution.diagnostics["certificate"])
    goals = {f">= {FASTER[n]:g}x {n} steps": seconds[f"official {n}"] / seconds["exact"] >= FASTER[n] for n in STEPS}
    goals["objective never higher"] = all(objective["exact"] <= objective[f"official {n}"] * (1 + 1e-9) for n in STEPS)
    goals["held-out residual lower"] = all(held_out["default"] < held_out[f"official {n}"] for n in STEPS)
    return Row(kind, seconds, repeats, peak, objective, held_out, certificate, goals)


def table(rows: list[Row]) -> Table:
    made = Table(title="optimum of the released objective against its optimiser")
    for column in (
        "layer",
        "out x in, rows",
        "exact / default s",
        *(f"official {n} s" for n in STEPS),
        "times faster",
        "peak MB",
        "objective",
    ):
        made.add_column(column)
    made.add_column("held-out residual")
    made.add_column("goals")
    for row in rows:
        names = ("exact", "default", *(f"official {n}" for n in STEPS))
        made.add_row(
            row.kind.name,
            f"{row.kind.out} x {row.kind.width}, {row.kind.rows}",
            f"{row.seconds['exact']:.3f} / {row.seconds['default']:.3f}",
            *(f"{row.seconds[f'official {n}']:.2f}" for n in STEPS),
            " / ".join(f"{row.seconds[f'official {n}'] / row.seconds['exact']:.0f}" for n in STEPS),
            " / ".join(f"{row.peak_megabytes[name]:.0f}" for name in ("exact", f"official {STEPS[0]}")),
            " / ".join(f"{row.objective[name]:.4g}" for name in ("exact", *names[2:])),
            " / ".join(f"{row.held_out[name]:.3f}" for name in names),
            " ".join(f"[green]pass[/] {goal}" if met else f"[red]FAIL[/] {goal}" for goal, met in row.goals.items()),
        )
    made.caption = (
        f"official: {STEPS[0]} and {STEPS[1]} AdamW steps in float32; objective: exact / official; residual: exact / default / official"
    )
    return made


def provenance() -> dict[str, object]:
    """What a number needs to be believed: commit, machine, versions."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit or "unknown",
        "machine": f"{platform.machine()}, {os.cpu_count()} cpus, {platform.system()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="small layers, one run each: does it run?")
    parser.add_argument("--only", nargs="*", help="layer kinds whose name starts with one of these")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if not options.only or kind.name.startswith(tuple(options.only))]
    concepts, repeats = CONCEPTS, {"exact": 5, "default": 5, "official 50": 3, "official 300": 1}
    if options.quick:
        kinds = [replace(kind, out=kind.out // 8, width=kind.width // 8, rows=max(kind.rows // 16, 6)) for kind in kinds]
        concepts, repeats = 4, dict.fromkeys(repeats, 1)
    measure(Kind("warm-up", 64, 64, 100, 1.0), 3, dict.fromkeys(repeats, 1))
    console, rows = Console(), []
    for kind in kinds:
        rows.append(measure(kind, concepts, repeats))
        faster = ", ".join(f"{rows[-1].seconds[f'official {n}'] / rows[-1].seconds['exact']:.0f}x {n} steps" for n in STEPS)
        console.print(f"{kind.name}: {rows[-1].seconds['exact']:.3f} s, {faster}")
    console.print(table(rows))
    if options.json:
        report = {**provenance(), "quick": options.quick, "concepts": concepts, "rank": RANK, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
