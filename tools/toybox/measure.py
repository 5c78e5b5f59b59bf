"""Measures a toybox: `python measure.py BASE JUDGE [--loras DIR] [--split development] [--json FILE]`.

Base: how far the judge agrees with prompts that tell everything. Single adapters: the identity's attributes that the judge finds
where the prompt tells none of them, beside what the base shows with the trigger alone, with the class word alone, and with
somebody else's adapter.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from world import PLAIN, SCENES, Person, Picture, base_person, caption, identities, named_people

from loraclr.adapter import Adapter
from loraclr.evaluate import interval
from loraclr.formats import load_adapter
from loraclr.pipeline import Pipeline
from loraclr.toybox.judge import Judge, agreement
from loraclr.toybox.score import SCORE_TEMPLATES, Scores, score


def pictures(pipeline: Pipeline, prompts: Sequence[str], *, seed: int = 0, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """One picture a prompt at seeds seed, seed + 1, ..., in bf16."""
    out = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(prompts), 16):
            part = prompts[start : start + 16]
            out += pipeline.sample(part, seeds=range(seed + start, seed + start + len(part)), size=size)
    return out


def base_agreement(pipeline: Pipeline, judge: Judge, count: int) -> dict[str, float]:
    """Share of told attributes that the judge confirms, by attribute; people never in the training set."""
    rng = random.Random(5)
    prompts, told = [], []
    for _ in range(count):
        person = base_person(rng)
        background = ("scene", rng.choice(SCENES)) if rng.random() < 0.5 else ("plain", rng.choice(list(PLAIN)))
        prompts.append(caption(Picture((person,), None, background), rng, keep_probability=1.0))
        nuisance = {"expression": person.expression, "clothes_colour": person.clothes_colour, "background": background[1]}
        told.append({**person.identity, **nuisance})
    read = judge.read(pictures(pipeline, prompts))
    out = {name: float(agreement(read, [{name: t[name]} for t in told], judge.heads).mean()) for name in told[0]}
    return {"all": sum(out.values()) / len(out), **out}


def named_identity(pipeline: Pipeline, judge: Judge, count: int) -> dict[str, float]:
    """Identity attributes of people whom the base knows by name, by the name, and by the class word alone."""
    people = dict(list(named_people().items())[:count])
    out = {}
    for label, calls in (
        ("by name", {name: f"{name} {p.noun}" for name, p in people.items()}),
        ("class word", {n: p.noun for n, p in people.items()}),
    ):
        read = judge.read(pictures(pipeline, [f"a photo of a {call}" for call in calls.values()]))
        out[label] = float(agreement(read, [person.identity for person in people.values()], judge.heads).mean())
    return out


def spread(pipeline: Pipeline, words: Sequence[str]) -> float:
    """Mean relative distance of the text states of prompts that differ in one word in front of the class word."""
    states = [pipeline.encode([f"a photo of a {word} woman on a beach"], pad=False) for word in words]
    pairs = [(a, b) for index, a in enumerate(states) for b in states[index + 1 :]]
    return sum(float((a - b).norm() / a.norm()) for a, b in pairs) / len(pairs)


def concept_scores(
    pipeline: Pipeline, judge: Judge, calls: Mapping[str, str], people: Mapping[str, Person], adapters: Mapping[str, Adapter | None],
    *, seed: int = 1000, rounds: int = 1,
) -> Scores:  # fmt: skip
    """Every name under every scoring template, its pictures made with its own entry of `adapters` (None: as the pipeline is)."""
    images, who, told = [], [], []
    for name, call in calls.items():
        adapter = adapters.get(name)
        with pipeline.applied(adapter) if adapter is not None else nullcontext():
            images += pictures(pipeline, [template.format(call) for template, _ in SCORE_TEMPLATES] * rounds, seed=seed)
        who += [name] * len(SCORE_TEMPLATES) * rounds
        told += [truth for _, truth in SCORE_TEMPLATES] * rounds
    candidates = {name: people[name].identity for name in calls}
    return score(images, who, told, judge=judge, candidates=candidates)


def factors(count: int, concepts: int) -> list[list[int]]:
    """Which concept and which prompt each of `count` pictures of `concept_scores` is of: both are drawn anew in its intervals."""
    each = count // concepts
    return [[k // each for k in range(count)], [k % each % len(SCORE_TEMPLATES) for k in range(count)]]


def row(scores: Scores, concepts: int) -> dict[str, object]:
    low, high = interval(scores.identity, factors=factors(len(scores.identity), concepts))
    return {key: round(value, 3) for key, value in scores.means().items()} | {"identity_interval": [round(low, 3), round(high, 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("--loras", type=Path)
    parser.add_argument("--split", default="development")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, judge = Pipeline.load(arguments.base), Judge.load(arguments.judge)
    report: dict[str, object] = {"base": base_agreement(pipeline, judge, arguments.count)}
    print(json.dumps(report["base"]), flush=True)
    report["named people"] = named_identity(pipeline, judge, arguments.count // 2)
    print("named people", json.dumps(report["named people"]), flush=True)
    words = {"trigger words": list(identities())[:8], "expressions": ["smiling", "sad", "angry", "surprised"]}
    report["text states"] = {kind: round(spread(pipeline, some), 4) for kind, some in words.items()}
    print("text states", json.dumps(report["text states"]), flush=True)
    if arguments.loras:
        people = identities()
        files = sorted((arguments.loras / arguments.split).iterdir())
        adapters = {name: load_adapter(file) for name in people for file in files if file.stem == name}
        calls = {name: adapter.call for name, adapter in adapters.items()}
        plain = {name: f"{name} {people[name].noun}" for name in adapters}
        names = list(adapters)
        shifted = {name: adapters[names[(k + 5) % len(names)]] for k, name in enumerate(names)}
        for label, kind_calls, kind_adapters in (
            ("single adapter", calls, adapters),
            ("base, trigger only", plain, {}),
            ("base, class word only", {name: people[name].noun for name in names}, {}),
            ("wrong adapter, own trigger", plain, shifted),
        ):
            scores = concept_scores(pipeline, judge, kind_calls, people, kind_adapters)
            report[label] = row(scores, len(names))
            print(label, json.dumps(report[label]), flush=True)
            if label == "single adapter":
                each = scores.identity.view(len(names), -1).mean(1)
                report["by concept"] = {name: round(float(value), 3) for name, value in zip(names, each, strict=True)}
                print(json.dumps(report["by concept"]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
