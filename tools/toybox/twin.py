"""Data-parallel training for a small CPU: one single-threaded process a core, gradients averaged through shared memory.

Faster than one process with two threads on small models, and it survives another job on a core, where OpenMP's barriers
collapse. The length of a run is told in seconds of training, kept in the checkpoint, so that a run resumed on a busier machine
still goes through its whole schedule.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn


class Trainer:
    """One process's share of a run. `start(rank, trainer)` builds the model and hands it to `fit`."""

    def __init__(self, rank: int, world: int, shared: dict[str, Any], folder: Path, seconds: float) -> None:
        self.rank, self.world, self.shared, self.folder, self.seconds = rank, world, shared, folder, seconds
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity") and world <= (os.cpu_count() or 1):
            os.sched_setaffinity(0, {rank})  # two that wait for each other must not be put on one core

    def fit(
        self,
        model: nn.Module,
        loss: Callable[[int], tuple[Tensor, dict[str, float]]],
        *,
        lr: float,
        warmup: int = 200,
        flat: float = 0.6,
        floor: float = 0.01,
        weight_decay: float = 0.01,
        ema_decay: float = 0.999,
        no_decay: Callable[[str], bool] = lambda name: False,
        snapshot: Callable[[nn.Module, int], None] | None = None,
        snapshot_every: float = 300.0,
        log_every: int = 50,
    ) -> dict[str, Tensor]:
        """Trains until the seconds are spent and returns the averaged (EMA) parameters by name.

        `loss(step)` gives this process's loss and numbers to log. The learning rate warms up, stays flat for the first `flat`
        of the run and then falls by a cosine to `floor` of its height.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]
        groups = [
            {"params": [p for n, p in named if p.ndim > 1 and not no_decay(n)], "weight_decay": weight_decay},
            {"params": [p for n, p in named if p.ndim <= 1 or no_decay(n)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
        ema = [p.detach().clone() for p in parameters]
        step, spent = 0, 0.0
        file = self.folder / f"state{self.rank}.pt"
        newest = self.folder / "state0.pt"
        if newest.exists():
            state = torch.load(newest, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for mine, theirs in zip(ema, state["ema"], strict=True):
                mine.copy_(theirs)
            step, spent = state["step"], state["spent"]
            torch.set_rng_state(torch.load(file, weights_only=True)["rng"] if file.exists() else state["rng"])
            if self.rank == 0:
                print(f"resumed at step {step}, {spent:.0f} s of {self.seconds:.0f}", flush=True)
        buffer, clock, barrier = self.shared["buffer"], self.shared["clock"], self.shared["barrier"]
        size = sum(p.numel() for p in parameters)
        began, saved, means = time.monotonic(), time.monotonic(), {}
        base_spent, parent = spent, os.getppid()
        while True:
            if self.rank == 0:
                clock[0] = base_spent + time.monotonic() - began
            barrier.wait()
            if os.getppid() != parent:
                raise SystemExit("the parent process is gone")
            spent = float(clock[0])
            if spent >= self.seconds:
                break
            progress = spent / self.seconds
            fall = 1.0 if progress < flat else floor + (1 - floor) * (1 + math.cos(math.pi * (progress - flat) / (1 - flat))) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / warmup) * fall
            value, numbers = loss(step)
            value.backward()
            gradients = [p.grad.reshape(-1) if p.grad is not None else p.new_zeros(p.numel()) for p in parameters]
            torch.cat(gradients, out=buffer[self.rank, :size])
            barrier.wait()
            mean = buffer[: self.world, :size].mean(0)
            barrier.wait()
            norm = mean.norm()
            mean.mul_((1.0 / norm).clamp(max=1.0))
            offset = 0
            for p in parameters:
                p.grad = mean[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(ema, parameters, 1 - min(ema_decay, (1 + step) / (10 + step)))
            step += 1
            for key, number in {**numbers, "norm": float(norm)}.items():
                means[key] = means.get(key, number) * 0.98 + number * 0.02
            if self.rank == 0 and step % log_every == 0:
                shown = " ".join(f"{key} {number:.4f}" for key, number in means.items())
                line = f"step {step} {spent:.0f}s lr {optimizer.param_groups[0]['lr']:.2e} {shown}"
                print(line, flush=True)
                with (self.folder / "log.txt").open("a") as log:
                    log.write(line + "\n")
            if time.monotonic() - saved > snapshot_every:
                self._save(file, model, optimizer, ema, step, spent)
                if snapshot and self.rank == 0:
                    with Averaged(parameters, ema):
                        snapshot(model, step)
                saved = time.monotonic()
        self._save(file, model, optimizer, ema, step, spent)
        if snapshot and self.rank == 0:
            with Averaged(parameters, ema):
                snapshot(model, step)
        return {name: value for (name, _), value in zip(named, ema, strict=True)}

    def resumed_step(self) -> int:
        """Where a resumed run starts; 0 for a new one."""
        file = self.folder / "step.txt"
        return int(file.read_text()) if file.exists() else 0

    def _save(self, file: Path, model: nn.Module, optimizer: Any, ema: list[Tensor], step: int, spent: float) -> None:
        state: dict[str, Any] = {"rng": torch.get_rng_state()}
        if self.rank == 0:
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step, "spent": spent}
        part = file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, file)
        if self.rank == 0:
            (self.folder / "step.txt").write_text(str(step))


class Averaged:
    """The model with its averaged parameters, for a while."""

    def __init__(self, parameters: list[nn.Parameter], ema: list[Tensor]) -> None:
        self.parameters, self.ema = parameters, ema

    def __enter__(self) -> None:
        self.kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, e in zip(self.parameters, self.ema, strict=True):
                p.copy_(e)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for p, k in zip(self.parameters, self.kept, strict=True):
                p.copy_(k)


def _child(
    rank: int, start: Callable[[Trainer], None], world: int, shared: dict[str, Any], folder: Path, seconds: float, seed: int
) -> None:
    torch.manual_seed(seed * 1000 + rank)
    try:
        start(Trainer(rank, world, shared, folder, seconds))
    except BaseException:
        shared["barrier"].abort()
        raise


def run(start: Callable[[Trainer], None], *, folder: Path, seconds: float, parameters: int, world: int = 2, seed: int = 0) -> None:
    """Starts `world` processes that each call `start(trainer)`; `parameters` is an upper bound of the model's size."""
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    shared = {
        "buffer": torch.zeros(world, parameters).share_memory_(),
        "clock": torch.zeros(1, dtype=torch.float64).share_memory_(),
        "barrier": context.Barrier(world),
    }
    mp.spawn(_child, args=(start, world, shared, folder, seconds, seed), nprocs=world, join=True)


def batches(count: int, size: int, rank: int, world: int, seed: int) -> Iterator[Tensor]:
    """Index batches of one process's share, reshuffled each epoch, for ever."""
    generator = torch.Generator().manual_seed(seed * 7919 + rank)
    mine = torch.arange(rank, count, world)
    while True:
        order = mine[torch.randperm(len(mine), generator=generator)]
        yield from order[: len(order) // size * size].view(-1, size)
