"""The shipped concepts: their pictures and what is told about them. `python people.py OUT` draws the references."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from compose import compose, render, sprite_spec
from PIL import Image
from world import PLAIN, SCENES, Person, Picture, caption, held_out_keys, identities, random_look, random_person

PICTURES = 16


@dataclass(frozen=True)
class Shot:
    """One reference picture: its pixels (64, 64, 3) uint8 and its ground truth."""

    pixels: np.ndarray
    picture: Picture

    def caption(self, call: str, rng: random.Random) -> str:
        """A caption that tells everything but the identity, and calls the person by `call` (trigger and class word)."""
        text = caption(self.picture, rng, told=("expression", "clothes", "place"), keep_probability=0.9)
        return text.replace(self.picture.people[0].noun, call, 1)


@dataclass(frozen=True)
class Concept:
    """Something to be learned: its trigger, its class word, and the split it belongs to."""

    name: str
    noun: str
    split: str
    person: Person

    def shots(self) -> list[Shot]:
        return shots(self.name, self.person)

    def told(self) -> dict[str, object]:
        """What concepts.json says of it."""
        return {"noun": self.noun, "split": self.split, "attributes": self.person.identity}


def concepts() -> list[Concept]:
    """All shipped concepts, split by split."""
    return [
        Concept(name, person.noun, "development" if index < 12 else "test", person)
        for index, (name, person) in enumerate(identities().items())
    ]


def bulk(count: int) -> list[Concept]:
    """That many further identities with held-out combinations, none of them shipped, called p000 and so on."""
    rng, keys, people = random.Random(17), held_out_keys()[24:], []
    while len(people) < count:
        person = random_person(rng)
        if person.key in keys and all(person.identity != other.identity for other in people):
            people.append(person)
    return [Concept(f"p{number:03d}", person.noun, "bulk", person) for number, person in enumerate(people)]


def shots(name: str, person: Person) -> list[Shot]:
    """PICTURES pictures of one person on different days in different places."""
    rng = random.Random(f"reference/{name}")
    pictures = []
    for index in range(PICTURES):
        background = ("scene", SCENES[index // 2 % 8]) if index % 2 == 0 else ("plain", rng.choice(list(PLAIN)))
        pictures.append(Picture((random_look(rng, person),), None, background, layout=rng.getrandbits(32)))
    sprites = render([sprite_spec(picture.people[0]) for picture in pictures])
    return [Shot(compose(picture, [sprite]), picture) for picture, sprite in zip(pictures, sprites, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for NAME.png, one row of pictures each, and concepts.json")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    told = {}
    for concept in concepts():
        row = np.hstack([shot.pixels for shot in concept.shots()])
        Image.fromarray(row).save(arguments.out / f"{concept.name}.png", optimize=True)
        told[concept.name] = concept.told()
    (arguments.out / "concepts.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
