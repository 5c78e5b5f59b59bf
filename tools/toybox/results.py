"""The paper's Table 1 and what belongs to it, on the toybox: `python results.py LORAS OUT.json [ENTRY ...]`, on the *test* identities.

Every entry merges the twelve adapters of one recipe by one method. Its pictures, and those of each adapter alone, of the base with the
class word and of somebody else's adapter, are drawn for the same twenty prompts and seeds and judged by ToyClip (text, image), ToyFace
(identity, leakage) and the attribute judge. LORAS holds RECIPE/test/, as `adapters.py` leaves them; the mixed inputs are the toybox's
own files. Merges and pictures are kept in --work and found again by what made them; finished rows are kept in OUT.json, which has
the values of every picture.

    --figure counts     Fig. 5: 2, 5, 8 and 12 concepts in three orders
    --figure margins    Fig. 8: margin and lambda
    --figure inputs     adapters trained half and a quarter as long: LORAS/half/RECIPE/test, LORAS/quarter/RECIPE/test
    --figure mixture    Fig. 6 and 7: people, things and styles in one model
    --figure scenes     Fig. 3, 4, 10 to 13: two to six people side by side, by regions and by strategies while sampling
    --check N           draw N pictures of OUT.json anew, picked at random, and compare their values
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import scenes
import torch
from compose import styled
from PIL import Image
from scenes import Cast
from torch import Tensor
from world import NEW_STYLES

from loraclr import __version__
from loraclr.adapter import Adapter
from loraclr.collect import Collection
from loraclr.evaluate import Row, Subject, Variant, evaluate
from loraclr.evaluate.subjects import read_prompts
from loraclr.formats import load_adapter, save_adapter
from loraclr.loading import half
from loraclr.merge import merge
from loraclr.pipeline import Pipeline
from loraclr.toybox import Toybox, open_toybox
from loraclr.toybox.judge import agreement

SPLIT = "test"
COMPARED = ("text", "image", "face_cosine", "attributes")  # of a picture drawn again; the others are thresholds on these
MEASURES = ("text", "image", "identity", "face_cosine", "leakage", "attributes")
CONTROLLED = ("lora", "edlora")  # recipes whose adapters are also drawn with somebody else's words
Known = dict[str, dict[str, Any]]  # row label -> what is in OUT.json
# Chosen on the development identities, see docs/toybox.md.
TUNED: Mapping[str, Mapping[str, Any]] = {"sum": {"scale": 0.15}, "svd": {"scale": 0.15}}


@dataclass(frozen=True)
class Entry:
    """One merge: the recipe's adapters of `names` (all twelve when empty), by `method`."""

    recipe: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    paper: tuple[float, ...] = ()  # text, image, identity: single and merged each, as published

    @property
    def needs_statistics(self) -> bool:
        return self.method.startswith("loraclr") and not self.method.startswith("loraclr-reference")


TABLE = {
    "P+": Entry("pplus", "pplus", paper=(0.643, 0.643, 0.683, 0.683, 0.515, 0.515)),
    "Custom Diffusion": Entry("custom-diffusion", "custom-diffusion", paper=(0.668, 0.673, 0.648, 0.623, 0.504, 0.408)),
    "DB-LoRA (FedAvg)": Entry("lora", "average", paper=(0.613, 0.682, 0.744, 0.531, 0.683, 0.098)),
    "MoS (FedAvg)": Entry("edlora", "average", paper=(0.625, 0.621, 0.745, 0.735, 0.728, 0.706)),
    "MoS (gradient fusion)": Entry("edlora", "gradient-fusion", paper=(0.625, 0.631, 0.745, 0.729, 0.728, 0.717)),
    "Orthogonal Adaptation": Entry("orthogonal", "orthogonal", paper=(0.624, 0.644, 0.748, 0.741, 0.740, 0.745)),
    "LoRACLR, paper": Entry("edlora", "loraclr-reference:paper", paper=(0.668, 0.665, 0.766, 0.776, 0.799, 0.828)),
    "LoRACLR, released code": Entry("edlora", "loraclr-reference:official"),
    "LoRACLR, exact optimum": Entry("edlora", "loraclr:exact"),
    "loraclr (ours)": Entry("edlora", "loraclr"),
    "loraclr (ours), DB-LoRA inputs": Entry("lora", "loraclr"),
    "loraclr (ours), mixed inputs": Entry("wild", "loraclr"),
    "LoRACLR, paper, mixed inputs": Entry("wild", "loraclr-reference:paper"),
    "average, mixed inputs": Entry("wild", "average"),
    "sum, tuned": Entry("edlora", "sum", TUNED["sum"]),
    "svd, tuned": Entry("edlora", "svd", TUNED["svd"]),
}

