"""The paper's Table 1 and what belongs to it, on the toybox: `python results.py LORAS OUT.json [ENTRY ...]`, on the *test* identities.

Every entry merges the twelve adapters of one recipe by one method. Its pictures, and those of each adapter alone, of the base with the
class word and of somebody else's adapter, are drawn for the same twenty prompts and seeds and judged by ToyClip (text, image), ToyFace
(identity, leakage) and the attribute judge. LORAS holds RECIPE/test/, as `adapters.py` leaves them; the mixed inputs are the toybox's
own files. Merges and pictures are kept in --work, finished rows in OUT.json, which has the values of every picture; all are found again
by what made them: files, settings, prompts, seeds, base and judges, but not the code. After a change of code give another
--work and OUT.json. More --seeds than a row has are drawn beside those that are there; a row that has more is left as it is.

    core                the table's rows that most people want to know; without any entry all of them
    --split development the same of the identities that choices are made on
    --figure counts     Fig. 5: 2, 5 and 8 concepts in three orders; all twelve are rows of the table
    --figure margins    Fig. 8: margin and lambda
    --figure inputs     adapters trained half and a quarter as long: LORAS/half/RECIPE/test, LORAS/quarter/RECIPE/test
    --figure mixture    Fig. 6 and 7: people, things and styles in one model
    --figure scenes     Fig. 3, 4, 10 to 13: two to six people side by side, by regions and by strategies while sampling
    --figure tuning     settings of other methods, on the *development* identities, from which the table's are chosen
    --figure beyond     12 to 100 identities, whom `adapters.py --bulk` trained: LORAS/bulk, their pictures LORAS/pictures
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import scenes
import torch
from compose import styled
from entries import (
    BULK,
    CONTROLLED,
    CORE,
    FIGURES,
    MIXED,
    MIXTURES,
    SCENE_COUNTS,
    SCENES,
    SPLIT,
    STYLE_PROMPTS,
    TABLE,
    THING_PROMPTS,
    Entry,
)
from people import bulk
from PIL import Image
from scenes import Cast
from torch import Tensor
from world import NEW_STYLES

from loraclr import __version__
from loraclr.adapter import Adapter
from loraclr.collect import Collection, collection_for
from loraclr.evaluate import Row, Subject, Variant, evaluate
from loraclr.evaluate.subjects import read_prompts
from loraclr.formats import load_adapter, save_adapter
from loraclr.loading import half
from loraclr.merge import merge
from loraclr.methods import make_method
from loraclr.pipeline import Pipeline
from loraclr.toybox import Toybox, ToyConcept, open_toybox
from loraclr.toybox.judge import agreement

COMPARED = ("text", "image", "face_cosine", "attributes")  # of a picture drawn again; the others are thresholds on these
MEASURES = ("text", "image", "identity", "face_cosine", "leakage", "attributes")
Known = dict[str, dict[str, Any]]  # row label -> what is in OUT.json


# ---- what is drawn


class Bench:
    """A toybox with everything that rows need, opened once in each process."""

    def __init__(self, loras: Path, work: Path, seeds: int, first: int = 0) -> None:
        """Draws the seeds from `first` up to `seeds`, without that."""
        torch.set_num_threads(1)
        self.box: Toybox = open_toybox()
        self.loras, self.work, self.seeds, self.first = loras, work, seeds, first
        self.kept = 0  # of the last row's pictures those that were there already
        self.pipeline: Pipeline = self.box.load()

    def concept(self, name: str) -> ToyConcept:
        return self.box.concepts[name] if name in self.box.concepts else bulk_concepts()[name]

    def references(self, name: str) -> list[Image.Image]:
        """Of people who are not shipped, what their adapters were trained on."""
        if name in self.box.concepts:
            return self.box.references(name)
        return [Image.open(path).convert("RGB") for path in sorted((self.loras / "pictures" / name).glob("*.png"))]

    def prompts(self, entry: Entry) -> dict[str, str]:
        every = list(read_prompts(self.box.prompts_path).items())
        return dict(every[:: len(every) // entry.prompts])

    def names(self, entry: Entry) -> list[str]:
        return list(entry.names) or self.box.names(entry.split)

    def files(self, entry: Entry) -> dict[str, Path]:
        if entry.recipe == "wild":
            return {name: self.box.adapter_paths(self.box.concepts[name].split)[name] for name in self.names(entry)}
        folder = folder_of(self.loras, entry)
        return {name: next(path for path in folder.iterdir() if path.stem == name) for name in self.names(entry)}

    def lacking(self, entry: Entry) -> list[str]:
        """Of whom the entry's recipe has no adapter."""
        folder = folder_of(self.loras, entry)
        there = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
        return [] if entry.recipe == "wild" else [name for name in self.names(entry) if name not in there]

    def adapters(self, entry: Entry) -> dict[str, Adapter]:
        return {name: load_adapter(path, base=self.pipeline) for name, path in self.files(entry).items()}

    def merge_key(self, entry: Entry) -> str:
        """Of everything that makes a merge but the code: its settings with their defaults, its files, the base."""
        settings = "" if entry.method == "none" else (make_method(entry.method, **entry.parameters), collected(entry), __version__)
        return digest(repr(settings), *self.files(entry).values(), *base_files(self.box))

    def row_key(self, kind: str, entry: Entry | None, seeds: int | None = None) -> str:
        """Of everything that makes a row but the code: how it is drawn, merge and base, prompts, judges."""
        drawn = (
            kind,
            seeds or self.seeds,
            (self.names(entry), self.prompts(entry)) if entry else SCENE_COUNTS,
            THING_PROMPTS,
            STYLE_PROMPTS,
        )
        judges = [self.box.data / f"{name}.safetensors" for name in ("judge", "face", "clip")]
        return digest(repr(drawn), self.merge_key(entry) if entry and kind != "base" else "", *judges, *base_files(self.box))

    def merged(self, entry: Entry) -> tuple[Adapter, dict[str, Any]]:
        """The merge and what it took, from --work if it was made before from the same files by the same settings."""
        stem = self.work / "merged" / self.merge_key(entry)
        noted = stem.with_suffix(".json")
        if not noted.exists():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                alone.submit(merge_to, stem, self.loras, entry).result()
        notes = json.loads(noted.read_text())
        return load_adapter(stem.parent / notes.pop("file", f"{stem.name}.safetensors"), base=self.pipeline), notes

    def subjects(self, calls: Mapping[str, str]) -> list[Subject]:
        return [Subject(name, call, self.concept(name).noun, self.references(name)) for name, call in calls.items()]

    def draw(self, label: str, variant: Variant, subjects: Sequence[Subject], prompts: Mapping[str, str] | Sequence[str]) -> Row:
        """Draws and judges; the pictures are in --work, in a folder named after `label`. Only people have faces and attributes."""
        folder = self.work / slug(label)
        people = all(self.concept(one.name).attributes for one in subjects)
        with half("cpu"):
            found = evaluate(
                self.pipeline, {"row": variant}, subjects, prompts=prompts, judge=self.box.clip,
                face=self.box.face if people else None, output=folder, seeds=range(self.first, self.seeds), batch_size=8, control=False,
            )  # fmt: skip
        row, self.kept = found.row("row"), found.kept
        return replace(row, values={**row.values, "attributes": self.attributes(folder, row)}) if people else row

    def attributes(self, folder: Path, row: Row) -> Tensor:
        """(n,) share of the identity's attributes that the judge finds."""
        found = []
        for start in range(0, len(row.files), 64):
            images = [Image.open(folder / file).convert("RGB") for file in row.files[start : start + 64]]
            people = [self.concept(name).attributes for name in row.concepts[start : start + 64]]
            found.append(agreement(self.box.judge.read(images), people, self.box.judge.heads))
        return torch.cat(found)


