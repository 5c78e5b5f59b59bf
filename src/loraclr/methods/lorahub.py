"""LoRAHub: one coefficient per adapter for the whole model, found by search without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from loraclr.errors import UsageError
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import LayerSolution, ModelProblem


@dataclass(frozen=True)
class Lorahub(Checked):
    """D = sum_i c_i w_i D_i in every layer; c minimises cost(c) + penalty * mean |c| within [-bound, bound]^N, starting from c = 0.

    The cost is the noise-prediction error against each adapter on its own prompts, relative to the base's (`ziplora` has the same);
    or minus the score that `merge(score=...)` was given from Python, a function of the merged adapter: examples/score.py lets a judge of
    pictures search. No option of the command line takes one. The search is COBYQA (Ragonneau 2022, in
    scipy), which models the cost by quadratics; the best coefficients that were tried are returned. The published method scales both
    factors and so merges (sum c_i B_i)(sum c_j A_j), with cross terms and for equal ranks only; here whole deltas are weighed. An
    adapter without this layer adds nothing. Which local optimum is found may depend on the order of the inputs. Without a score of
    yours it runs on Stable Diffusion 1 and 2 only; with one, wherever that does.
    """

    budget: Annotated[int, Option("most evaluations of the cost, at least 2 N + 2; the first 2 N + 1 only explore", 4)] = 40
    bound: Annotated[float, Option("largest coefficient, either way", 0)] = 1.5
    penalty: Annotated[float, Option("on the mean absolute coefficient", 0)] = 0.05

    name: ClassVar[str] = "lorahub"
    summary: ClassVar[str] = "one coefficient per adapter, searched without gradients for a score of your choice"
    when: ClassVar[str] = "a score of pictures that no gradient reaches; few adapters, as every evaluation runs the model"
    reference: ClassVar[str] = "Huang et al. 2023, arXiv 2307.13269"
    needs: ClassVar[frozenset[str]] = frozenset({"base", "predictions", "short", "score"})

    def check(self, concepts: int) -> None:
        if self.budget < (least := 2 * concepts + 2):
            raise UsageError(f"budget {self.budget} is too small to search over {concepts} adapters; give at least {least}")

    def solve_model(self, problem: ModelProblem) -> dict[str, LayerSolution]:
        from scipy.optimize import minimize

        number = len(problem.concepts)
        self.check(number)
        tried: list[tuple[float, tuple[float, ...]]] = []
        with torch.no_grad():
            unit = 1.0 if problem.score else max(float(problem.loss(self._changes(problem, (0.0,) * number), None)), 1e-300)

        def cost(coefficients: Any) -> float:
            given = tuple(float(c) for c in coefficients)
            with torch.no_grad():
                changes = self._changes(problem, given)
                value = -problem.score(changes) if problem.score else float(problem.loss(changes, None)) / unit
            value += self.penalty * sum(map(abs, given)) / number
            tried.append((value, given))
            return value

        minimize(
            cost,
            [0.0] * number,
            method="COBYQA",
            bounds=[(-self.bound, self.bound)] * number,
            options={"maxfev": self.budget, "initial_tr_radius": self.bound / 2},
        )
        least, best = min(tried)
        notes: dict[str, float | str | bool] = {
            "evaluations": len(tried),
            "first_cost": tried[0][0],
            "least_cost": least,
            **{f"coefficient/{concept}": c for concept, c in zip(problem.concepts, best, strict=True)},
        }
        return {
            name: LayerSolution.of_factors(up, down, status="searched", advice="", **notes)
            for name, (up, down) in ((name, _weighed(problem, name, best)) for name in problem.layers)
        }

    def _changes(self, problem: ModelProblem, coefficients: tuple[float, ...]) -> dict[str, Tensor]:
        made = {}
        for name in problem.layers:
            up, down = _weighed(problem, name, coefficients)
            made[name] = up.float() @ down.float()
        return made


def _weighed(problem: ModelProblem, name: str, coefficients: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    ups, downs = zip(*problem.layers[name].factors, strict=True)
    return torch.cat(ups, 1), torch.cat([c * down for c, down in zip(coefficients, downs, strict=True)])