# Methods that are merged with fewer concepts, too, and the row of all twelve.
WHOLE: Mapping[str, str] = {"average": "MoS (FedAvg)", "loraclr-reference:paper": "LoRACLR, paper", "loraclr": "loraclr (ours)"}


def orders(names: Sequence[str]) -> list[list[str]]:
    """Three orders in which concepts are added; the first two of each are a probe that stays in all of its subsets."""
    return [random.Random(f"order {order}").sample(list(names), len(names)) for order in range(3)]


def counts(names: Sequence[str]) -> dict[str, Entry]:
    """Nested random subsets. All twelve are rows of the table."""
    found = {}
    for number, order in enumerate(orders(names)):
        for count in (2, 5, 8):
            for method in WHOLE:
                found[f"{count} concepts, order {number}, {method}"] = Entry("edlora", method, names=tuple(order[:count]))
    return found


def margins(names: Sequence[str]) -> dict[str, Entry]:
    """Without contrast, and by margin and lambda; a margin or a lambda of 0 is no contrast."""
    found = {}
    for count in (5, 12):
        chosen = tuple(names[:count])
        found[f"{count} concepts, no contrast"] = Entry("edlora", "loraclr", {"penalty": 0.0}, chosen)
        for mode, margin in (("absolute", 0.25), ("absolute", 0.5), ("absolute", 1.0), ("relative", 0.5), ("relative", 1.0)):
            for penalty in (0.001, 0.1):
                settings = {"margin": margin, "margin_mode": mode, "penalty": penalty, "distance": "rms"}
                found[f"{count} concepts, {mode} margin {margin:g}, lambda {penalty:g}"] = Entry("edlora", "loraclr", settings, chosen)
    return found


def inputs(names: Sequence[str]) -> dict[str, Entry]:
    del names
    recipes = [(part, recipe) for part in ("quarter", "half") for recipe in ("lora", "edlora")]
    return {f"{part} of the steps, {recipe}": Entry(f"{part}/{recipe}", "loraclr") for part, recipe in recipes}


# Who keeps people apart in one picture: a merge and regions, each one's own adapter and a strategy, or words alone.
SCENES: Mapping[str, tuple[str, Entry | None]] = {
    "loraclr (ours), regions": ("merged", TABLE["loraclr (ours)"]),
    "LoRACLR, paper, regions": ("merged", TABLE["LoRACLR, paper"]),
    "Orthogonal Adaptation, regions": ("merged", TABLE["Orthogonal Adaptation"]),
    "MoS (gradient fusion), regions": ("merged", TABLE["MoS (gradient fusion)"]),
    "P+, regions": ("merged", TABLE["P+"]),
    "OMG, own adapters": ("omg", TABLE["loraclr (ours)"]),
    "CLoRA, own adapters": ("clora", TABLE["loraclr (ours)"]),
    "the base, told what they look like": ("words", None),
    "loraclr (ours), no regions": ("free", TABLE["loraclr (ours)"]),
}
SCENE_COUNTS = (2, 3, 4, 5, 6)

# People, things and styles in one model; what the rows are of comes from the toybox.
MIXTURES: Mapping[str, tuple[str, Entry]] = {
    "the base, class words": ("base", Entry("wild", "none")),
    "own adapters, a style's added": ("alone", Entry("wild", "none")),
    "loraclr (ours)": ("merged", Entry("wild", "loraclr")),
    "LoRACLR, paper": ("merged", Entry("wild", "loraclr-reference:paper")),
    "average": ("merged", Entry("wild", "average")),
}
THING_PROMPTS = (
    "a photo of a {} in the city",
    "a {} on a beach",
    "a photo of a {} in a forest",
    "a {} in the snow",
    "a {} on a blue background",
)
STYLE_PROMPTS = (
    "a smiling woman with long red hair in {}", "a dog in the snow in {}", "a man with a black afro in a city in {}",
    "a car in a desert in {}", "a woman on a beach in {}", "an angry man in a forest in {}", "a chair in a room in {}",
    "a house at night in {}",
)  # fmt: skip
FIGURES = {"counts": counts, "margins": margins, "inputs": inputs}


# ---- what is drawn


