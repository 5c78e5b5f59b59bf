"""Which merge settings keep identities? `python study.py BASE JUDGE LORAS OUT.json [NAME ...]`, on the *development* identities.

Every row merges the twelve development adapters from their files with other settings, samples the scoring prompts (which share no
template with the merge's) and prints identity, right person of 12 and prompt agreement. `only STAGE` rows take the default's merge for
one stage and each concept's own adapter for the others: what that stage alone costs; `pack` rows are built from a pack. Finished rows
are kept in OUT.json and skipped. `only attn1.to_q` and the like take one kind of layer of the spatial stage.
`--split test` is for reporting what was chosen, once. `error` is how far the merge's predictions are from the adapters' own
(fidelity.py). `against_single` is the paired difference to each adapter alone; intervals draw concepts and prompts anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from attended import attended
from fidelity import errors
from measure import concept_pictures, concept_scores, factors, row
from rows import number
from table import share
from world import identities

from loraclr.adapter import STAGES, Adapter, DenseLayer, LoraLayer, stage_of
from loraclr.collect import CHOOSING_TEMPLATES, QUICK, Collection
from loraclr.evaluate import paired
from loraclr.formats import load_adapter
from loraclr.linalg import truncate
from loraclr.merge import merge
from loraclr.methods import LayerProblem, LayerSolution
from loraclr.methods.loraclr import Loraclr
from loraclr.methods.options import Option
from loraclr.pack import Pack
from loraclr.pipeline import Pipeline
from loraclr.strategies.words import Part
from loraclr.toybox import SIDE
from loraclr.toybox.judge import Judge

CONCEPTS = 12
SPATIAL = ("attn1.to_q attn1.to_k", "attn1.to_v attn1.to_out", "attn2.to_q", "attn2.to_out")  # kinds of layers of the spatial stage
# Six settings for every baseline that has something to choose; `sum` and the published optimiser have theirs in `settings`.
TUNED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "gradient-fusion": {"spatial_steps": (5, 20), "steps": (5, 20, 100)},
    "regmean": {"off_diagonal": (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)},
    "custom-diffusion": {"ridge": (1e-3, 1e-2, 1e-1), "others": ("average", "none")},
    "svd": {"scale": (0.1, 0.15, 0.2), "rank": (None, 32)},
    "ties": {"scale": (0.5, 1.0, 2.0), "density": (0.2, 0.5)},
    "dare-linear": {"scale": (0.1, 0.15, 0.2), "density": (0.5, 0.9)},
    "dare-ties": {"scale": (0.5, 1.0, 2.0), "density": (0.5, 0.9)},
    "magnitude-prune": {"scale": (0.1, 0.15, 0.2), "density": (0.2, 0.5)},
    "knots": {"scale": (0.5, 1.0, 2.0), "density": (0.2, 0.5)},
    "iso-c": {"scale": (0.15, 0.3, 0.6), "rank": (None, 32)},
    "tsv": {"scale": (0.3, 0.6, 1.0), "kept": (None, 8)},
    "core-space": {"scale": (0.5, 1.0, 2.0), "density": (0.2, 0.5)},
    "ziplora": {"steps": (100, 300), "learning_rate": (0.003, 0.01, 0.03)},
    "lorahub": {"budget": (40, 80), "penalty": (0.05, 0.01, 0.0)},
}
RANKS = (4, 8, 16, 32, 64)  # the row `1 round` is uncut; rank_plot.py draws these


@dataclass(frozen=True)
class Setting:
    method: str = "loraclr"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    collection: Collection | None = field(default_factory=Collection)  # None: the method's own
    merged: tuple[str, ...] = STAGES  # the stages, or kinds of layers of them, that come from the merge
    rest: str = "nothing"  # the others: "nothing", or every concept's "own" adapter
    pack: bool = False  # built from a pack: every stage collected under the concept's own adapter
    rank: int | None = None  # the most per layer, cut in the metric of the objective
    plain: bool = False  # cut by plain SVD instead
    attended: float = 0.0  # how much more a pixel counts where the concept's words are attended to most
    gain: float = 1.0  # of the merged spatial stage
    side: int | None = None  # of the pictures that statistics come from, in pixels; None: the base's own


@dataclass(frozen=True)
class PlainCut(Loraclr):
    """The default, but for a cut that does not know what the layer sees."""

    rank: Annotated[int, Option("the most per layer", 1)] = 4

    def solve(self, problem: LayerProblem) -> LayerSolution:
        whole = super().solve(problem)
        assert whole.up is not None and whole.down is not None
        return LayerSolution.of_factors(*truncate(whole.up, whole.down, self.rank)[:2], status=whole.status, **whole.diagnostics)


def settings() -> dict[str, Setting]:
    """Row name -> what is done. Rows that change our merge are of one round, and differ from `1 round` in what their name says."""
    usual = Collection()
    rows = {"single": Setting(merged=(), rest="own"), "average": Setting("average")}
    for scale in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        rows[f"sum {scale}"] = Setting("sum", {"scale": scale})
    rows["loraclr"] = Setting()
    for ridge in (1e-2, 1e-3, 1e-4):
        rows[f"ridge {ridge:g}"] = Setting(parameters={"ridge": ridge})
    for preservation in (0.0, 0.1, 0.3, 3.0):
        rows[f"preservation {preservation:g}"] = Setting(parameters={"preservation": preservation})
    rows["ridge 0.01, preservation 0.01"] = Setting(parameters={"ridge": 1e-2, "preservation": 0.01})
    rows["balance"] = Setting(parameters={"balance": True})
    rows["mean prior, ridge 0.1"] = Setting(parameters={"ridge": 0.1, "prior": "mean"})
    held_out = {"choose": "held_out"}
    rows["held-out choice"] = Setting(parameters=held_out, collection=replace(usual, held_out=CHOOSING_TEMPLATES))
    for fold in range(3):
        some = CHOOSING_TEMPLATES[fold::3]
        rows[f"held-out choice, pair {fold + 1}"] = Setting(parameters=held_out, collection=replace(usual, held_out=some))
    rows["rows added up instead of averaged"] = Setting(parameters={"normalise": False})
    rows["contrastive"] = Setting("loraclr:contrastive")
    rows["contrastive in delta space"] = Setting("loraclr:contrastive", {"space": "delta"})
    rows["exact"] = Setting("loraclr:exact")
    for rank in RANKS:
        rows[f"rank {rank}"] = Setting(rank=rank)
        rows[f"rank {rank}, plain SVD"] = Setting(rank=rank, plain=True)
    rows["6 prompts"] = Setting(collection=replace(usual, fit=usual.fit[:6]))
    rows["12 prompts"] = Setting(collection=replace(usual, fit=usual.fit[:12]))
    rows["12 preservation prompts"] = Setting(collection=replace(usual, preserve=usual.preserve[:12]))
    rows["padded text"] = Setting(collection=replace(usual, padded=True))
    for steps in (2, 8, 20):
        rows[f"{steps} timesteps"] = Setting(collection=replace(usual, steps=steps))
    for spatial in (1, 8):
        rows[f"{spatial} of the prompts through the UNet"] = Setting(collection=replace(usual, spatial=spatial))
    rows["pictures of half the side"] = Setting(side=SIDE // 2)
    rows["bfloat16 passes"] = Setting(collection=replace(usual, precision="bfloat16"))
    rows["as --quick, in float32"] = Setting(collection=replace(QUICK, precision="float32"))
    rows["all of --quick"] = Setting(collection=QUICK)
    rows["1 round"] = Setting()
    rows["3 rounds"] = Setting(parameters={"rounds": 3})
    rows["2 rounds, ridge 0.01"] = Setting(parameters={"rounds": 2, "ridge": 1e-2})
    for stage in STAGES:
        rows[f"only {stage}, own adapter for the rest"] = Setting(merged=(stage,), rest="own")
    for kinds in SPATIAL:
        rows[f"only {kinds}, own adapter for the rest"] = Setting(merged=tuple(kinds.split()), rest="own")
    rows["only text"] = Setting(merged=("text",))
    for more in (1.0, 4.0):
        rows[f"attended pixels {1 + more:g} times"] = Setting(attended=more)
    for gain in (1.05, 1.1, 1.2):
        rows[f"spatial stage times {gain:g}"] = Setting(gain=gain)
    rows["pack"] = Setting(pack=True)
    rows["pack, ridge 0.001"] = Setting(parameters={"ridge": 1e-3}, pack=True)
    rows["pack, held-out choice"] = replace(rows["held-out choice"], pack=True)
    for stage in STAGES:
        rows[f"pack, only {stage}, own adapter for the rest"] = Setting(merged=(stage,), rest="own", pack=True)
    for stage in STAGES:
        others = tuple(other for other in STAGES if other != stage)
        rows[f"pack, own adapter for {stage}"] = Setting(merged=others, rest="own", pack=True)
    for preset in ("paper", "official"):  # on the released code's few prompts
        rows[f"loraclr-reference:{preset}"] = Setting(f"loraclr-reference:{preset}", collection=None)
    for rate in (1e-3, 3e-3):
        rows[f"paper at learning rate {rate:g}"] = Setting("loraclr-reference:paper", {"learning_rate": rate}, collection=None)
    for steps, rate in ((200, 1e-3), (200, 3e-3)):
        parameters = {"learning_rate": rate, "steps": steps}
        rows[f"paper at learning rate {rate:g}, {steps} steps"] = Setting("loraclr-reference:paper", parameters, collection=None)
    for method, choices in TUNED.items():
        for values in itertools.product(*choices.values()):
            parameters = dict(zip(choices, values, strict=True))
            rows[f"{method}, {', '.join(f'{name} {value}' for name, value in parameters.items())}"] = Setting(method, parameters, None)
    for name, setting in rows.items():
        if setting.method == "loraclr" and name != "loraclr":
            rows[name] = replace(setting, parameters={"rounds": 1, **setting.parameters})
    return rows


def is_of(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a layer is of one of the stages, or kinds of layers."""
    return stage_of(name) in parts or any(f".{part}" in name for part in parts)


