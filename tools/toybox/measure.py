"""Measures a toybox: `python measure.py BASE JUDGE [--loras DIR] [--split development] [--face FILE] [--clip FILE] [--json FILE]`.

Base: how far the judge agrees with prompts that tell everything, one person, two side by side and one thing, beside its ceilings.
Single adapters: the identity's attributes that the judge finds where the prompt tells none of them, beside what the base shows with
the trigger alone, with the class word alone, and with somebody else's adapter. ToyFace and ToyClip are measured on the generated
pictures, too: what they were trained on were true ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from people import concepts
from PIL import Image
from safetensors import safe_open
from shown import base_report, pictures, summary
from torch.nn.functional import normalize
from world import Person, identities, named_people

from loraclr.adapter import Adapter
from loraclr.evaluate import interval
from loraclr.evaluate.metrics import image_alignment, text_cosine
from loraclr.formats import load_adapter
from loraclr.pipeline import Pipeline
from loraclr.toybox.clip import ToyClip
from loraclr.toybox.face import ToyFace
from loraclr.toybox.judge import Judge, agreement
from loraclr.toybox.score import SCORE_TEMPLATES, Scores, score

AMONG = 64  # captions, or pictures, that ToyClip chooses from


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


def concept_pictures(
    pipeline: Pipeline, calls: Mapping[str, str], adapters: Mapping[str, Adapter | None], *, seed: int = 1000, rounds: int = 1
) -> dict[str, list[Image.Image]]:
    """Every name under every scoring template, its pictures made with its own entry of `adapters` (None: as the pipeline is)."""
    found = {}
    for name, call in calls.items():
        adapter = adapters.get(name)
        with pipeline.applied(adapter) if adapter is not None else nullcontext():
            found[name] = pictures(pipeline, [template.format(call) for template, _ in SCORE_TEMPLATES] * rounds, seed=seed)
    return found


def concept_scores(judge: Judge, images: Mapping[str, list[Image.Image]], people: Mapping[str, Person]) -> Scores:
    """Of `concept_pictures`, in their order."""
    who = [name for name, shown in images.items() for _ in shown]
    told = [SCORE_TEMPLATES[k % len(SCORE_TEMPLATES)][1] for shown in images.values() for k in range(len(shown))]
    flat = [image for shown in images.values() for image in shown]
    return score(flat, who, told, judge=judge, candidates={name: people[name].identity for name in images})


def alignment(
    clip: ToyClip, images: Mapping[str, list[Image.Image]], nouns: Mapping[str, str], references: Mapping[str, list[Image.Image]]
) -> dict[str, list[float]]:
    """Mean cosine of ToyClip's embeddings: with the prompt, the class word in place of the concept, and with the concept's references."""
    text, image = [], []
    for name, shown in images.items():
        seen = clip.embed_images(shown)
        said = clip.embed_texts([template.format(nouns[name]) for template, _ in SCORE_TEMPLATES])
        text.append(text_cosine(seen, said.repeat(len(shown) // len(said), 1)))
        image.append(image_alignment(seen, clip.embed_images(references[name])))
    return {"text": summary(torch.cat(text)), "image": summary(torch.cat(image))}


def face_report(
    face: ToyFace, images: Mapping[str, list[Image.Image]], references: Mapping[str, list[Image.Image]]
) -> dict[str, list[float]]:
    """Accepts of pictures of each concept at the judge's threshold: against single references and against the mean of each concept's."""
    found = {name: face.embed(shown) for name, shown in images.items()}
    known = {name: face.embed(shown) for name, shown in references.items()}
    report = {}
    for label, others in (
        ("one reference", known),
        ("mean reference", {name: normalize(r.mean(0), dim=0)[None] for name, r in known.items()}),
    ):
        accepted = {(a, b): (x @ y.T >= face.threshold).double().mean(1) for a, x in found.items() for b, y in others.items()}
        report[f"true accepts, {label}"] = summary(torch.cat([row for (a, b), row in accepted.items() if a == b]))
        report[f"false accepts, {label}"] = summary(torch.cat([row for (a, b), row in accepted.items() if a != b]))
    return report


def clip_report(clip: ToyClip, images: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Recall@1 among AMONG, both ways, on generated pictures and on true ones of the same prompts."""
    read, report = clip.embed_texts(prompts), {}
    for kind, shown in images.items():
        products = [a @ b.T for a, b in zip(clip.embed_images(shown).split(AMONG), read.split(AMONG), strict=True) if len(a) == AMONG]
        ways = {"caption of a picture": products, "picture of a caption": [product.T for product in products]}
        hits = {way: torch.cat([p.argmax(1) == torch.arange(AMONG) for p in some]).double() for way, some in ways.items() if some}
        report[kind] = {way: summary(hit) for way, hit in hits.items()}
    return report