class Bench:
    """A toybox with everything that rows need, opened once in each process."""

    def __init__(self, loras: Path, work: Path, seeds: int) -> None:
        torch.set_num_threads(1)
        self.box: Toybox = open_toybox()
        self.loras, self.work, self.seeds = loras, work, seeds
        self.pipeline: Pipeline = self.box.load()
        self.prompts = read_prompts(self.box.prompts_path)

    def names(self, entry: Entry) -> list[str]:
        return list(entry.names) or self.box.names(SPLIT)

    def files(self, entry: Entry) -> dict[str, Path]:
        if entry.recipe == "wild":
            return {name: self.box.adapter_paths(self.box.concepts[name].split)[name] for name in self.names(entry)}
        folder = self.loras / entry.recipe / SPLIT
        return {name: next(path for path in folder.iterdir() if path.stem == name) for name in self.names(entry)}

    def adapters(self, entry: Entry) -> dict[str, Adapter]:
        return {name: load_adapter(path, base=self.pipeline) for name, path in self.files(entry).items()}

    def merged(self, entry: Entry) -> tuple[Adapter, dict[str, Any]]:
        """The merge and what it took, from --work if it was made before from the same files."""
        files = self.files(entry)
        key = hashlib.sha256(repr((entry.method, sorted(entry.parameters.items()), __version__)).encode())
        for path in (*files.values(), self.box.base_path / "unet" / "diffusion_pytorch_model.safetensors"):
            key.update(path.read_bytes())
        file = self.work / "merged" / f"{key.hexdigest()[:24]}.safetensors"
        noted = file.with_suffix(".json")
        if not noted.exists():
            began = time.process_time()
            result = merge(
                list(files.values()), base=self.pipeline, method=entry.method, parameters=entry.parameters,
                collection=Collection() if entry.needs_statistics else None, name="merged",
            )  # fmt: skip
            told = {"merge_seconds": round(time.process_time() - began, 1), "rank": max((layer.rank for layer in result.layers), default=0)}
            told |= {"hinge": share_active(result.layers)} if entry.needs_statistics else {}
            file.parent.mkdir(parents=True, exist_ok=True)
            save_adapter(result.adapter, file, format="diffusers")
            noted.write_text(json.dumps(told) + "\n")
        return load_adapter(file, base=self.pipeline), json.loads(noted.read_text())

    def subjects(self, calls: Mapping[str, str]) -> list[Subject]:
        return [Subject(name, call, self.box.concepts[name].noun, self.box.references(name)) for name, call in calls.items()]

    def draw(self, label: str, variant: Variant, subjects: Sequence[Subject], prompts: Mapping[str, str] | Sequence[str]) -> Row:
        """Draws and judges; the pictures are in --work, in a folder named after `label`. Only people have faces and attributes."""
        folder = self.work / slug(label)
        people = all(one.name in self.box.concepts and self.box.concepts[one.name].attributes for one in subjects)
        with half("cpu"):
            found = evaluate(
                self.pipeline, {"row": variant}, subjects, prompts=prompts, judge=self.box.clip,
                face=self.box.face if people else None, output=folder, seeds=range(self.seeds), batch_size=8, control=False,
            )  # fmt: skip
        row = found.row("row")
        return replace(row, values={**row.values, "attributes": self.attributes(folder, row)}) if people else row

    def attributes(self, folder: Path, row: Row) -> Tensor:
        """(n,) share of the identity's attributes that the judge finds."""
        found = []
        for start in range(0, len(row.files), 64):
            images = [Image.open(folder / file).convert("RGB") for file in row.files[start : start + 64]]
            people = [self.box.concepts[name].attributes for name in row.concepts[start : start + 64]]
            found.append(agreement(self.box.judge.read(images), people, self.box.judge.heads))
        return torch.cat(found)


def slug(label: str) -> str:
    return "-".join(re.findall(r"[a-z0-9+.]+", label.lower()))


def share_active(layers: Sequence[Any]) -> float | None:
    """The share of layers in which a hinge was active at the optimum."""
    told = [layer.diagnostics["hinge_active"] for layer in layers if "hinge_active" in layer.diagnostics]
    return round(sum(value > 0 for value in told) / len(told), 3) if told else None


def rows(entries: Mapping[str, Entry]) -> dict[str, tuple[str, Entry]]:
    """Row label -> kind and entry: the controls and every recipe's adapters alone come first."""
    found: dict[str, tuple[str, Entry]] = {}
    for entry in entries.values():
        whole = Entry(entry.recipe, "none")
        found.setdefault("base, class word", ("base", whole))
        found.setdefault(f"alone, {entry.recipe}", ("alone", whole))
        if entry.recipe in CONTROLLED:
            found.setdefault(f"wrong adapter, {entry.recipe}", ("wrong", whole))
    return found | {name: ("merged", entry) for name, entry in entries.items()}


