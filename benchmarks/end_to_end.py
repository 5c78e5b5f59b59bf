"""The whole merge at real size: a random-weight pipeline of Stable Diffusion 1.5's configuration, twelve LoRA files of four kinds.

    python -m benchmarks.end_to_end [--json FILE] [--quick] [--only SCENARIO ...] [--collection default|quick]

Scenarios differ in the layers that the files adapt: `keys` only cross-attention keys and values, `attention` all attention layers of the
UNet, `text` the text encoder, `whole` all of these with projections, feed-forward and 3x3 convolutions. `scale N` merges N files on the
toybox's own base. Every scenario is a process of its own; seconds are of its phases, memory is what the process had above the loaded base.
Adapters have a part that all share, decaying singular values and 5 % of the weight's norm. The released procedure's cost (all features
of 20 steps kept, 50 optimiser steps a layer) is extrapolated: from one UNet pass, and linearly from 5 steps on 256 and 1024 rows of a
size. The tokenizer is the toybox's. `--quick` shrinks everything and only checks that it runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.solver import Kind, Layer, provenance
from loraclr.adapter import Adapter, LoraLayer
from loraclr.collect import QUICK, Collection, stage_of
from loraclr.formats import save_adapter
from loraclr.memory import PeakMemory
from loraclr.merge import merge
from loraclr.methods import make_method
from loraclr.pipeline import Pipeline
from loraclr.toybox import open_toybox

RANKS = (4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 64, 64)
FORMATS = ("kohya", "diffusers", "peft", "kohya")  # in turn; the last also has what LoCon adds, where the scenario has that
DECAY = 0.75  # the k-th singular value is k^-DECAY
CONCEPTS = 12
SCENARIOS = ("keys", "attention", "text", "whole", "scale 12", "scale 24", "scale 50", "scale 100")
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
GOALS = {"keys": (15.0, None), "attention": (300.0, 1000.0)}  # seconds after the base is there, MB above it
RELEASED_STEPS, RELEASED_PASSES = 50, 20


@dataclass(frozen=True)
class Phase:
    """Seconds, and the most memory (MB) above the loaded base while it lasted."""

    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Run:
    """One scenario."""

    scenario: str
    adapters: int
    layers: int
    base_megabytes: float
    build_seconds: float
    phases: dict[str, Phase]
    seconds: float
    megabytes: float
    disk_megabytes: float
    file_megabytes: float
    collection: dict[str, Any]
    goal: str


def sd15(quick: bool) -> Pipeline:
    """Random weights of variance 1 / in; what reads no features (VAE) is small."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(open_toybox().base_path / "tokenizer")
    width, heads, deep, channels = (32, 2, 2, (32, 64, 64, 64)) if quick else (768, 12, 12, (320, 640, 1280, 1280))
    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(
            sample_size=8 if quick else 64,
            cross_attention_dim=width,
            attention_head_dim=8,
            block_out_channels=channels,
            norm_num_groups=8 if quick else 32,
        )
        text: nn.Module = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=deep,
                num_attention_heads=heads,
                projection_dim=width,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    torch.manual_seed(0)
    for part in (unet, text):
        part.to_empty(device="cpu").eval().requires_grad_(False)
        for module in part.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor):
                if weight.ndim > 1:
                    weight.normal_(std=0.02 if isinstance(module, nn.Embedding) else weight[0].numel() ** -0.5)
                else:
                    weight.fill_(1.0)
            if isinstance(getattr(module, "bias", None), Tensor):
                module.bias.zero_()  # type: ignore[operator, union-attr]
            if "position_ids" in getattr(module, "_buffers", {}):
                module.position_ids.copy_(torch.arange(77)[None])  # type: ignore[operator, union-attr]
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return Pipeline(pipe)


def chosen(base: Pipeline, scenario: str, *, locon: bool) -> list[str]:
    """The layers that a file of this scenario adapts."""
    text = [name for name in base.modules if name.startswith("text_encoder.")]
    attention = [name for name in base.modules if name.startswith("unet.") and name.endswith(ATTENTION)]
    if scenario == "keys":
        return [name for name in attention if base.cross_attention_index(name) is not None]
    if scenario == "attention" or scenario.startswith("scale"):
        return attention
    if scenario == "text":
        return text
    blocks = [name for name in base.modules if name.startswith("unet.") and ".attentions." in name]
    convolutions = [name for name in base.modules if name.startswith("unet.") and (".resnets." in name or "samplers" in name)]
    return [*text, *blocks, *(convolutions if locon else ())]


def stages(base: Pipeline, scenario: str) -> list[str]:
    return [stage_of(base, names) for names in base.stages(chosen(base, scenario, locon=True))]


