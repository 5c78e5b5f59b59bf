"""Trains the toybox's ToyFace: `python face.py DATA VAE OUT.safetensors`. Resumes by itself.

An additive angular margin over the people of DATA, on pictures of whom some went through the autoencoder. None of the 72 held-out
combinations is among them; the 48 of those that no shipped identity has give the report: true accepts at 1 % false accepts, whose
threshold goes into the file.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
from pathlib import Path

import numpy as np
import solo
import torch
from compose import compose, render, sprite_spec
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize
from vae import pixels, reconstruct
from world import PLAIN, SCENES, Person, Picture, held_out_keys, random_look, random_person

from loraclr.loading import half
from loraclr.toybox.face import ToyFace

MARGIN, SCALE, BATCH = 0.25, 24.0, 96
FEWEST = 4  # pictures of somebody who is learned from
PASSED = 3000  # pictures that are also seen through the autoencoder


class WithCentres(nn.Module):
    """The embedding, and while it is trained one direction a person."""

    def __init__(self, people: int) -> None:
        super().__init__()
        self.face, self.centres = ToyFace(), nn.Parameter(torch.randn(people, 64))


def people_of(pictures: list[Picture]) -> tuple[list[tuple[str, ...]], dict[tuple[str, ...], list[int]]]:
    """Who has FEWEST pictures or more alone and in full colour, and the rows of them."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for row, picture in enumerate(pictures):
        if len(picture.people) == 1 and picture.style is None:
            rows.setdefault(tuple(picture.people[0].identity.values()), []).append(row)
    kept = {who: found for who, found in rows.items() if len(found) >= FEWEST}
    return sorted(kept), kept


def photographs(people: list[Person], looks: int, takes: int, seed: int) -> np.ndarray:
    """(people, looks * takes, 64, 64, 3) uint8: each person on different days in different places."""
    rng = random.Random(seed)
    dressed = [random_look(rng, person) for person in people for _ in range(looks)]
    sprites = render([sprite_spec(person) for person in dressed])
    rows = []
    for person, sprite in zip(dressed, sprites, strict=True):
        for _ in range(takes):
            background = ("scene", rng.choice(SCENES)) if rng.random() < 0.6 else ("plain", rng.choice(list(PLAIN)))
            rows.append(compose(Picture((person,), None, background, layout=rng.getrandbits(32)), [sprite]))
    return np.stack(rows).reshape(len(people), looks * takes, 64, 64, 3)


def verification(embeddings: Tensor, false_accepts: float = 0.01) -> tuple[float, float, float]:
    """(people, pictures, size) -> threshold at that rate of false accepts, true accepts there, accuracy with equal priors."""
    people, pictures, size = embeddings.shape
    flat = embeddings.reshape(-1, size)
    products = flat @ flat.T
    owner = torch.arange(people).repeat_interleave(pictures)
    same = owner[:, None] == owner[None]
    pair = torch.ones_like(same).triu(1).bool()
    genuine, impostor = products[same & pair], products[~same & pair]
    threshold = float(torch.quantile(impostor[torch.randperm(len(impostor))[:200_000]], 1 - false_accepts))
    true = float((genuine >= threshold).float().mean())
    grid = torch.linspace(-1, 1, 401)
    accuracy = max(float(((genuine >= t).float().mean() + (impostor < t).float().mean()) / 2) for t in grid)
    return threshold, true, accuracy


def strangers() -> list[Person]:
    """One person for each held-out combination that no shipped identity has."""
    people, rng = [], random.Random(5)
    for key in held_out_keys()[24:]:
        while (person := random_person(rng)).key != key:
            pass
        people.append(person)
    return people


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = np.load(arguments.data / "single.npy", mmap_mode="r")
    passed = solo.through_autoencoder(arguments.data, arguments.vae, PASSED)
    people, rows = people_of(pickle.loads((arguments.data / "pictures.pkl").read_bytes())["single"])
    torch.manual_seed(1)
    model = WithCentres(len(people))
    print(f"{len(people)} people, {sum(map(len, rows.values()))} pictures", flush=True)

    def loss(rng: random.Random, progress: float) -> Tensor:
        who = [rng.randrange(len(people)) for _ in range(BATCH)]
        chosen = [rng.choice(rows[people[one]]) for one in who]
        seen = [passed[row] if row < PASSED and rng.random() < 0.9 else images[row] for row in chosen]
        with half("cpu"):
            found = model.face(solo.jitter(pixels(np.stack(seen)))).float()
        cosines = linear(found, normalize(model.centres, dim=-1)).clamp(-0.999, 0.999)
        margin = MARGIN * min(1.0, 3 * progress)  # from the start it would keep the embedding from forming
        owner = torch.tensor(who)[:, None]
        own = torch.cos(torch.acos(cosines.gather(1, owner)) + margin)
        return cross_entropy(SCALE * cosines.scatter(1, owner, own), owner[:, 0])

    solo.fit(model, loss, file=arguments.out.with_suffix(".state"), steps=arguments.steps, lr=2e-3)
    face = model.face.eval()
    report: dict[str, dict[str, float]] = {}
    unseen = strangers()
    array = photographs(unseen, 8, 1, 6)
    vae = AutoencoderKL.from_pretrained(arguments.vae)
    threshold = 0.0
    for kind in ("renders", "through the autoencoder"):
        x = pixels(array.reshape(-1, 64, 64, 3))
        with torch.no_grad():
            x = x if kind == "renders" else reconstruct(vae, x).float()
            found = torch.cat([face(part) for part in x.split(128)]).view(len(unseen), 8, -1)
        threshold, true, accuracy = verification(found)
        report[kind] = {"threshold": round(threshold, 4), "true accepts at 1 % false": round(true, 4), "accuracy": round(accuracy, 4)}
        print(kind, json.dumps(report[kind]), flush=True)
    state = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in face.state_dict().items()}
    save_file(state, str(arguments.out), metadata={"threshold": str(threshold), "held_out": json.dumps(report)})


if __name__ == "__main__":
    main()
