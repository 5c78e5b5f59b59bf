"""Trains the toybox's ToyFace: `python face.py VAE OUT.safetensors --minutes 8`.

An additive angular margin over IDENTITIES random people, several looks of each, half of the pictures passed through the autoencoder.
None of the 72 held-out combinations is among them; 48 of those that are not shipped give the report: true accepts at 1 % false
accepts, whose threshold goes into the file.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from compose import compose, render, sprite_spec
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize
from vae import pixels, reconstruct
from world import PLAIN, SCENES, Person, Picture, base_person, held_out_keys, random_look, random_person

from loraclr.toybox.face import ToyFace

IDENTITIES, LOOKS, TAKES = 2000, 5, 2  # people, sprites of each, pictures of each sprite
MARGIN, SCALE = 0.25, 24.0


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8, help="of processor time")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = random.Random(3)
    people: dict[tuple[str, ...], Person] = {}
    while len(people) < IDENTITIES:
        person = base_person(rng)
        people.setdefault(tuple(person.identity.values()), person)
    images = torch.from_numpy(photographs(list(people.values()), LOOKS, TAKES, 4))
    vae = AutoencoderKL.from_pretrained(arguments.vae).bfloat16()
    with torch.no_grad():  # the second take of every look
        for row in range(IDENTITIES):
            blurred = reconstruct(vae, pixels(images[row, 1::2].numpy()).bfloat16()).float()
            images[row, 1::2] = blurred.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)
    face, centres = ToyFace(), nn.Parameter(torch.randn(IDENTITIES, 64))
    optimizer = torch.optim.AdamW([*face.parameters(), centres], lr=2e-3, weight_decay=0.02)
    began, step = time.process_time(), 0
    while (progress := (time.process_time() - began) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - progress)
        who, take = torch.randint(IDENTITIES, (96,)), torch.randint(LOOKS * TAKES, (96,))
        x = pixels(images[who, take].numpy())
        x = torch.roll(x, torch.randint(-3, 4, (2,)).tolist(), (2, 3)) + 0.04 * torch.randn_like(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = face(x).float()
        cosines = linear(found, normalize(centres, dim=-1)).clamp(-0.999, 0.999)
        margin = MARGIN * min(1.0, 3 * progress)  # from the start it would keep the embedding from forming
        own = torch.cos(torch.acos(cosines.gather(1, who[:, None])) + margin)
        loss = cross_entropy(SCALE * cosines.scatter(1, who[:, None], own), who)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step} loss {float(loss):.3f}", flush=True)
    face.eval()
    strangers, rng = [], random.Random(5)
    for key in held_out_keys()[24:]:
        while (person := random_person(rng)).key != key:
            pass
        strangers.append(person)
    report: dict[str, dict[str, float]] = {}
    array = photographs(strangers, 8, 1, 6)
    threshold = 0.0
    for kind in ("renders", "through the autoencoder"):
        x = pixels(array.reshape(-1, 64, 64, 3))
        with torch.no_grad():
            x = x if kind == "renders" else reconstruct(vae, x.bfloat16()).float()
            found = torch.cat([face(part) for part in x.split(128)]).view(len(strangers), 8, -1)
        threshold, true, accuracy = verification(found)
        report[kind] = {"threshold": round(threshold, 4), "true accepts at 1 % false": round(true, 4), "accuracy": round(accuracy, 4)}
        print(kind, json.dumps(report[kind]), flush=True)
    state = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in face.state_dict().items()}
    save_file(state, str(arguments.out), metadata={"threshold": str(threshold), "held_out": json.dumps(report)})


if __name__ == "__main__":
    main()