def merge_to(stem: Path, loras: Path, entry: Entry) -> None:
    """The merge and what it took, in files of that name; in a process of its own, as memory that was ever used may count for the next."""
    bench = Bench(loras, stem.parent, 0)
    files = list(bench.files(entry).values())
    began, held = time.process_time(), forget_peak()
    result = merge(files, base=bench.pipeline, method=entry.method, parameters=entry.parameters, name="merged")
    told = {"merge_seconds": round(time.process_time() - began, 1), "rank": max((layer.rank for layer in result.layers), default=0)}
    told["merge_megabytes"] = round((peak() - held) / 1e6)
    told |= {"hinge": share_active(result.layers)} if entry.needs_statistics else {}
    stem.parent.mkdir(parents=True, exist_ok=True)
    tokens_only = not len(result.adapter)
    file = stem.with_suffix(".pth" if tokens_only else ".safetensors")
    save_adapter(result.adapter, file, format="edlora" if tokens_only else "diffusers")
    told["file"] = file.name
    stem.with_suffix(".json").write_text(json.dumps(told) + "\n")


def collected(entry: Entry) -> Collection | None:
    """What the entry's merge collects, as far as its method asks for it: what `merge` does without a `collection`."""
    needs = make_method(entry.method, **entry.parameters).needs
    if not {"statistics", "sample", "preserve", "predictions"} & needs:
        return None
    chosen = collection_for(needs)
    return chosen if "preserve" in needs else replace(chosen, preserve=())