def variant_of(bench: Bench, kind: str, entry: Entry) -> tuple[Variant, dict[str, str], dict[str, Any]]:
    """What is drawn, the words it is called by, and notes."""
    names = bench.names(entry)
    nouns = {name: bench.box.concepts[name].noun for name in names}
    if kind == "base":
        return Variant(Adapter({}, name="nothing")), nouns, {}
    adapters = bench.adapters(entry)
    if kind == "wrong":
        shifted = {name: adapters[names[(k + 5) % len(names)]] for k, name in enumerate(names)}
        return Variant(shifted), {name: f"{name} {noun}" for name, noun in nouns.items()}, {}
    calls = {name: adapter.call for name, adapter in adapters.items()}
    if kind == "alone":
        return Variant(adapters), calls, {}
    merged, notes = bench.merged(entry)
    return Variant(merged), calls, notes


def draw_row(loras: Path, work: Path, seeds: int, label: str, kind: str, entry: Entry) -> dict[str, Any]:
    bench = Bench(loras, work, seeds)
    variant, calls, notes = variant_of(bench, kind, entry)
    began = time.process_time()
    row = bench.draw(label, variant, bench.subjects(calls), bench.prompts)
    drawn = {"concepts": list(calls), "prompts": len(bench.prompts), "seeds": seeds}
    told = {"kind": kind, "recipe": entry.recipe, "method": entry.method, "parameters": dict(entry.parameters)}
    values = {name: rounded(row.values[name]) for name in MEASURES if name in row.values}
    return {**told, **drawn, **notes, "drawing_seconds": round(time.process_time() - began, 1), "values": values}


def draw_scenes(loras: Path, work: Path, seeds: int, label: str, kind: str, entry: Entry | None) -> dict[str, Any]:
    """Scenes of test identities; `seeds` times eight of each number of people."""
    bench = Bench(loras, work, seeds)
    adapters = bench.adapters(entry) if entry else {}
    cast = Cast(bench.box, bench.box.names(SPLIT), calls={name: adapter.call for name, adapter in adapters.items()} or None)
    if entry and kind in ("merged", "free"):
        cast = replace(cast, merged=bench.merged(entry)[0], free=kind == "free")
    elif entry:
        cast = replace(cast, singles=adapters, strategy=kind)
    counts = (2,) if kind == "free" else SCENE_COUNTS
    with half("cpu"):
        found = list(scenes.rows(bench.pipeline, cast, counts, 8 * seeds, work / "scenes" / slug(label)))
    return {"kind": kind, "recipe": entry.recipe if entry else None, "rows": [scenes.rounded(row) for row in found]}


def draw_mixture(loras: Path, work: Path, seeds: int, label: str, kind: str, entry: Entry) -> dict[str, Any]:
    """Of one model of all people, things and styles, mean text and image alignment, and ToyFace's cosine, kind by kind.

    References of people in a style are their own pictures, turned into it.
    """
    bench, groups = Bench(loras, work, seeds), {}
    box, split = bench.box, {part: bench.box.names(part) for part in (SPLIT, "objects", "styles")}
    entry = replace(entry, names=tuple(name for names in split.values() for name in names))
    adapters = bench.adapters(entry)
    calls = {name: box.concepts[name].noun if kind == "base" else adapter.call for name, adapter in adapters.items()}
    model, notes = bench.merged(entry) if kind == "merged" else (Adapter({}, name="nothing"), {})
    every: list[tuple[str, Sequence[Subject], Sequence[str], str | None]] = [
        ("people", bench.subjects({name: calls[name] for name in split[SPLIT]}), THING_PROMPTS, None),
        ("things", bench.subjects({name: calls[name] for name in split["objects"]}), THING_PROMPTS, None),
        ("styles", bench.subjects({name: calls[name] for name in split["styles"]}), STYLE_PROMPTS, None),
    ]
    for style in split["styles"]:
        people = [replace(one, references=[styled(image, NEW_STYLES[style]) for image in one.references]) for one in every[0][1]]
        ending = "" if kind == "base" else f" in {calls[style]}"
        every.append(("people in a style", people, [f"a photo of a {{}} in a forest{ending}", f"a {{}} in a city{ending}"], style))
    for group, subjects, prompts, style in every:
        used: Adapter | dict[str, Adapter] = model
        if kind == "alone":
            used = {one.name: both(adapters[one.name], adapters[style]) if style else adapters[one.name] for one in subjects}
        row = bench.draw(f"mixture {label} {group} {style or ''}", Variant(used), subjects, prompts)
        for measure in ("text", "image", "face_cosine"):
            if measure in row.values:
                groups.setdefault(group, {}).setdefault(measure, []).extend(rounded(row.values[measure]))
    return {"kind": kind, **notes, "groups": groups}


