"""How many people fit into one picture: scenes of 64 pixels a person side by side, each in a box, read by the attribute judge.

    python scenes.py                                          the base alone, told what everybody looks like
    python scenes.py --lora merged.safetensors                one adapter that holds all, by regions
    python scenes.py --loras FOLDER --strategy omg            one file for each, kept apart at sampling time
    ... --counts 2 --free                                     by the prompt alone, no boxes: masks come from attention
    ... --counts 2 --alike                                    two women or two men

A person is present where ToyFace takes the own box for the person. Attributes are the share of five that the judge finds there; it
always sees somebody: what it says of a box in which nobody is, is guessed. Look at the pictures, too (--pictures).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from world import Person, person_words

from loraclr.adapter import Adapter
from loraclr.conditioning import Region
from loraclr.evaluate import attribute_closeness, centres, presence
from loraclr.evaluate.subjects import call_of
from loraclr.formats import load_adapter
from loraclr.generate import generate
from loraclr.pipeline import Pipeline
from loraclr.strategies import Part, make_strategy
from loraclr.toybox import SPLITS, Toybox, open_toybox

SIDE = 64
CONTEXT = "people standing together in a forest"


@dataclass(frozen=True)
class Cast:
    """Who takes part and how: one adapter that holds all, or one for each with or without a strategy, or the base and words."""

    box: Toybox
    names: Sequence[str]
    merged: Adapter | None = None
    singles: Mapping[str, Adapter] | None = None
    calls: Mapping[str, str] | None = None  # words that call each, where the adapters do not say
    strategy: str | None = None
    free: bool = False  # no boxes
    alike: bool = False  # all of one class: women or men

    def call(self, name: str) -> str:
        """The words that call somebody, with an article; for the base what it looks like."""
        if self.calls is not None:
            return f"a {self.calls[name]}"
        if self.merged is not None:
            return f"a {call_of(self.merged, name, alone=False)}"
        if self.singles is not None:
            return f"a {self.singles[name].call}"
        concept = self.box.concepts[name]
        return person_words(Person(**concept.attributes, noun=concept.noun), None, {"expression": False, "clothes": False})


def people(cast: Cast, count: int, scene: int) -> list[str]:
    """Drawn by random, the same for the same number of a scene."""
    order = [cast.names[k] for k in torch.randperm(len(cast.names), generator=torch.Generator().manual_seed(scene)).tolist()]
    if cast.alike:
        order = [name for name in order if cast.box.concepts[name].noun == cast.box.concepts[order[0]].noun]
    return order[:count]


def draw(pipeline: Pipeline, cast: Cast, count: int, scene: int) -> tuple[list[str], Image.Image]:
    """Who is in it, and the picture; its seed is the scene's number."""
    chosen = people(cast, count, scene)
    calls = [cast.call(name) for name in chosen]
    regions = [Region(f"{call} in a forest", (0.0, k / count, 1.0, (k + 1) / count)) for k, call in enumerate(calls)]
    prompt = " and ".join(calls) + " in a forest" if cast.strategy == "clora" else CONTEXT
    if cast.free:
        prompt = f"{calls[0]} on the left and {calls[1]} on the right in a forest"
    parts = [Part(cast.singles[name], noun=cast.box.concepts[name].noun) for name in chosen] if cast.singles and cast.strategy else []
    with pipeline.applied(cast.merged) if cast.merged is not None else nullcontext():
        (made,) = generate(
            pipeline, [prompt], seeds=[scene], size=(SIDE, SIDE * count), regions=() if cast.free else regions,
            strategy=make_strategy(cast.strategy) if cast.strategy else None, parts=parts,
        )  # fmt: skip
    return chosen, made.image


def crops(image: Image.Image, count: int) -> list[Image.Image]:
    return [image.crop((SIDE * k, 0, SIDE * (k + 1), SIDE)) for k in range(count)]


def read(box: Toybox, chosen: Sequence[str], image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Two times (boxes, people): ToyFace's closeness of each box to each person, and the share of the person's attributes found there."""
    seen, judge = crops(image, len(chosen)), box.judge
    faces = torch.cat(box.face.embed_faces(seen))
    known = centres([box.face.embed_faces(box.references(name)) for name in chosen], box.face.limit)
    people = [box.concepts[name].attributes for name in chosen]
    truth = [{key: judge.heads[key].index(value) for key, value in one.items()} for one in people]
    return box.face.limit.closeness(faces, known), attribute_closeness(judge.read(seen), truth)


def rows(pipeline: Pipeline, cast: Cast, counts: Sequence[int], scenes: int, pictures: Path | None = None) -> Iterator[dict[str, Any]]:
    """What is found in `scenes` scenes of each number of people; of `faces` and `attributes` the values of every person of every scene."""
    limit = cast.box.face.limit
    for count in counts:
        faces, attributes, began = [], [], time.process_time()
        for scene in range(scenes):
            chosen, image = draw(pipeline, cast, count, scene)
            for tables, table in zip((faces, attributes), read(cast.box, chosen, image), strict=True):
                tables.append(table)
            if pictures is not None:
                pictures.mkdir(parents=True, exist_ok=True)
                image.save(pictures / f"{count}-{scene}.png")
        seconds = (time.process_time() - began) / scenes
        placed, anywhere = (presence(faces, limit, placed=placed) for placed in (True, False))
        others = ~torch.eye(count, dtype=torch.bool)
        yield {
            "people": count, "alike": cast.alike, "scenes": scenes, "limit": limit.value, "present": float(placed.share.mean()),
            "all present": float(placed.everyone.mean()), "present anywhere": float(anywhere.share.mean()),
            "taken for another": float(torch.stack([limit.accepts(table[others]).double().mean() for table in faces]).mean()),
            "seconds": seconds, "faces": [table.diagonal().tolist() for table in faces],
            "attributes": [table.diagonal().tolist() for table in attributes],
        }  # fmt: skip


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        return [short(one) for one in value] if isinstance(value, list) else round(value, 3) if isinstance(value, float) else value

    return {key: short(value) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toybox", type=Path, help="the toybox's data; the package's own without")
    parser.add_argument("--lora", type=Path, help="one adapter that holds all")
    parser.add_argument("--loras", type=Path, help="a folder with one adapter for each, for --strategy")
    parser.add_argument("--strategy", choices=("omg", "clora"))
    parser.add_argument("--split", default="development", choices=SPLITS[:2])
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--scenes", type=int, default=6, help="different groups of people for each count, one seed each")
    parser.add_argument("--free", action="store_true", help="no boxes; for two people, told to be left and right")
    parser.add_argument("--alike", action="store_true", help="people of one class only")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    if (arguments.strategy is None) != (arguments.loras is None):
        parser.error("--strategy and --loras go together")
    if arguments.free and arguments.counts != [2]:
        parser.error("--free knows words for two people only: --counts 2")
    box = Toybox(arguments.toybox) if arguments.toybox else open_toybox()
    pipeline = box.load()
    cast = Cast(
        box, box.names(arguments.split), merged=load_adapter(arguments.lora, base=pipeline) if arguments.lora else None,
        singles={path.stem: load_adapter(path, base=pipeline) for path in arguments.loras.iterdir()} if arguments.loras else None,
        strategy=arguments.strategy, free=arguments.free, alike=arguments.alike,
    )  # fmt: skip
    for row in rows(pipeline, cast, arguments.counts, arguments.scenes, arguments.pictures):
        print(json.dumps(rounded(row)), flush=True)


if __name__ == "__main__":
    main()
