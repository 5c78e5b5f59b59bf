"""Trains a small network in one thread for so many steps: what the judges share. Resumes by itself, to the same result."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from vae import pixels, reconstruct

SAVE_EVERY = 30.0  # seconds


def fit(model: nn.Module, loss: Callable[[random.Random, float], Tensor], *, file: Path, steps: int, lr: float, warmup: int = 150) -> None:
    """AdamW with a linear fall. `loss(rng, progress)` draws from `rng` and torch's generator alone; `file` keeps the state until done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    rng, first, spent, mean = random.Random(0), 0, 0.0, 0.0
    torch.manual_seed(0)
    if file.exists():
        state: dict[str, Any] = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch"])
        version, words, rest = state["python"]
        rng.setstate((version, tuple(words), rest))
        first, spent, mean = state["step"], state["spent"], state["mean"]
        print(f"resumed at step {first} of {steps}", flush=True)
    saved, began = time.monotonic(), time.process_time() - spent
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (1 - step / steps)
        value = loss(rng, step / steps)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        mean += (float(value.detach()) - mean) * max(0.02, 1 / (step + 1))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {mean:.3f}, {time.process_time() - began:.0f} s of one core", flush=True)
        if time.monotonic() - saved > SAVE_EVERY or step + 1 == steps:
            version, words, rest = rng.getstate()
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "torch": torch.get_rng_state(),
                "python": (version, list(words), rest), "step": step + 1, "spent": time.process_time() - began, "mean": mean,
            }  # fmt: skip
            torch.save(state, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
            saved = time.monotonic()


def jitter(x: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) moved by up to three pixels, with a little noise."""
    return torch.roll(x, torch.randint(-3, 4, (2,)).tolist(), (2, 3)) + 0.04 * torch.randn_like(x)


def through_autoencoder(data: Path, vae_folder: Path, count: int) -> np.ndarray:
    """(count, 64, 64, 3) uint8: the first pictures of DATA as the autoencoder gives them back. Made once, kept beside DATA."""
    file = data / f"reconstructed{count}.npy"
    if not file.exists():
        vae = AutoencoderKL.from_pretrained(vae_folder)
        with torch.no_grad():
            back = reconstruct(vae, pixels(np.load(data / "single.npy", mmap_mode="r")[:count])).float()
        array = back.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        np.save(file.with_suffix(".part.npy"), array)
        os.replace(file.with_suffix(".part.npy"), file)
    return np.load(file)
