"""Composes a training set once: `python data.py OUT --single 80000 --wide 24000`.

OUT holds single.npy (n, 64, 64, 3) and wide.npy (m, 64, 128, 3) uint8, and pictures.pkl with the `Picture` of every row:
captions are drawn anew from those each time a picture is used.
"""

from __future__ import annotations

import argparse
import functools
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from compose import SIDE, compose, render, sprite_spec
from world import Person, Picture, base_person, named_people, random_look, random_picture

NAMED = 0.45  # the share of people who have a name
LOOKS = 28  # sprites of each of them


@functools.cache
def _pool(out: Path) -> tuple[np.ndarray, dict[Person, int]]:
    return np.load(out / "sprites.npy", mmap_mode="r"), pickle.loads((out / "people.pkl").read_bytes())


def _compose_part(out: Path, pictures: list[Picture]) -> np.ndarray:
    sprites, index = _pool(out)
    return np.stack([compose(picture, [sprites[index[person]] for person in picture.people]) for picture in pictures])


def build(out: Path, *, single: int, wide: int, pool: int, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    strangers = list(dict.fromkeys(base_person(rng) for _ in range(pool)))
    named = list(dict.fromkeys(random_look(rng, person) for person in named_people().values() for _ in range(LOOKS)))
    people = list(dict.fromkeys([*strangers, *named]))
    if not (out / "people.pkl").exists():
        np.save(out / "sprites.npy", render([sprite_spec(person) for person in people]))
        (out / "people.pkl").write_bytes(pickle.dumps({person: index for index, person in enumerate(people)}))

    def someone() -> Person:
        return rng.choice(named if rng.random() < NAMED else strangers)

    pictures = {
        "single": [random_picture(rng, someone) for _ in range(single)],
        "wide": [random_picture(rng, someone, wide=True) for _ in range(wide)],
    }
    with ProcessPoolExecutor(2) as workers:
        for name, rows in pictures.items():
            parts = workers.map(functools.partial(_compose_part, out), [rows[i : i + 500] for i in range(0, len(rows), 500)])
            array = np.empty((len(rows), SIDE, SIDE * (2 if name == "wide" else 1), 3), np.uint8)
            for i, part in enumerate(parts):
                array[i * 500 : i * 500 + len(part)] = part
            np.save(out / f"{name}.npy", array)
    (out / "pictures.pkl").write_bytes(pickle.dumps(pictures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--single", type=int, default=80_000)
    parser.add_argument("--wide", type=int, default=24_000)
    parser.add_argument("--pool", type=int, default=9_000, help="sprites of people without a name")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    build(arguments.out, single=arguments.single, wide=arguments.wide, pool=arguments.pool, seed=arguments.seed)