def hybrid(merged: Adapter, own: Adapter, setting: Setting) -> Adapter:
    """The merge in `setting.merged`, `setting.rest` elsewhere."""
    layers = {name: layer for name, layer in merged.layers.items() if is_of(name, setting.merged)}
    if setting.rest == "own":
        layers |= {name: layer for name, layer in own.layers.items() if not is_of(name, setting.merged)}
    return Adapter(layers, name=own.name, tokens=own.tokens, triggers=own.triggers)


def louder(merged: Adapter, gain: float) -> Adapter:
    """With the spatial stage's change times `gain`."""
    layers = dict(merged.layers)
    for name, layer in merged.layers.items():
        if stage_of(name) == "spatial" and gain != 1:
            low = isinstance(layer, LoraLayer)
            layers[name] = replace(layer, scale=gain * layer.scale) if low else DenseLayer(name, gain * layer.delta())
    return Adapter(layers, name=merged.name, tokens=merged.tokens, triggers=merged.triggers)


@contextmanager
def drawn(pipeline: Pipeline, side: int | None) -> Iterator[None]:
    """Inside, what runs for statistics is of pictures of that many pixels a side."""
    if side is not None:
        pipeline.run = partial(Pipeline.run, pipeline, size=(side, side))  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(pipeline).pop("run", None)


