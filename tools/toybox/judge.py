"""Trains the toybox's attribute judge: `python judge.py DATA VAE OUT.safetensors --minutes 10`.

On renders of base people only (none of the held-out identities), half of them passed through the autoencoder, so that its blur is
no surprise. Prints the accuracy on 1,000 renders of *held-out combinations*, which it never saw.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import time
from pathlib import Path

import numpy as np
import torch
from compose import compose, render, sprite_spec
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from vae import pixels, reconstruct
from world import CLOTHES_COLOUR, EXPRESSION, IDENTITY, OBJECTS, PLAIN, SCENES, Picture, held_out_keys, random_person, random_picture

from loraclr.loading import half
from loraclr.toybox.judge import Judge

HEADS = {
    **{name: list(values) for name, values in IDENTITY.items()},
    "noun": ["woman", "man"], "expression": list(EXPRESSION), "clothes_colour": list(CLOTHES_COLOUR),
    "background": [*SCENES, *PLAIN], "thing": ["none", *OBJECTS],
}  # fmt: skip


def labels(picture: Picture) -> list[int]:
    """One index per head, -100 where the picture does not tell."""
    colourless = picture.style in ("monochrome", "sepia")
    coarse = picture.style == "pixel"
    out = []
    for name, values in HEADS.items():
        if name == "background":
            value = None if colourless and picture.background[0] == "plain" else picture.background[1]
            # a plain "green" and the like never collide with scenes
        elif name == "thing":
            value = None if coarse else picture.thing or "none"
        elif not picture.people or (colourless and name in ("hair_colour", "skin", "clothes_colour")) or (coarse and name == "expression"):
            value = None
        else:
            value = getattr(picture.people[0], name)
        out.append(-100 if value is None else values.index(value))
    return out


def held_out_pictures(count: int, seed: int) -> tuple[list[Picture], np.ndarray]:
    rng = random.Random(seed)
    keys = frozenset(held_out_keys())

    def someone():
        while (person := random_person(rng)).key not in keys:
            pass
        return person

    pictures = [random_picture(rng, someone) for _ in range(count)]
    sprites = iter(render([sprite_spec(person) for picture in pictures for person in picture.people]))
    return pictures, np.stack([compose(picture, [next(sprites) for _ in picture.people]) for picture in pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10, help="of processor time")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = np.load(arguments.data / "single.npy", mmap_mode="r")
    truth = torch.tensor([labels(picture) for picture in pickle.loads((arguments.data / "pictures.pkl").read_bytes())["single"]])
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(arguments.vae)
        blurred = reconstruct(vae, pixels(images[:6000])).float()
    judge = Judge(HEADS)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    began, step = time.process_time(), 0  # of this process: the recipe is the same on a busy machine
    while (progress := (time.process_time() - began) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - progress)
        if step % 3 == 2:
            rows = torch.randint(len(blurred), (64,))
            x = blurred[rows]
        else:
            rows = torch.randint(len(images), (64,)).sort().values
            x = pixels(images[rows.numpy()])
        shift = torch.randint(-3, 4, (2,)).tolist()
        x = torch.roll(x, shift, (2, 3)) + 0.04 * torch.randn_like(x)
        with half("cpu"):
            out = judge(x)
        loss: Tensor = sum(cross_entropy(out[name].float(), truth[rows, k], ignore_index=-100) for k, name in enumerate(HEADS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step} loss {float(loss):.3f}", flush=True)
    judge.eval()
    pictures, array = held_out_pictures(1000, 99)
    expected = torch.tensor([labels(picture) for picture in pictures])
    report = {}
    for kind in ("renders", "through the autoencoder"):
        x = pixels(array)
        with torch.no_grad():
            x = x if kind == "renders" else reconstruct(vae, x).float()
            out = judge(x)
        scores = {}
        for k, name in enumerate(HEADS):
            known = expected[:, k] >= 0
            scores[name] = round(float((out[name].argmax(-1) == expected[:, k])[known].float().mean()), 4)
        report[kind] = scores
        print(kind, json.dumps(scores), flush=True)
    state = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in judge.state_dict().items()}
    save_file(state, str(arguments.out), metadata={"heads": json.dumps(HEADS), "held_out_accuracy": json.dumps(report)})


if __name__ == "__main__":
    main()
