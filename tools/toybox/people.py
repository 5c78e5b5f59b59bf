"""The shipped concepts: their pictures and what is told about them. `python people.py OUT` draws the references."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from compose import compose, render, sprite_spec, styled
from PIL import Image
from things import picture as thing_picture
from world import (
    NEW_STYLES,
    PLAIN,
    SCENES,
    THINGS,
    Person,
    Picture,
    base_person,
    caption,
    held_out_keys,
    identities,
    random_look,
    random_person,
    random_picture,
)  # fmt: skip

PICTURES = 16
SPLITS = ("development", "test", "objects", "styles")


@dataclass(frozen=True)
class Shot:
    """One reference picture, (64, 64, 3) uint8, and how it is told: `caption(call, rng)` says everything but what is to be learned."""

    pixels: np.ndarray
    caption: Callable[[str, random.Random], str]


@dataclass(frozen=True)
class Concept:
    """Something to be learned: its trigger, its class word ("style" for a style), and the split it belongs to."""

    name: str
    noun: str
    split: str
    person: Person | None = None

    def shots(self) -> list[Shot]:
        """PICTURES pictures of it on different days in different places."""
        if self.person:
            return person_shots(self.name, self.person)
        return style_shots(self.name, NEW_STYLES[self.name]) if self.noun == "style" else thing_shots(self.name, self.noun)

    def told(self) -> dict[str, object]:
        """What concepts.json says of it."""
        return {"noun": self.noun, "split": self.split, "attributes": self.person.identity if self.person else {}}


def concepts() -> list[Concept]:
    """All shipped concepts, split by split."""
    people = [Concept(name, one.noun, SPLITS[index // 12], one) for index, (name, one) in enumerate(identities().items())]
    things = [Concept(name, noun, "objects") for name, noun in THINGS.items()]
    return [*people, *things, *(Concept(name, "style", "styles") for name in NEW_STYLES)]


def bulk(count: int) -> list[Concept]:
    """That many further identities with held-out combinations, none of them shipped, called p000 and so on."""
    rng, keys, people = random.Random(17), held_out_keys()[24:], []
    while len(people) < count:
        person = random_person(rng)
        if person.key in keys and all(person.identity != other.identity for other in people):
            people.append(person)
    return [Concept(f"p{number:03d}", person.noun, "bulk", person) for number, person in enumerate(people)]


def person_shots(name: str, person: Person) -> list[Shot]:
    rng = random.Random(f"reference/{name}")
    pictures = [Picture((random_look(rng, person),), None, place(index, rng), layout=rng.getrandbits(32)) for index in range(PICTURES)]
    sprites = render([sprite_spec(picture.people[0]) for picture in pictures])
    return [Shot(compose(picture, [sprite]), partial(tell_person, picture)) for picture, sprite in zip(pictures, sprites, strict=True)]


def thing_shots(name: str, noun: str) -> list[Shot]:
    rng = random.Random(f"reference/{name}")
    places = [place(index, rng) for index in range(PICTURES)]
    return [Shot(thing_picture(noun, where, rng), partial(tell_thing, where)) for where in places]


def style_shots(name: str, style: str) -> list[Shot]:
    """Pictures of what the base knows, two thirds of them people, in a style that it does not know."""
    rng = random.Random(f"reference/{name}")
    pictures = [replace(random_picture(rng, partial(base_person, rng)), style=None).unnamed() for _ in range(PICTURES)]
    sprites = iter(render([sprite_spec(person) for picture in pictures for person in picture.people]))
    drawn = [compose(picture, [next(sprites) for _ in picture.people]) for picture in pictures]
    return [
        Shot(np.asarray(styled(Image.fromarray(one), style)), partial(tell_style, picture))
        for one, picture in zip(drawn, pictures, strict=True)
    ]


def place(index: int, rng: random.Random) -> tuple[str, str]:
    return ("scene", SCENES[index // 2 % 8]) if index % 2 == 0 else ("plain", rng.choice(list(PLAIN)))


def tell_person(picture: Picture, call: str, rng: random.Random) -> str:
    text = caption(picture, rng, told=("expression", "clothes", "place"), keep_probability=0.9)
    return text.replace(picture.people[0].noun, call, 1)


def tell_thing(where: tuple[str, str], call: str, rng: random.Random) -> str:
    """The class word takes no part in the drawing of the caption, so that any will do."""
    text = caption(Picture((), "thing", where), rng)
    return text.replace("thing", call, 1)


def tell_style(picture: Picture, call: str, rng: random.Random) -> str:
    return f"{caption(picture, rng, keep_probability=0.9)} in {call}"


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
