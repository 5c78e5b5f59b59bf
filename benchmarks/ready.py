"""`loraclr` for all attention layers of Stable Diffusion 1.5's UNet, from statistics that are on disk already.

    python -m benchmarks.ready [--json FILE] [--quick]

128 layers, twelve LoRAs of mixed ranks, fit and held-out Grams of every concept and preservation, every distinct input with its own: half
a Gram each, in one scratch file. Timed is what the merge does with them: solve, factors of the file, and (apart) the residuals of the
receipt. Memory is the peak above what was there when the Grams were. The layers' Grams are drawn once per width and written as often as
there are inputs. `--quick` only checks that it runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.solver import Kind, Layer, provenance
from loraclr.adapter import LoraLayer
from loraclr.memory import PeakMemory
from loraclr.merge import file_factors
from loraclr.methods import LayerProblem, make_method, residuals
from loraclr.methods.problem import LayerMethod
from loraclr.scratch import Scratch
from loraclr.statistics import LayerStats, Moments

RANKS = (4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 64, 64)
BLOCKS = {320: 5, 640: 5, 1280: 6}  # attention blocks of each width
# Inputs of a block: (how many layers are handed it, whether it is text).
INPUTS = ((3, False), (1, False), (1, False), (2, True), (1, False))  # attn1 q/k/v, attn1 out, attn2 q, attn2 k/v, attn2 out
TEXT_ROWS, TEXT_WIDTH = 300, 768
GOALS = {"solve_seconds": 20.0, "megabytes": 1000.0}


@dataclass(frozen=True)
class Ready:
    layers: int
    disk_megabytes: float
    solve_seconds: float
    residual_seconds: float
    megabytes: float
    goals: dict[str, bool]


def problems(room: Scratch, quick: bool) -> Iterator[LayerProblem]:
    """One layer after the other; its statistics are in `room`."""
    for width, blocks in BLOCKS.items():
        out = width // 16 if quick else width
        spatial = Layer(Kind("", out, out, out * 5 // 4, 0.3), len(RANKS)).streamed()
        text = Layer(Kind("", out, TEXT_WIDTH // 16 if quick else TEXT_WIDTH, TEXT_ROWS // 16 if quick else TEXT_ROWS, 1.0), len(RANKS))
        worded = text.streamed()
        for _ in range(blocks):
            for count, is_text in INPUTS:
                given = worded if is_text else spatial
                stats = stored(given, room)
                for _ in range(count):
                    yield replace(given, layers=mixed(given), statistics=stats)


def mixed(given: LayerProblem) -> tuple[LoraLayer, ...]:
    """The layer's adapters, cut to mixed ranks."""
    found = []
    for layer, rank in zip(given.layers, RANKS, strict=True):
        assert isinstance(layer, LoraLayer)
        found.append(LoraLayer(layer.name, layer.down[:rank].repeat(2, 1)[:rank], layer.up[:, :rank].repeat(1, 2)[:, :rank], layer.scale))
    return tuple(found)


def stored(given: LayerProblem, room: Scratch) -> LayerStats:
    def put(moments: Moments) -> Moments:
        return room.moments({"": moments})[""]

    stats = given.statistics
    assert stats is not None
    assert stats.preserve is not None
    kinds = ({name: put(moments) for name, moments in kind.items()} for kind in (stats.fit, stats.held_out))
    return LayerStats(stats.layer, *kinds, put(stats.preserve), stats.sample)


def measure(quick: bool) -> Ready:
    method = make_method("loraclr")
    assert isinstance(method, LayerMethod)
    with tempfile.TemporaryDirectory() as folder, Scratch(folder, memory=0) as room:
        given = list(problems(room, quick))
        kept, spent = [], [0.0, 0.0]
        method.solve(replace(given[0]))  # the libraries' first call
        with PeakMemory() as memory:
            for problem in given:
                fresh = replace(problem)  # factors are kept once they are made
                began = time.perf_counter()
                up, down, _ = file_factors(fresh, method.solve(fresh))
                solved = time.perf_counter()
                residuals(fresh, (up, down))
                spent[0] += solved - began
                spent[1] += time.perf_counter() - solved
                kept.append((up, down))  # as the merge keeps them
        found = {"solve_seconds": spent[0], "megabytes": memory.megabytes}
        goals = {name: found[name] <= most for name, most in GOALS.items()}
        return Ready(len(given), room.written / 1e6, spent[0], spent[1], memory.megabytes, goals)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="small layers: does it run?")
    options = parser.parse_args()
    torch.manual_seed(0)
    row = measure(options.quick)
    show(row, Console())
    if options.json:
        options.json.write_text(json.dumps({**provenance(), "quick": options.quick, **asdict(row)}, indent=1) + "\n")


def show(row: Ready, console: Console) -> None:
    console.print(
        f"loraclr, {row.layers} attention layers from {row.disk_megabytes:.0f} MB of statistics on disk: solved in "
        f"{row.solve_seconds:.1f} s, residuals in {row.residual_seconds:.1f} s, {row.megabytes:.0f} MB above the inputs"
    )
    console.print(", ".join(f"{'pass' if met else 'FAIL'}: {name} <= {GOALS[name]:g}" for name, met in row.goals.items()))


if __name__ == "__main__":
    main()