def factors(count: int, concepts: int) -> list[list[int]]:
    """Which concept and which prompt each of `count` pictures of `concept_scores` is of: both are drawn anew in its intervals."""
    each = count // concepts
    return [[k // each for k in range(count)], [k % each % len(SCORE_TEMPLATES) for k in range(count)]]


def row(scores: Scores, concepts: int) -> dict[str, object]:
    low, high = interval(scores.identity, factors=factors(len(scores.identity), concepts))
    return {key: round(value, 3) for key, value in scores.means().items()} | {"identity_interval": [round(low, 3), round(high, 3)]}


def held_out(weights: Path) -> object:
    """What the judge's own training reported on pictures of people it never saw."""
    with safe_open(weights, "pt") as file:
        told = file.metadata()
    return json.loads(told.get("held_out") or told["held_out_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("--loras", type=Path)
    parser.add_argument("--split", default="development")
    parser.add_argument("--count", type=int, default=128, help="prompts for the base; 0: only the adapters")
    parser.add_argument("--face", type=Path, help="ToyFace's weights, to be measured on the adapters' pictures")
    parser.add_argument("--clip", type=Path, help="ToyClip's weights, to be measured on the base's pictures")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, judge = Pipeline.load(arguments.base), Judge.load(arguments.judge)
    judges = {"attribute judge": arguments.judge, "toyface": arguments.face, "toyclip": arguments.clip}
    report: dict[str, object] = {"judges, held out": {name: held_out(path) for name, path in judges.items() if path}}
    if arguments.count:
        base, seen, prompts = base_report(pipeline, judge, arguments.count)
        report |= base
        print(json.dumps(report), flush=True)
        report["named people"] = named_identity(pipeline, judge, arguments.count // 2)
        print("named people", json.dumps(report["named people"]), flush=True)
        words = {"trigger words": list(identities())[:8], "expressions": ["smiling", "sad", "angry", "surprised"]}
        report["text states"] = {kind: round(spread(pipeline, some), 4) for kind, some in words.items()}
        print("text states", json.dumps(report["text states"]), flush=True)
    if arguments.count and arguments.clip:
        report["toyclip"] = clip_report(ToyClip.load(arguments.clip), seen, prompts)
        print("toyclip", json.dumps(report["toyclip"]), flush=True)
    if arguments.loras:
        people = identities()
        files = sorted((arguments.loras / arguments.split).iterdir())
        adapters = {name: load_adapter(file) for name in people for file in files if file.stem == name}
        calls = {name: adapter.call for name, adapter in adapters.items()}
        plain = {name: f"{name} {people[name].noun}" for name in adapters}
        names = list(adapters)
        references = {one.name: [Image.fromarray(shot.pixels) for shot in one.shots()] for one in concepts() if one.name in names}
        shifted = {name: adapters[names[(k + 5) % len(names)]] for k, name in enumerate(names)}
        for label, kind_calls, kind_adapters in (
            ("single adapter", calls, adapters),
            ("base, trigger only", plain, {}),
            ("base, class word only", {name: people[name].noun for name in names}, {}),
            ("wrong adapter, own trigger", plain, shifted),
        ):
            images = concept_pictures(pipeline, kind_calls, kind_adapters)
            scores = concept_scores(judge, images, people)
            report[label] = row(scores, len(names))
            print(label, json.dumps(report[label]), flush=True)
            if arguments.face:
                report[f"toyface, {label}"] = face_report(ToyFace.load(arguments.face), images, references)
                print("toyface", json.dumps(report[f"toyface, {label}"]), flush=True)
            if arguments.clip:
                nouns = {name: people[name].noun for name in names}
                report[f"toyclip, {label}"] = alignment(ToyClip.load(arguments.clip), images, nouns, references)
                print("toyclip", json.dumps(report[f"toyclip, {label}"]), flush=True)
            if label == "single adapter":
                each = scores.identity.view(len(names), -1).mean(1)
                report["by concept"] = {name: round(float(value), 3) for name, value in zip(names, each, strict=True)}
                print(json.dumps(report["by concept"]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