def run(base: Path, judge: Path, loras: Path, split: str, name: str, rounds: int) -> dict[str, object]:
    torch.set_num_threads(1)
    setting, people = settings()[name], identities()
    files = {name: file for name in people for file in (loras / split).iterdir() if file.stem == name}
    adapters = {name: load_adapter(file) for name, file in files.items()}
    calls = {name: adapter.call for name, adapter in adapters.items()}
    pipeline = Pipeline.load(base)
    used, notes = adapters, {}
    if setting.merged:
        began = time.perf_counter()
        size = 0
        if setting.pack:
            with tempfile.TemporaryDirectory() as folder:
                pack = Pack.create(Path(folder) / "pack", list(files.values()), base=pipeline, collection=setting.collection)
                size = sum(held.path.stat().st_size for held in pack.files)
                merged = pack.build(method=setting.method, parameters=setting.parameters)
        else:
            parts = [Part(one) for one in adapters.values()]
            with attended(parts, setting.attended) if setting.attended else nullcontext(), drawn(pipeline, setting.side):
                merged = merge(
                    list(files.values()), base=pipeline, collection=setting.collection, measure=setting.method.startswith("loraclr"),
                    method=PlainCut(rank=setting.rank or 1, rounds=1) if setting.plain else setting.method,
                    parameters=None if setting.plain else setting.parameters, rank=None if setting.plain else setting.rank,
                )  # fmt: skip
        told = {kind: merged.mean_residual(kind) for kind in ("fit", "held_out")} if merged.collection else {}
        notes = {kind: round(value, 3) for kind, value in told.items() if not math.isnan(value)}
        notes["rank"] = max(layer.rank for layer in merged.layers)
        notes["merge_seconds"] = round(time.perf_counter() - began, 1)
        notes |= {"pack_megabytes": round(size / 1e6, 1)} if setting.pack else {}
        whole = setting.merged == STAGES
        adapter = louder(merged.adapter, setting.gain)
        used = {name: adapter if whole else hybrid(adapter, own, setting) for name, own in adapters.items()}
    error = errors(pipeline, adapters, used)
    notes["error"] = round(sum(error.values()) / len(error), 4)
    scores = concept_scores(Judge.load(judge), concept_pictures(pipeline, calls, used, rounds=rounds), people)
    return {**row(scores, len(calls)), **notes, "pictures": [round(value, 1) for value in scores.identity.tolist()]}


