"""How far a merge's predictions are from each adapter's own, without sampling: what study.py calls `error`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraclr.adapter import Adapter, Layer
from loraclr.modules import side_by_side
from loraclr.pipeline import Pipeline

PROMPTS = (
    "a photo of a {} at night", "a picture of a {} wearing a blue hoodie in a field", "a smiling {} next to a chair",
    "a {} on a blue background",
)  # fmt: skip  # none of them is fitted to
SEED = 5000
STEPS = 8


def errors(pipeline: Pipeline, adapters: Mapping[str, Adapter], used: Mapping[str, Adapter]) -> dict[str, float]:
    """By concept: squared distance of the denoiser's predictions under `used` to those under its own adapter, as a part of the base's.

    All start from the own adapter's latents at every step, so that what is told apart is the model, not the way that a picture took:
    0 where the merge predicts what the adapter does, 1 where it is as far from it as the base is.
    """
    tokens = {token: rows for adapter in adapters.values() for token, rows in adapter.tokens.items()}
    found = {}
    for name, own in adapters.items():
        prompts = [template.replace("{}", own.call) for template in PROMPTS]
        merged, base = (_apart(pipeline, prompts, own.layers, other, tokens) for other in (used[name].layers, {}))
        found[name] = float(merged / base)
    return found


def _apart(
    pipeline: Pipeline, prompts: Sequence[str], own: Mapping[str, Layer], other: Mapping[str, Layer], tokens: Mapping[str, Tensor]
) -> Tensor:
    seen = []

    def see(module: Any, inputs: Any, output: Any) -> None:
        mine, theirs = output[0].float().chunk(2)
        seen.append((mine - theirs).square().sum())

    with torch.inference_mode(), pipeline.with_tokens(tokens), ExitStack() as stack:
        stack.enter_context(one_latent(pipeline.unet))
        stack.enter_context(side_by_side(pipeline.modules, [(own, 1.0), (other, 1.0)]))
        stack.callback(pipeline.unet.register_forward_hook(see).remove)
        pipeline.run([*prompts, *prompts], seeds=[SEED + k for k in range(len(prompts))] * 2, steps=STEPS)
    return torch.stack(seen).sum()


@contextmanager
def one_latent(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the second half of every batch starts from the first half's latents."""

    def copy(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat([inputs[0].chunk(2)[0]] * 2), *inputs[1:])

    handle = denoiser.register_forward_pre_hook(copy)
    try:
        yield
    finally:
        handle.remove()
