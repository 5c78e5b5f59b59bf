"""ZipLoRA: one factor per input column and concept, trained so that each concept's predictions survive and the columns do not collide."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loraclr.errors import NumericalError
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerSolution, ModelProblem


@dataclass(frozen=True)
class Ziplora(Checked):
    """D = sum_i w_i D_i diag(m_i) in every layer, with merger vectors m_i (in,) that start at 1, where D is the sum.

    Adam descends mean_i ||eps(merged; x, t, p_i) - eps(adapter i; x, t, p_i)||^2 + penalty * sum over layers and pairs of
    mean |m_i * m_j|: the noise predictions on each concept's own prompts, at latents of its own denoising, with one drawn step for all
    concepts at a time. Needs no pictures. The paper's content and style are two; here any number. No gradient reaches text encoders:
    there the m_i stay 1, and the predictions are those behind the so merged text encoder. An adapter without this layer adds nothing.
    Rank at most sum_i r_i. Stable Diffusion 1 and 2 only.
    """

    steps: Annotated[int, Option("optimiser steps", 1)] = 100
    learning_rate: Annotated[float, Option("Adam's step size", 0)] = 0.01
    penalty: Annotated[float, Option("lambda: against two concepts on one column; not relative to the loss", 0)] = 0.01

    name: ClassVar[str] = "ziplora"
    summary: ClassVar[str] = "a trained factor per input column and concept, so that columns do not collide"
    when: ClassVar[str] = "one person or object with one style; takes a short training on the base"
    reference: ClassVar[str] = "Shah et al. 2023, arXiv 2311.13600"
    needs: ClassVar[frozenset[str]] = frozenset({"base", "predictions", "short", "generator"})

    def solve_model(self, problem: ModelProblem) -> dict[str, LayerSolution]:
        mergers = {
            name: [torch.ones(layer.width, requires_grad=not name.startswith("text_encoder")) for _ in problem.concepts]
            for name, layer in problem.layers.items()
        }
        trained = [m for name, own in mergers.items() for index, m in enumerate(own) if m.requires_grad and _adapts(problem, name, index)]
        with torch.no_grad():
            first, touching = float(problem.loss(self._changes(problem, mergers), None)), float(self._collisions(problem, mergers))
        if trained:
            optimiser = torch.optim.Adam(trained, lr=self.learning_rate)
            generator = torch.Generator().manual_seed(problem.seed)
            for _ in range(self.steps):
                draw = int(torch.randint(1 << 30, (1,), generator=generator))
                with torch.enable_grad():
                    loss = problem.loss(self._changes(problem, mergers), draw) + self.penalty * self._collisions(problem, mergers)
                    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                for merger, gradient in zip(trained, gradients, strict=True):
                    merger.grad = gradient
                optimiser.step()
        with torch.no_grad():
            last, collisions = float(problem.loss(self._changes(problem, mergers), None)), float(self._collisions(problem, mergers))
        if not last < float("inf"):
            raise NumericalError(f"the mergers' loss became {last}; lower `learning_rate`, or run the base in float32")
        before, after = first + self.penalty * touching, last + self.penalty * collisions
        risen = f"training left the objective at {after:.3g}, above the sum's {before:.3g}; lower `learning_rate`"
        return {
            name: LayerSolution.of_factors(
                torch.cat([up for up, _ in layer.factors], 1),
                torch.cat([down * m.detach().double() for (_, down), m in zip(layer.factors, mergers[name], strict=True)]),
                status="trained",
                advice=risen if after > before else "",
                first_loss=first,
                last_loss=last,
                collisions=collisions,
            )
            for name, layer in problem.layers.items()
        }

    def _changes(self, problem: ModelProblem, mergers: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        changes = {}
        for name, layer in problem.layers.items():
            parts = [down.float() * m for (_, down), m in zip(layer.factors, mergers[name], strict=True)]
            changes[name] = torch.cat([up for up, _ in layer.factors], 1).float() @ torch.cat(parts)
        return changes

    def _collisions(self, problem: ModelProblem, mergers: dict[str, list[Tensor]]) -> Tensor:
        """The sum over layers and pairs of mean |m_i * m_j|, of concepts that both adapt the layer."""
        total = torch.zeros(())
        for name, own in mergers.items():
            there = [m for index, m in enumerate(own) if m.requires_grad and _adapts(problem, name, index)]
            for a, b in combinations(there, 2):
                total = total + (a * b).abs().mean()
        return total


def _adapts(problem: ModelProblem, name: str, index: int) -> bool:
    return problem.layers[name].layers[index] is not None