def against(ours: Mapping[str, Any], single: Mapping[str, Any], concepts: int) -> list[float]:
    """Mean paired difference of identity, and its 95 % interval."""
    a, b = (torch.tensor(one["pictures"], dtype=torch.float64) for one in (ours, single))
    found = paired(a, b, factors=factors(len(a), concepts))
    return [round(value, 3) for value in (found.mean, found.low, found.high)]


def tuned(done: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of every method that has several settings here the row of the most identity, under what it is and how far the others fall."""
    best = {}
    for method in ("sum", "loraclr-reference", *TUNED):
        here = {name: done[name] for name, setting in settings().items() if name in done and setting.method.partition(":")[0] == method}
        if here:
            name = max(here, key=lambda one: (here[one]["identity"], here[one]["told"]))
            best[f"{name} (of {len(here)}, from {min(row['identity'] for row in here.values()):.3f})"] = here[name]
    return best


def table(done: Mapping[str, Mapping[str, Any]], beside: str = "single", shown: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Rows in Markdown, all that are `done` or those `shown`, their differences to the one named `beside`."""
    to = "alone" if beside == "single" else beside
    heads = ("merge of 12", "identity", f"paired, to {to} (95 %)", "right person", "prompt", "held-out residual", "error", "s")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, told in (done if shown is None else shown).items():
        known = name != beside and "pictures" in done.get(beside, {})
        apart = "{:+.3f} ({:+.3f} to {:+.3f})".format(*against(told, done[beside], CONCEPTS)).replace("0.", ".") if known else "-"
        shares = [share(told[key]) for key in ("named", "told")]
        notes = [number(told[key]) if key in told else "-" for key in ("held_out", "error")]
        seconds = f"{told['merge_seconds']:.0f}" if "merge_seconds" in told else "-"
        lines.append(f"| {name} | {told['identity']:.3f} | {apart} | {' | '.join([*shares, *notes, seconds])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("loras", type=Path, help="the folder with development/ and test/")
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="rows whose name begins so; all without")
    parser.add_argument("--split", default="development", choices=("development", "test"))
    parser.add_argument("--rounds", type=int, default=1, help="seeds per prompt")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="print the rows that are there as a table, and draw none")
    parser.add_argument("--tuned", action="store_true", help="with --markdown: of methods of several settings only the best row")
    parser.add_argument("--beside", default="single", metavar="ROW", help="what differences in the table are to")
    arguments = parser.parse_intermixed_args()
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}

    def asked(name: str) -> bool:
        return not arguments.names or name.startswith(tuple(arguments.names))

    if arguments.markdown:
        if arguments.beside not in (*done, "single"):
            raise SystemExit(f"{arguments.out} has no row {arguments.beside!r}; there are {', '.join(done)}")
        print(table(done, arguments.beside, tuned(done) if arguments.tuned else {name: done[name] for name in done if asked(name)}))
        return
    wanted = [name for name in settings() if name not in done and asked(name)]
    with ProcessPoolExecutor(arguments.workers) as pool:
        common = (run, arguments.base, arguments.judge, arguments.loras, arguments.split)
        jobs = {pool.submit(*common, name, arguments.rounds): name for name in wanted}
        for job in as_completed(jobs):
            done[jobs[job]] = job.result()
            ordered = {name: done[name] for name in settings() if name in done}
            for result in ordered.values() if "single" in done else ():
                result["against_single"] = against(result, done["single"], CONCEPTS)
            lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(result)}" for name, result in ordered.items())
            arguments.out.write_text(f"{{\n{lines}\n}}\n")
            shown = {key: value for key, value in done[jobs[job]].items() if key != "pictures"}
            print(f"{jobs[job]:45} {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