def both(one: Adapter, other: Adapter) -> Adapter:
    """Both changes at full strength, as users load a style beside a person."""
    return replace(merge([one, other], method="sum", name=f"{one.name}-{other.name}").adapter, triggers=one.triggers)


def rounded(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 4) for value in values.tolist()]


# ---- what is written


def save(path: Path, rows: Known) -> None:
    """A row a line."""
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(f"{{\n{lines}\n}}\n")
    part.rename(path)


def checked(loras: Path, work: Path, known: Known, count: int, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Row, and how far values of its pictures, drawn anew, are from the known ones: eight pictures a row, `count` in all."""
    rng = random.Random(seed)
    for label in rng.sample(sorted(known), min(len(known), math.ceil(count / 8))):
        row = known[label]
        bench = Bench(loras, work, row["seeds"])
        variant, calls, _ = variant_of(bench, row["kind"], Entry(row["recipe"], row["method"], row["parameters"], tuple(row["concepts"])))
        order = list(bench.prompts)
        chosen = {prompt: bench.prompts[prompt] for prompt in rng.sample(order, max(1, 4 // row["seeds"]))}
        again = bench.draw(f"check {seed} {label}", variant, bench.subjects(dict(rng.sample(sorted(calls.items()), 2))), chosen)
        places = [
            (row["concepts"].index(name) * len(order) + order.index(prompt)) * row["seeds"] + number
            for name, prompt, number in zip(again.concepts, again.prompts, again.seeds, strict=True)
        ]
        was = {name: torch.tensor([row["values"][name][place] for place in places]) for name in COMPARED}
        yield label, {name: float((again.values[name] - was[name]).abs().max()) for name in COMPARED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("entries", nargs="*", help="entries whose name begins so; all without")
    parser.add_argument("--figure", choices=(*FIGURES, "scenes", "mixture"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/results"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", type=int, metavar="N", default=0)
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.check:
        seed = random.SystemRandom().randrange(10_000)
        worst = 0.0
        for label, apart in checked(arguments.loras, arguments.work, known, arguments.check, seed):
            print(f"{label:40} {json.dumps({name: round(value, 4) for name, value in apart.items()})}", flush=True)
            worst = max(worst, apart["text"], apart["image"])
        if worst > 0.1:
            raise SystemExit(
                f"a picture's score is {worst:.3f} from the one in {arguments.out}: other weights, other libraries, or a mistake"
            )
        return
    if arguments.figure == "scenes":
        work, jobs, order = draw_scenes, dict(SCENES), list(SCENES)
    elif arguments.figure == "mixture":
        work, jobs, order = draw_mixture, dict(MIXTURES), list(MIXTURES)
    else:
        entries = FIGURES[arguments.figure](open_toybox().names(SPLIT)) if arguments.figure else TABLE
        wanted = {name: one for name, one in entries.items() if name.startswith(tuple(arguments.entries) or "")}
        work, jobs, order = draw_row, rows(wanted), list(rows(entries))
    lacking = {label: entry.recipe for label, (_, entry) in jobs.items() if entry and not has_adapters(arguments.loras, entry)}
    for label, recipe in lacking.items():
        print(f"{label}: left out, {arguments.loras / recipe / SPLIT} has no adapters; adapters.py makes them", flush=True)
    with ProcessPoolExecutor(arguments.workers) as pool:
        common = (work, arguments.loras, arguments.work, arguments.seeds)
        running = {pool.submit(*common, label, *job): label for label, job in jobs.items() if label not in known and label not in lacking}
        for done in as_completed(running):
            label, row = running[done], done.result()
            known[label] = row
            save(arguments.out, {name: known[name] for name in order if name in known})
            print(f"{label:40} {json.dumps(summary(row))}", flush=True)


def has_adapters(loras: Path, entry: Entry) -> bool:
    return entry.recipe == "wild" or (loras / entry.recipe / SPLIT).is_dir()


def summary(row: Mapping[str, Any]) -> object:
    if "groups" in row:
        return {group: {name: round(mean(values), 3) for name, values in told.items()} for group, told in row["groups"].items()}
    if "values" not in row:
        return [{key: value for key, value in one.items() if key != "each"} for one in row["rows"]]
    return {name: round(mean(value for value in values if value is not None), 3) for name, values in row["values"].items()}


if __name__ == "__main__":
    main()
