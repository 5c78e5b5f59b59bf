"""Mix-of-Show's gradient fusion: least squares on raw features by L-BFGS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loraclr.adapter import stage_of
from loraclr.errors import NumericalError
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution


@dataclass(frozen=True)
class GradientFusion(Checked):
    """Descends mean ((X D^T - Y)^2) from D = 0, X the raw rows of all concepts and Y their X_i (w_i D_i)^T, with Mix-of-Show's settings.

    L-BFGS with step 1, history 25, strong-Wolfe line search and tolerances of 1e-16, in float32; the iterate of least loss is returned.
    Every iterate has its columns in the span of the adapters', so it moves V in D = Q V, Q an orthonormal basis of that span: the same
    iterates as on the whole weight but for the trial length of the first step, which torch takes from the gradient's L1 norm. The
    result is a LoRA of rank sum_i r_i at most, its limit that of `regmean` with off_diagonal 1.
    An adapter without this layer has the target "no change" on its own features.
    """

    steps: Annotated[int, Option("most L-BFGS steps in text encoders and cross-attention keys and values", 1)] = 500
    spatial_steps: Annotated[int, Option("most L-BFGS steps in all other layers", 1)] = 50

    name: ClassVar[str] = "gradient-fusion"
    summary: ClassVar[str] = "Mix-of-Show's least squares on raw features, by L-BFGS"
    when: ClassVar[str] = "to compare with Mix-of-Show as published; `regmean` and `loraclr` reach the optimum in a fraction of the time"
    reference: ClassVar[str] = "Gu et al. 2023, arXiv 2305.18292"
    needs: ClassVar[frozenset[str]] = frozenset({"statistics", "rows"})

    def solve(self, problem: LayerProblem) -> LayerSolution:
        rows = problem.rows()
        ups, downs = zip(*problem.factors, strict=True)
        basis, inside = torch.linalg.qr(torch.cat(ups, 1))
        parts = torch.split_with_sizes(inside, [up.shape[1] for up in ups], 1)
        targets = torch.cat([(x @ down.T) @ part.T for x, down, part in zip(rows, downs, parts, strict=True)]).float()
        features = torch.cat(rows).float()
        steps = self.spatial_steps if stage_of(problem.layer) == "spatial" else self.steps
        best, first, least, used = self._descend(features, targets, problem.out, steps)
        return LayerSolution.of_factors(
            basis,
            best.double(),
            status="stopped",
            rows=len(features),
            in_features=problem.width,
            first_loss=first,
            best_loss=least,
            evaluations=used,
        )

    def _descend(self, features: Tensor, targets: Tensor, out: int, steps: int) -> tuple[Tensor, float, float, int]:
        """The V (k, in) of least loss that was seen, the first loss and the least, and how often the loss was evaluated.

        The mean is over rows x out: what lies outside the span is zero in targets and predictions alike.
        """
        v = torch.zeros(targets.shape[1], features.shape[1], requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [v],
            lr=1,
            max_iter=steps,
            history_size=25,
            tolerance_grad=1e-16,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )
        best, losses = v.detach().clone(), list[float]()
        unit = 1 / (len(features) * out)

        def closure() -> float:
            nonlocal best
            with torch.no_grad():
                wrong = features @ v.T - targets
                loss = float(wrong.square().sum()) * unit
                if not losses or loss < min(losses):
                    best = v.detach().clone()
                losses.append(loss)
                v.grad = wrong.T @ features * (2 * unit)
            return loss

        optimiser.step(closure)  # type: ignore[no-untyped-call]
        if not losses[0] < float("inf"):
            raise NumericalError(f"the loss at the base is {losses[0]}; check the features and adapters for NaN")
        return best, losses[0], min(losses), len(losses)
