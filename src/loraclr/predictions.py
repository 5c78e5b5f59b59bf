"""What the UNet predicts under each adapter on its own prompts, and how far a merged model is from that.

For methods that judge the whole model. Nothing is needed but the prompts: latents come from each adapter's own denoising, from the same
seeds for all concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraclr.adapter import Adapter, DenseLayer, Layer
from loraclr.collect import Collection, Concept
from loraclr.conditioning import conditioned
from loraclr.methods.problem import LayerProblem, ModelProblem
from loraclr.pipeline import Pipeline

MOMENTS = 8  # denoising steps kept, spread over all


@dataclass(frozen=True, eq=False)
class Moment:
    """One denoising step of one concept: what went in, but for the prompts' states, and what its own adapter predicted."""

    latents: Tensor  # (prompts, channels, height, width)
    time: Tensor
    prediction: Tensor


class Predictions:
    """Recorded once; then `loss` of any changes of the base."""

    def __init__(self, pipeline: Pipeline, concepts: Sequence[Concept], settings: Collection) -> None:
        """Runs every concept's prompts once under its own adapter, all its layers at once. Conditional only."""
        self._pipeline, self._concepts = pipeline, tuple(concepts)
        templates = settings.fit[: settings.spatial]
        self._prompts = [concept.said(templates) for concept in concepts]
        self._tokens = {token: rows for concept in concepts for token, rows in concept.adapter.tokens.items()}
        self._texts: tuple[dict[str, Tensor], list[Tensor]] | None = None
        seeds = [settings.seed + index for index in range(len(templates))]
        self.moments: list[list[Moment]] = []
        for concept, prompts in zip(concepts, self._prompts, strict=True):
            seen: list[Moment] = []

            def keep(latents: Tensor, time: Tensor, prediction: Tensor, seen: list[Moment] = seen) -> None:
                seen.append(Moment(latents, time, prediction))

            with pipeline.with_tokens(self._tokens), pipeline.applied(concept.adapter.layers, scale=concept.weight):
                states = pipeline.encode(prompts)
                with _predicted(pipeline.unet, keep):
                    pipeline.denoise(states, seeds=seeds, steps=settings.steps)
            chosen = torch.linspace(0, len(seen) - 1, min(MOMENTS, len(seen))).round().long().tolist()
            self.moments.append([seen[index] for index in chosen])

    def loss(self, changes: Mapping[str, Tensor], draw: int | None) -> Tensor:
        """The mean over concepts of the mean squared difference of predictions, for deltas (out, in) by layer.

        `draw` takes one moment, the same for all concepts; None takes all. Differentiable in the UNet's changes. Text encoders get theirs
        without gradient, and prompts are encoded behind them.
        """
        states = self._encoded({name: change for name, change in changes.items() if name.startswith("text_encoder")})
        unet = {name: change for name, change in changes.items() if not name.startswith("text_encoder")}
        total, number = torch.zeros(()), 0
        for text, moments in zip(states, self.moments, strict=True):
            for moment in moments if draw is None else [moments[draw % len(moments)]]:
                found = predict(self._pipeline, moment.latents, moment.time, text, unet)
                total = total + (found - moment.prediction).square().mean().cpu()
                number += 1
        return total / number

    def _encoded(self, changes: dict[str, Tensor]) -> list[Tensor]:
        """Each concept's prompts behind these text encoder changes; the last ones are kept, as most calls repeat them."""
        if self._texts is not None and all(torch.equal(self._texts[0][name], change) for name, change in changes.items()):
            return self._texts[1]
        layers: dict[str, Layer] = {
            name: DenseLayer(name, change.detach().view(self._pipeline.base_weight(name).shape)) for name, change in changes.items()
        }
        with ExitStack() as stack:
            stack.enter_context(self._pipeline.with_tokens(self._tokens))
            stack.enter_context(self._pipeline.applied(layers))
            states = [self._pipeline.encode(prompts) for prompts in self._prompts]
        self._texts = {name: change.detach().clone() for name, change in changes.items()}, states
        return states


def predict(pipeline: Pipeline, latents: Tensor, time: Tensor, states: Tensor, changes: Mapping[str, Tensor]) -> Tensor:
    """The UNet's prediction with W + change in these layers, float32. The model stays as it is; gradients reach the changes (out, in).

    `states` is as `Pipeline.encode` gives it, (prompts, tokens, dim) or (prompts, layers, tokens, dim).
    """
    weights = {}
    for name, change in changes.items():
        weight = pipeline.base_weight(name)
        weights[f"{name.removeprefix('unet.')}.weight"] = (weight.float() + change.to(weight.device).view(weight.shape)).to(weight.dtype)
    given = latents.to(pipeline.device, pipeline.dtype), time.to(pipeline.device)
    keywords = {"encoder_hidden_states": states.to(pipeline.device, pipeline.dtype), "return_dict": False}
    with conditioned(pipeline.cross_attentions if states.ndim == 4 else (), latent=(latents.shape[2], latents.shape[3])):
        prediction: Tensor = torch.func.functional_call(pipeline.unet, weights, given, keywords)[0]
    return prediction.float()


@contextmanager
def _predicted(unet: nn.Module, callback: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `callback(latents, time, prediction)` gets what the UNet was given and what it predicted at every pass, in float32."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        # Outside inference mode: its tensors could not enter a graph later.
        with torch.inference_mode(False), torch.no_grad():
            callback(*(part.detach().clone() for part in (inputs[0].float(), torch.as_tensor(inputs[1]), output[0].float())))

    handle = unet.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def model_problem(
    pipeline: Pipeline,
    concepts: Sequence[Concept],
    layers: Mapping[str, LayerProblem],
    *,
    settings: Collection,
    score: Callable[[Adapter], float] | None = None,
) -> ModelProblem:
    """The whole merge as one problem. Predictions are recorded when a loss is first asked for: a score may do without."""
    recorded: list[Predictions] = []

    def loss(changes: Mapping[str, Tensor], draw: int | None) -> Tensor:
        if not recorded:
            recorded.append(Predictions(pipeline, concepts, settings))
        return recorded[0].loss(changes, draw)

    def judged(changes: Mapping[str, Tensor]) -> float:
        assert score is not None
        tokens = {token: rows for concept in concepts for token, rows in concept.adapter.tokens.items()}
        dense = {name: DenseLayer(name, change.view(layers[name].shape)) for name, change in changes.items()}
        return float(score(Adapter(dense, name="merged", tokens=tokens)))

    names = tuple(concept.name for concept in concepts)
    return ModelProblem(names, layers, loss, None if score is None else judged, settings.seed)
