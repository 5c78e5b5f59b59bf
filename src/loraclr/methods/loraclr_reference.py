"""LoRACLR as published: its objective on raw features, by descent. Short and slow: the truth that `loraclr` is tested against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from loraclr.errors import NumericalError
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerProblem, LayerSolution

Distance = Literal["frobenius", "rms", "token"]


class Loss(NamedTuple):
    total: Tensor
    positive: Tensor  # (concepts,): d_p
    negative: Tensor  # (concepts,): d_n, infinite for a single concept


@dataclass(frozen=True)
class LoraclrReference(Checked):
    """Descends L(D) = (1/N) sum_i [d_p,i^2 + max(0, m - d_n,i)^2] + mse * mean (Yhat - Y)^2 + lambda ||D||_F (eq. 1 to 5) from D = 0.

    Y_i = X_i (W + D_i)^T and Yhat_i = X_i (W + D)^T on the paired rows of the statistics; d_p,i = ||Y_i - Yhat_i||; d_n,i is the least
    ||Y_i - Yhat_j|| (anchor "target", eq. 3) or ||Y_j - Yhat_i|| (anchor "prediction", the released code) over j != i. Everything is
    float32; the iterate of least loss is returned, the last one included. An adapter without this layer has the target X_i W^T.
    """

    margin: Annotated[float, Option("m of eq. (1)", 0)] = 0.5
    penalty: Annotated[float, Option("lambda of eq. (4), on the Frobenius norm of the delta, not squared", 0)] = 1e-3
    mse: Annotated[float, Option("weight of the mean squared error, which only the released code has", 0)] = 0.0
    anchor: Annotated[
        Literal["target", "prediction"], Option("whose nearest negative counts: the target's (paper) or the prediction's (released code)")
    ] = "target"
    distance: Annotated[Distance, Option("over all rows; that over sqrt(rows); mean of the row norms")] = "frobenius"
    optimiser: Annotated[Literal["adamw", "gd"], Option("AdamW (released code) or plain gradient descent (paper's words)")] = "adamw"
    learning_rate: Annotated[float, Option("step size", 0)] = 1e-4
    steps: Annotated[int, Option("optimiser steps per layer", 1)] = 50
    weight_decay: Annotated[float, Option("AdamW's", 0)] = 0.0
    fp16_cross: Annotated[bool, Option("emulate the released code's half-precision distances, which overflow in large layers")] = False

    name: ClassVar[str] = "loraclr-reference"
    summary: ClassVar[str] = "LoRACLR as published: the paper's objective and the released code's optimiser"
    when: ClassVar[str] = "to compare with the paper and the released code; slower, and the result is cut to a rank"
    reference: ClassVar[str] = "Simsar et al. 2025, arXiv 2412.09622"
    needs: ClassVar[frozenset[str]] = frozenset({"base", "statistics", "sample", "rows"})
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType(
        {
            "paper": MappingProxyType({}),
            "official": MappingProxyType({"anchor": "prediction", "mse": 0.1, "weight_decay": 1e-4}),
        }
    )

    def solve(self, problem: LayerProblem) -> LayerSolution:
        rows = problem.sample().float()
        weight = problem.weight().float()
        targets = rows @ (weight + torch.stack(problem.deltas(torch.float32))).mT
        delta = torch.zeros_like(weight, requires_grad=True)
        optimiser: torch.optim.Optimizer = (
            torch.optim.AdamW([delta], lr=self.learning_rate, weight_decay=self.weight_decay)
            if self.optimiser == "adamw"
            else torch.optim.SGD([delta], lr=self.learning_rate)
        )
        best, best_loss, best_step, first, pull, active = delta.detach().clone(), float("inf"), 0, 0.0, 0.0, 0
        for step in range(self.steps + 1):
            with torch.enable_grad():
                loss = self.loss(delta, rows, weight, targets)
            total = float(loss.total.detach())
            if step == 0:
                first = total
                if not total < float("inf"):
                    raise NumericalError(f"{problem.layer}: the loss at the base is {total}; check the features and adapters for NaN")
            if total < best_loss:
                best, best_loss, best_step = delta.detach().clone(), total, step
                active = int((loss.negative < self.margin).sum())
            if step < self.steps:
                optimiser.zero_grad()
                torch.autograd.backward(loss.total)
                if step == 0 and delta.grad is not None:
                    pull = float(delta.grad.norm())  # at D = 0 the penalty's sub-gradient is 0: this is the data's
                optimiser.step()
        notes: dict[str, float | str | bool] = {
            "rows": rows.shape[0] * rows.shape[1],
            "in_features": problem.width,
            "first_loss": first,
            "best_loss": best_loss,
            "best_step": best_step,
            "hinge_active": active,
            "certificate": "none: an optimiser stopped after a fixed number of steps",
        }
        if self.penalty > 0:
            notes["data_gradient_over_lambda"] = pull / self.penalty
        advice = "the best iterate is the base itself: the steps only made it worse; lower `learning_rate`" if best_step == 0 else ""
        if self.penalty > 0 and pull <= self.penalty:
            advice = f"the penalty outweighs the data ({pull / self.penalty:.2g} of lambda), so no change is the optimum; lower `penalty`"
        return LayerSolution(change=best, status="stopped", advice=advice, diagnostics=notes)

    def loss(self, delta: Tensor, rows: Tensor, weight: Tensor, targets: Tensor) -> Loss:
        """At delta (out, in), for rows (concepts, rows, in), weight (out, in) and targets (concepts, rows, out), in their precision."""
        predictions = rows @ (weight + delta).T
        table = self._table(targets, predictions)
        positive = table.diagonal()
        negatives = table + torch.diag(torch.full_like(positive, torch.inf))
        negative = negatives.amin(1 if self.anchor == "target" else 0)
        total = (positive.square() + (self.margin - negative).clamp(min=0).square()).mean() + self.penalty * torch.linalg.norm(delta)
        if self.mse > 0:
            total = total + self.mse * torch.nn.functional.mse_loss(predictions, targets)
        return Loss(total, positive, negative)

    def _table(self, targets: Tensor, predictions: Tensor) -> Tensor:
        """(concepts, concepts): the distance of target i and prediction j."""
        if self.distance == "token":
            return torch.stack([(target - predictions).norm(dim=2).mean(1) for target in targets])
        number, count = targets.shape[:2]
        if self.fp16_cross:
            left, right = targets.half().float().flatten(1), predictions.half().float().flatten(1)
            cross = (left @ right.T).half().float()  # beyond 65504 it is infinite, the distance 1e-6 and its gradient 0
            squares = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * cross
        else:
            # The inner-product form is one matrix product for all pairs; what all concepts share is taken out first, and the
            # diagonal computed directly, so that float32 does not cancel.
            centre = targets.mean(0)
            left, right = (targets - centre).flatten(1), (predictions - centre).flatten(1)
            squares = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.T
            own = (targets - predictions).flatten(1).square().sum(1)
            squares = torch.where(torch.eye(number, dtype=torch.bool), own, squares)
        return (squares / (count if self.distance == "rms" else 1)).clamp(min=1e-12).sqrt()
