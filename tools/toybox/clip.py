"""Trains the toybox's ToyClip: `python clip.py DATA VAE OUT.safetensors`. Resumes by itself.

Pictures of DATA and captions drawn anew, a batch's other captions as negatives, some of the pictures passed through the autoencoder.
Prints recall@1 both ways, among 64 captions and among 64 pictures, on pictures of held-out people.
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
from diffusers import AutoencoderKL
from judge import held_out_pictures
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from vae import pixels, reconstruct
from world import caption, named_people, vocabulary

from loraclr.loading import half
from loraclr.toybox.clip import ToyClip

AMONG, BATCH = 64, 128
PASSED = 3000  # pictures that are also seen through the autoencoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = {*named_people()}
    images = np.load(arguments.data / "single.npy", mmap_mode="r")
    pictures = pickle.loads((arguments.data / "pictures.pkl").read_bytes())["single"]
    passed = solo.through_autoencoder(arguments.data, arguments.vae, PASSED)
    torch.manual_seed(1)
    clip = ToyClip([word for word in vocabulary() if word not in names])

    def loss(rng: random.Random, progress: float) -> Tensor:
        blurred = rng.random() < 1 / 3
        rows = sorted(rng.randrange(PASSED if blurred else len(images)) for _ in range(BATCH))
        words = clip.ids([told(pictures[row], rng) for row in rows])
        with half("cpu"):
            seen, read = clip.see(solo.jitter(pixels((passed if blurred else images)[rows]))), clip.read(words)
        logits = seen.float() @ read.float().T * clip.temperature.clamp(max=4.6).exp()
        own = torch.arange(len(rows))
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2

    solo.fit(clip, loss, file=arguments.out.with_suffix(".state"), steps=arguments.steps, lr=1e-3)
    clip.eval()
    vae = AutoencoderKL.from_pretrained(arguments.vae)
    held, array = held_out_pictures(1024, 101)
    report = {}
    for kind in ("renders", "through the autoencoder"):
        x = pixels(array)
        with torch.no_grad():
            x = x if kind == "renders" else reconstruct(vae, x).float()
            seen = torch.cat([clip.see(part) for part in x.split(128)])
            read = clip.read(clip.ids([told(picture, random.Random(k), 0.9) for k, picture in enumerate(held)]))
        products = [a @ b.T for a, b in zip(seen.split(AMONG), read.split(AMONG), strict=True)]
        ways = {"caption of a picture": products, "picture of a caption": [product.T for product in products]}
        report[kind] = {way: round(recall(found), 4) for way, found in ways.items()}
        print(kind, json.dumps(report[kind]), flush=True)
    state = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in clip.state_dict().items()}
    save_file(state, str(arguments.out), metadata={"vocabulary": json.dumps(clip.vocabulary), "held_out": json.dumps(report)})


def recall(products: list[Tensor]) -> float:
    """recall@1: how often the own one is the nearest of AMONG."""
    return float(torch.cat([product.argmax(1) == torch.arange(len(product)) for product in products]).float().mean())


def told(picture, rng: random.Random, keep: float = 0.75) -> str:
    """A caption without names: this judge reads what is seen, not who it is."""
    return caption(picture.unnamed(), rng, keep_probability=keep)


if __name__ == "__main__":
    main()