def write_files(base: Pipeline, scenario: str, count: int, folder: Path, quick: bool) -> list[Path]:
    """`count` LoRA files of mixed formats and ranks, float16."""
    found = []
    for index in range(count):
        rank, format = RANKS[index % len(RANKS)], FORMATS[index % len(FORMATS)]
        names = chosen(base, scenario, locon=index % len(FORMATS) == len(FORMATS) - 1)
        layers = [lora(name, tuple(base.base_weight(name).shape), min(rank, 4) if quick else rank, index) for name in names]
        path = folder / (f"concept{index:03d}" if format == "peft" else f"concept{index:03d}.safetensors")
        found.append(save_adapter(Adapter.of(layers, name=path.stem), path, format=format))
    return found


def lora(name: str, shape: tuple[int, ...], rank: int, index: int) -> LoraLayer:
    """Half of what it looks at and writes to is shared by all adapters of a layer."""
    width, place = int(torch.Size(shape[1:]).numel()), sum(name.encode())
    rank = min(rank, shape[0], width)
    shared, own = torch.Generator().manual_seed(place), torch.Generator().manual_seed(10_000 * (index + 1) + place)
    down = torch.randn(64, width, generator=shared)[:rank] + torch.randn(rank, width, generator=own)
    up = torch.randn(64, shape[0], generator=shared)[:rank].T + torch.randn(shape[0], rank, generator=own)
    values = torch.arange(1, rank + 1).float() ** -DECAY
    up = up * (0.05 * shape[0] ** 0.5 * values / (2 * (shape[0] * width) ** 0.5 * values.norm()))
    return LoraLayer(name, down.view(rank, *shape[1:]), up.view(shape[0], rank, *[1] * (len(shape) - 2)))


class Phases:
    """Told what has just been done, as the merge's progress is: the time since the last word belongs to it."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.stages = stages
        self.found: dict[str, Phase] = {}
        self._memory = PeakMemory().__enter__()
        self.start, self._last = self._memory.held, time.perf_counter()

    def __call__(self, what: str) -> None:
        self._memory.__exit__()
        now = time.perf_counter()
        before = self.found.get(what, Phase(0.0, 0.0))
        megabytes = self._memory.megabytes + self._memory.held - self.start
        self.found[what] = Phase(before.seconds + now - self._last, max(before.megabytes, megabytes))
        self._memory = PeakMemory(tidy=False).__enter__()  # to tidy up takes time, which the merge would not
        self._last = now

    def tell(self, phase: str, share: float) -> None:
        """`collecting stage 1 of 2: rhea` is `collect text` where the first stage is that; what names no stage is a further round's."""
        verb, word, number, *_ = phase.split()
        if word != "stage":
            self("again, alone" if "own run" in phase else "again, by block")
            return
        self(f"{verb.removesuffix('ing').replace('solv', 'solve')} {self.stages[int(number) - 1]}")

    def close(self) -> dict[str, Phase]:
        self._memory.__exit__()
        return self.found


def run(scenario: str, quick: bool, settings: Collection) -> Run:
    began = time.perf_counter()
    scale = scenario.startswith("scale")
    base = open_toybox().load() if scale else sd15(quick)
    built = time.perf_counter() - began
    count = int(scenario.split()[1]) if scale else CONCEPTS
    count = min(count, 4) if quick else count
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_files(base, scenario, count, folder, quick)
        calls = {path.stem: f"{word(index)} woman" for index, path in enumerate(files)}
        phases = Phases(stages(base, scenario))
        before = phases.start
        began = time.perf_counter()
        result = merge(files, base=base, calls=calls, collection=settings, progress=phases.tell, scratch=folder)
        # What precedes the first word of progress: reading the files, a part of the first concept's collection.
        written = result.save(folder / "merged.safetensors")
        phases("write")
        seconds = time.perf_counter() - began
        found = phases.close()
        peak = max(phase.megabytes for phase in found.values())
        first = next(iter(found))
        found = {"load": Phase(result.seconds["load"], 0.0), **found}
        found[first] = replace(found[first], seconds=max(found[first].seconds - result.seconds["load"], 0.0))
        size = written.stat().st_size / 1e6
    disk = (result.memory["disk"] or 0) / 1e6
    goal = ""
    if scenario in GOALS and not quick:
        most, megabytes = GOALS[scenario]
        met = seconds <= most and (megabytes is None or peak <= megabytes)
        goal = f"{'pass' if met else 'FAIL'}: {most:g} s" + (f", {megabytes:g} MB" if megabytes else "")
    return Run(scenario, count, len(result.layers), before, built, found, seconds, peak, disk, size, asdict(settings), goal)


