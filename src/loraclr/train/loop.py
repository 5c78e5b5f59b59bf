"""The one training loop of all recipes: noise, predict, compare; everything random comes from one generator whose state is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraclr.errors import PipelineError, TrainError
from loraclr.loading import half
from loraclr.train.data import Examples
from loraclr.train.recipe import Recipe
from loraclr.train.student import Student
from loraclr.train.work import WorkFolder

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The forward process of a base: `alphas` (steps,) cumulative, and what its UNet predicts."""

    alphas: Tensor
    prediction: str

    @staticmethod
    def of(scheduler: Any) -> Diffusion:
        prediction = str(scheduler.config.get("prediction_type", "epsilon"))
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None or prediction not in PREDICTIONS:
            raise PipelineError(
                f"{type(scheduler).__name__} with prediction type {prediction!r} is no diffusion that can be trained here; "
                f"use a base with one of {', '.join(PREDICTIONS)}"
            )
        return Diffusion(alphas.float().cpu(), prediction)

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a) clean + sqrt(1 - a) noise, and the target: noise (epsilon), sqrt(a) noise - sqrt(1 - a) clean (v), or clean."""
        a = self.alphas[times].view(-1, 1, 1, 1)
        signal, rest = a.sqrt(), (1 - a).sqrt()
        targets = {"epsilon": noise, "v_prediction": signal * noise - rest * clean, "sample": clean}
        return signal * clean + rest * noise, targets[self.prediction]


def masked_mean(error: Tensor, masks: Tensor) -> Tensor:
    """(B,): the mean of `error` (B, C, h, w) where `masks` (B, 1, h, w) are 1; 0 for a picture with an empty mask."""
    weights = masks.expand_as(error)
    return (error * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)


def run(
    student: Student,
    recipe: Recipe,
    own: Examples,
    prior: Examples | None,
    *,
    settings: Mapping[str, object],
    work: WorkFolder | None,
    checkpoint_every: int,
    sample: Callable[[int], None],
    sample_every: int,
    progress: Callable[[str, float], None],
) -> list[float]:
    """Train what hangs on the student; the loss of every step. Continues from the work folder's checkpoint if there is one.

    Raises TrainError when the loss is no finite number.
    """
    diffusion = Diffusion.of(student.pipeline.pipe.scheduler)
    optimizer = torch.optim.AdamW(student.groups, weight_decay=recipe.weight_decay)
    heights = [float(group["lr"]) for group in student.groups]
    trained = [parameter for group in student.groups for parameter in group["params"]]
    losses: list[float] = []
    saved = work.resume(settings) if work else None
    if saved is not None:
        losses = list(saved["losses"])
        _restore(student, optimizer, saved)
    elif sample_every:
        sample(0)
    for step in range(len(losses), recipe.steps):
        for group, height in zip(optimizer.param_groups, heights, strict=True):
            group["lr"] = height * recipe.rate(step)
        loss = _loss(student, recipe, diffusion, own, prior)
        if not math.isfinite(float(loss.detach())):
            raise TrainError(f"the loss is {float(loss.detach())} at step {step + 1}; lower the learning rates of recipe {recipe.name!r}")
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        recipe.after_step(student)
        losses.append(float(loss.detach()))
        done = step + 1
        if work and (done % checkpoint_every == 0 or done == recipe.steps):
            work.checkpoint(_state(student, optimizer, losses), settings)
            work.curve(losses)
        if sample_every and (done % sample_every == 0 or done == recipe.steps):
            sample(done)
        progress(f"training: loss {recent(losses):.4f}", done / recipe.steps)
    return losses


def recent(losses: list[float]) -> float:
    """The mean loss of the last tenth of the steps, 20 at least."""
    last = losses[-max(len(losses) // 10, 20) :]
    return sum(last) / len(last)


def _loss(student: Student, recipe: Recipe, diffusion: Diffusion, own: Examples, prior: Examples | None) -> Tensor:
    generator, device = student.generator, student.device
    clean, prompts, masks = own.draw(recipe.batch, generator)
    if prior is not None:
        more, words, everywhere = prior.draw(recipe.batch, generator)
        clean, prompts, masks = torch.cat([clean, more]), [*prompts, *words], torch.cat([masks, everywhere])
    times = torch.randint(len(diffusion.alphas), (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    if recipe.noise_offset:
        noise = noise + recipe.noise_offset * torch.randn(*clean.shape[:2], 1, 1, generator=generator)
    padded = float(torch.rand((), generator=generator)) < recipe.full_length
    noisy, target = diffusion.noisy(clean, noise, times)
    noisy, target, times, masks = noisy.to(device), target.to(device), times.to(device), masks.to(device)
    watching = recipe.watches and own.masks is not None
    student.maps.clear()
    student.watching = watching
    try:
        with half(device, student.bf16):
            states, added = student.conditions(prompts, pad=padded, size=own.size)
            predicted = student.pipeline.pipe.unet(noisy, times, states, added_cond_kwargs=added, return_dict=False)[0]
    finally:
        student.watching = False
    per_picture = masked_mean((predicted.float() - target) ** 2, masks)
    loss = per_picture[: recipe.batch].mean()
    if prior is not None:
        loss = loss + recipe.prior_weight * per_picture[recipe.batch :].mean()
    if watching:
        maps = [one[: recipe.batch] for one in student.maps]
        places = student.token_places(prompts[: recipe.batch])
        penalty = recipe.penalty(maps, places, masks[: recipe.batch], latent=own.latent)
        loss = loss if penalty is None else loss + penalty
    student.maps.clear()
    return loss


def _state(student: Student, optimizer: torch.optim.Optimizer, losses: list[float]) -> dict[str, Any]:
    return {
        "parameters": {name: parameter.detach() for name, parameter in student.parameters().items()},
        "optimizer": optimizer.state_dict(),
        "generator": student.generator.get_state(),
        "tokens_frozen": student.tokens_frozen,
        "losses": losses,
    }


def _restore(student: Student, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in student.parameters().items():
            parameter.copy_(saved["parameters"][name])
    optimizer.load_state_dict(saved["optimizer"])
    student.generator.set_state(saved["generator"])
    if saved["tokens_frozen"]:
        student.freeze_tokens()
