"""The shipped identities: their pictures and what is told about them. `python people.py OUT` draws the references."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from compose import compose, render, sprite_spec
from PIL import Image
from world import PLAIN, SCENES, Person, Picture, caption, identities, random_look

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
    concepts = {}
    for index, (name, person) in enumerate(identities().items()):
        Image.fromarray(np.hstack([shot.pixels for shot in shots(name, person)])).save(arguments.out / f"{name}.png", optimize=True)
        concepts[name] = {"noun": person.noun, "split": "development" if index < 12 else "test", "attributes": person.identity}
    (arguments.out / "concepts.json").write_text(json.dumps(concepts, indent=1) + "\n")


if __name__ == "__main__":
    main()