def word(index: int) -> str:
    """A made-up name of three syllables, another for every index."""
    syllables = ("ba", "ke", "ni", "so", "tu", "ra", "ve", "mi", "do", "lu")
    return "".join(syllables[index // 10**place % 10] for place in range(3))


def released(quick: bool) -> dict[str, float]:
    """What the released procedure would take for the layers of `attention` (MB, seconds): extrapolated but for `pass_seconds`."""
    base = sd15(quick)
    side = 8 if quick else 64
    width = base.base_weight("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k").shape[1]
    given = {"encoder_hidden_states": torch.randn(1, 77, width), "return_dict": False}
    found = {}
    for name, dtype in (("pass_seconds", torch.float32), ("bfloat16_pass_seconds", torch.bfloat16)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            base.unet(torch.randn(1, 4, side, side), 500, **given)
            began = time.perf_counter()
            base.unet(torch.randn(1, 4, side, side), 500, **given)
            found[name] = time.perf_counter() - began
    counts: dict[tuple[int, int, int], int] = {}  # (out, in, rows of a pass) -> layers
    seen: dict[str, int] = {}

    def keep(name: str, rows: Tensor) -> None:
        seen[name] = len(rows)

    names = chosen(base, "attention", locon=False)
    with torch.inference_mode(), base.captured(names, keep):
        base.unet(torch.randn(1, 4, side, side), 500, **given)
    for name in names:
        out, wide = base.base_weight(name).shape
        rows = 6 if base.cross_attention_index(name) is not None else seen[name] * RELEASED_PASSES
        counts[out, wide, rows] = counts.get((out, wide, rows), 0) + 1
    seconds = megabytes = 0.0
    method = make_method("loraclr-reference:official", steps=5)
    for (out, wide, rows), layers in counts.items():
        few = [min(rows, 256), min(rows, 1024)]
        times = []
        for count in few:
            layer = Layer(Kind("", out, wide, count, 0.3), CONCEPTS).raw()
            began = time.perf_counter()
            method.solve(layer)  # type: ignore[union-attr]
            times.append(time.perf_counter() - began)
        slope = max(times[1] - times[0], 0.0) / (few[1] - few[0]) if few[1] > few[0] else 0.0  # a step costs something even without rows
        seconds += layers * (times[1] + slope * (rows - few[1])) * RELEASED_STEPS / 5
        megabytes += layers * CONCEPTS * rows * wide * 4 / 1e6
    passes = CONCEPTS * RELEASED_PASSES * found["pass_seconds"]
    return {**found, "features_megabytes": megabytes, "features_seconds": passes, "solve_seconds": seconds}


def table(runs: Sequence[Run]) -> Table:
    made = Table(title="merge from files, MB above the base")
    for column in ("scenario", "phase", "s", "MB"):
        made.add_column(column, no_wrap=True)
    for row in runs:
        for name, phase in row.phases.items():
            made.add_row("", name, f"{phase.seconds:.1f}", f"{phase.megabytes:.0f}")
        about = f"{row.adapters} files, {row.layers} layers, {row.disk_megabytes:.0f} MB on disk"
        made.add_row(row.scenario, about, f"{row.seconds:.1f}", f"{row.megabytes:.0f}", end_section=not row.goal)
        if row.goal:
            made.add_row("", row.goal, "", "", end_section=True)
    return made


def fresh(function: Any, *arguments: Any) -> Any:
    """In a process of its own, whose memory nobody has used before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="small models and few files: does it run?")
    parser.add_argument("--only", nargs="*", help="scenarios, such as keys or 'scale 12'; 'released' for the released procedure")
    parser.add_argument("--collection", default="quick", choices=("default", "quick"), help="what is collected")
    options = parser.parse_args()
    settings = QUICK if options.collection == "quick" else Collection()
    console, runs = Console(), []
    report: dict[str, object] = {**provenance(), "quick": options.quick}
    for scenario in SCENARIOS[:5] if options.quick else SCENARIOS:
        if not options.only or scenario in options.only or scenario.split()[0] in options.only:
            runs.append(
                fresh(run, scenario, options.quick, Collection() if scenario.startswith("scale") and not options.quick else settings)
            )
            console.print(f"{scenario}: {runs[-1].seconds:.1f} s, {runs[-1].megabytes:.0f} MB above the base")
            report["runs"] = [asdict(one) for one in runs]
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(runs))
    if not options.only or "released" in options.only:
        report["released"] = cost = fresh(released, options.quick)
        console.print(
            f"the released procedure on the layers of `attention`, extrapolated: {cost['features_megabytes'] / 1e3:.0f} GB of features "
            f"in {cost['features_seconds']:.0f} s, and {cost['solve_seconds']:.0f} s of optimisation; one UNet pass takes "
            f"{cost['pass_seconds']:.1f} s, in bfloat16 {cost['bfloat16_pass_seconds']:.1f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