def forget_peak() -> int:
    """Bytes that this process has in memory now, from which on `peak` counts (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes in memory since `forget_peak`."""
    told = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert told is not None
    return int(told[1]) * 1024


@cache
def bulk_concepts() -> dict[str, ToyConcept]:
    return {one.name: ToyConcept(one.name, one.noun, BULK, one.person.identity) for one in bulk(100) if one.person}


@cache
def base_files(box: Toybox) -> tuple[Path, ...]:
    return tuple(sorted(path for path in box.base_path.rglob("*") if path.is_file()))


def digest(*parts: str | Path) -> str:
    """Of texts and of files' contents."""
    made = hashlib.sha256()
    for part in parts:
        made.update((part if isinstance(part, str) else file_digest(part)).encode() + b"\n")
    return made.hexdigest()[:24]


@cache
def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def slug(label: str) -> str:
    return "-".join(re.findall(r"[a-z0-9+.]+", label.lower()))


def share_active(layers: Sequence[Any]) -> float | None:
    """The share of layers in which a hinge was active at the optimum."""
    told = [layer.diagnostics["hinge_active"] for layer in layers if "hinge_active" in layer.diagnostics]
    return round(sum(value > 0 for value in told) / len(told), 3) if told else None


def rows(entries: Mapping[str, Entry], chosen: Mapping[str, Entry] | None = None) -> dict[str, tuple[str, Entry]]:
    """Row label -> kind and entry of all, or of the `chosen` among them: the controls and every recipe's adapters alone come first."""
    found: dict[str, tuple[str, Entry]] = {}
    most = max((entry.names for entry in entries.values() if entry.recipe == BULK), key=len, default=())
    taken = entries if chosen is None else chosen
    for entry in taken.values():
        whole = Entry(entry.recipe, "none", names=most, prompts=entry.prompts, split=entry.split)
        found.setdefault("base, class word", ("base", whole))
        found.setdefault(f"alone, {entry.recipe}", ("alone", whole))
        if entry.recipe in CONTROLLED:
            found.setdefault(f"wrong adapter, {entry.recipe}", ("wrong", whole))
    return found | {name: ("merged", entry) for name, entry in taken.items()}


def variant_of(bench: Bench, kind: str, entry: Entry) -> tuple[Variant, dict[str, str], dict[str, Any]]:
    """What is drawn, the words it is called by, and notes."""
    names = bench.names(entry)
    nouns = {name: bench.concept(name).noun for name in names}
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


