"""Trains the toybox's ToyClip: `python clip.py DATA VAE OUT.safetensors --minutes 8`.

Pictures of DATA and captions drawn anew, a batch's other captions as negatives, some of the pictures passed through the autoencoder.
Prints recall@1 among 64 captions on pictures of held-out people.
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
from diffusers import AutoencoderKL
from judge import held_out_pictures
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from vae import pixels, reconstruct
from world import caption, named_people, vocabulary

from loraclr.toybox.clip import ToyClip

AMONG = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8, help="of processor time")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = random.Random(0)
    names = {*named_people()}
    images = np.load(arguments.data / "single.npy", mmap_mode="r")
    pictures = pickle.loads((arguments.data / "pictures.pkl").read_bytes())["single"]
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(arguments.vae).bfloat16()
        blurred = reconstruct(vae, pixels(images[:6000]).bfloat16()).float()
    clip = ToyClip([word for word in vocabulary() if word not in names])
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, weight_decay=0.02)
    began, step = time.process_time(), 0
    while (progress := (time.process_time() - began) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 200) * (1 - progress)
        passed = step % 3 == 2
        rows = torch.randint(len(blurred) if passed else len(images), (160,)).sort().values
        x = blurred[rows] if passed else pixels(images[rows.numpy()])
        x = torch.roll(x, torch.randint(-3, 4, (2,)).tolist(), (2, 3)) + 0.04 * torch.randn_like(x)
        words = clip.ids([told(pictures[row], rng) for row in rows.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            seen, read = clip.see(x), clip.read(words)
        logits = seen.float() @ read.float().T * clip.temperature.clamp(max=4.6).exp()
        own = torch.arange(len(rows))
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step} loss {float(loss):.3f}", flush=True)
    clip.eval()
    held, array = held_out_pictures(1024, 101)
    report = {}
    for kind in ("renders", "through the autoencoder"):
        x = pixels(array)
        with torch.no_grad():
            x = x if kind == "renders" else reconstruct(vae, x.bfloat16()).float()
            seen = torch.cat([clip.see(part) for part in x.split(128)])
            read = clip.read(clip.ids([told(picture, random.Random(k), 0.9) for k, picture in enumerate(held)]))
        hits = [(a @ b.T).argmax(1) == torch.arange(AMONG) for a, b in zip(seen.split(AMONG), read.split(AMONG), strict=True)]
        report[kind] = {"recall@1 of 64": round(float(torch.cat(hits).float().mean()), 4)}
        print(kind, json.dumps(report[kind]), flush=True)
    state = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in clip.state_dict().items()}
    save_file(state, str(arguments.out), metadata={"vocabulary": json.dumps(clip.vocabulary), "held_out": json.dumps(report)})


def told(picture, rng: random.Random, keep: float = 0.75) -> str:
    """A caption without names: this judge reads what is seen, not who it is."""
    return caption(picture.unnamed(), rng, keep_probability=keep)


if __name__ == "__main__":
    main()