def draw_row(
    loras: Path, work: Path, seeds: int, label: str, kind: str, entry: Entry, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """With `before`, the same row of fewer seeds, only the others are drawn."""
    bench = Bench(loras, work, seeds, before["seeds"] if before else 0)
    variant, calls, notes = variant_of(bench, kind, entry)
    began = time.process_time()
    prompts = bench.prompts(entry)
    row = bench.draw(label if entry.split == SPLIT else f"{entry.split} {label}", variant, bench.subjects(calls), prompts)
    drawn = {"concepts": list(calls), "prompts": len(prompts), "seeds": seeds}
    told = {"kind": kind, "recipe": entry.recipe, "method": entry.method, "parameters": dict(entry.parameters), "split": entry.split}
    values = {name: rounded(row.values[name]) for name in MEASURES if name in row.values}
    seconds = None if bench.kept else round(time.process_time() - began, 1)
    if before:
        values = {name: woven(before["values"][name], found, len(calls) * len(prompts)) for name, found in values.items()}
        known = before["drawing_seconds"]
        seconds = None if seconds is None or known is None else round(seconds + known, 1)
    return {**told, **drawn, **notes, "drawing_seconds": seconds, "values": values}


def woven(before: Sequence[Any], more: Sequence[Any], groups: int) -> list[Any]:
    """Of every prompt of every concept the values of its first seeds, then those of the others."""
    old, new = len(before) // groups, len(more) // groups
    return [value for k in range(groups) for value in (*before[k * old : (k + 1) * old], *more[k * new : (k + 1) * new])]


def draw_scenes(loras: Path, work: Path, seeds: int, label: str, kind: str, entry: Entry | None) -> dict[str, Any]:
    """Scenes of test identities; `seeds` times eight of each number of people, and as many of two of a kind; without regions three times as
    many, of two people."""
    bench = Bench(loras, work, seeds)
    adapters = bench.adapters(entry) if entry else {}
    cast = Cast(bench.box, bench.box.names(SPLIT), calls={name: adapter.call for name, adapter in adapters.items()} or None)
    free = kind == "free"
    if entry and (free or kind == "merged"):
        cast = replace(cast, merged=bench.merged(entry)[0])
    elif entry:
        cast = replace(cast, singles=adapters, strategy=kind)
    cast, folder, number = replace(cast, free=free), work / "scenes" / slug(label), 8 * seeds * (3 if free else 1)
    with half("cpu"):
        found = list(scenes.rows(bench.pipeline, cast, (2,) if free else SCENE_COUNTS, number, folder))
        found += scenes.rows(bench.pipeline, replace(cast, alike=True), (2,), number, folder / "alike")
    return {"kind": kind, "recipe": entry.recipe if entry else None, "rows": [scenes.rounded(row) for row in found]}


def draw_mixture(loras: Path, work: Path, seeds: int, label: str, kind: str, entry: Entry) -> dict[str, Any]:
    """Of one model of all people, things and styles, text and image alignment and ToyFace's cosine, kind by kind.

    References of people in a style are their own pictures, turned into it.
    """
    bench, groups = Bench(loras, work, seeds), {}
    box, split = bench.box, {part: bench.box.names(part) for part in MIXED}
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
        told = groups.setdefault(group, {"concepts": [], "prompts": []})
        told["concepts"] += row.concepts
        told["prompts"] += [f"{style}: {prompt}" if style else prompt for prompt in row.prompts]
        for measure in ("text", "image", "face_cosine"):
            if measure in row.values:
                told.setdefault(measure, []).extend(rounded(row.values[measure]))
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
        split = row.get("split", SPLIT)
        entry = Entry(row["recipe"], row["method"], row["parameters"], tuple(row["concepts"]), row["prompts"], split=split)
        variant, calls, _ = variant_of(bench, row["kind"], entry)
        prompts = bench.prompts(entry)
        order = list(prompts)
        chosen = {prompt: prompts[prompt] for prompt in rng.sample(order, max(1, 4 // row["seeds"]))}
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
    parser.add_argument("--split", default=SPLIT, choices=("development", "test"), help="of the table's rows")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/results"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", type=int, metavar="N", default=0)
    arguments = parser.parse_args()
    if arguments.figure and arguments.split != SPLIT:
        parser.error("a figure says itself of which identities it is; leave --split out, or --figure")
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
    box = open_toybox()
    work: Callable[..., dict[str, Any]]
    jobs: Mapping[str, tuple[str, Entry | None]]
    if arguments.figure == "scenes":
        work, jobs, order = draw_scenes, SCENES, list(SCENES)
    elif arguments.figure == "mixture":
        everybody = tuple(name for part in MIXED for name in box.names(part))
        work, order = draw_mixture, list(MIXTURES)
        jobs = {name: (kind, replace(entry, names=everybody)) for name, (kind, entry) in MIXTURES.items()}
    else:
        if arguments.figure:
            entries = FIGURES[arguments.figure](box.names(SPLIT))
        else:
            entries = {name: replace(entry, split=arguments.split) for name, entry in TABLE.items()}
        work, jobs, order = draw_row, rows(entries, wanted(entries, arguments.entries)), list(rows(entries))
    wrong = 0
    bench = Bench(arguments.loras, arguments.work, arguments.seeds)
    common = (work, arguments.loras, arguments.work, arguments.seeds)
    with ProcessPoolExecutor(arguments.workers) as pool:
        running = {}
        for label, (kind, entry) in jobs.items():
            if entry and kind != "base" and (lacking := bench.lacking(entry)):
                print(f"{label}: left out, there is no adapter of {', '.join(lacking)} in {folder_of(arguments.loras, entry)}", flush=True)
                continue
            old, key = known.get(label, {}), bench.row_key(kind, entry)
            same = old.get("key") == bench.row_key(kind, entry, old.get("seeds"))
            if not same or old.get("seeds", arguments.seeds) < arguments.seeds:
                running[pool.submit(*common, label, kind, entry, *([old] if same else []))] = label, key
        for done in as_completed(running):
            label, key = running[done]
            if error := done.exception():
                wrong += 1
                print(f"{label}: {type(error).__name__}: {error}", flush=True)
                continue
            known[label] = {"key": key, **done.result()}
            save(arguments.out, {name: known[name] for name in order if name in known})
            print(f"{label:40} {json.dumps(summary(known[label]))}", flush=True)
    if wrong:
        raise SystemExit(f"{wrong} rows could not be drawn; what they stopped at is above, the others are in {arguments.out}")


def wanted(entries: Mapping[str, Entry], chosen: Sequence[str]) -> dict[str, Entry]:
    """Those of that name, else whose names begin so; `core` are what most people want to know. Raises SystemExit for a name of none."""
    if unknown := [name for name in chosen if not any(label.startswith(name) for label in (*entries, "core"))]:
        raise SystemExit(f"no entry begins with {unknown[0]!r}; there are core, {', '.join(entries)}")
    names = {name for name in chosen if name in entries} | set(CORE if "core" in chosen else ())
    begun = tuple(name for name in chosen if name not in names and name != "core")
    return {name: one for name, one in entries.items() if not chosen or name in names or name.startswith(begun)}


def folder_of(loras: Path, entry: Entry) -> Path:
    return loras / BULK if entry.recipe == BULK else loras / entry.recipe / entry.split


def summary(row: Mapping[str, Any]) -> object:
    if "groups" in row:
        shown = ("text", "image", "face_cosine")
        return {group: {name: round(mean(told[name]), 3) for name in shown if name in told} for group, told in row["groups"].items()}
    if "rows" in row:
        return [{key: value for key, value in one.items() if not isinstance(value, list)} for one in row["rows"]]
    return {name: round(mean(value for value in values if value is not None), 3) for name, values in row["values"].items()}


if __name__ == "__main__":
    main()
