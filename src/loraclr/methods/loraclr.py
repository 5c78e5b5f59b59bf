"""LoRACLR, solved: the optimum of the contrastive merge objective in closed form, with a certificate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.errors import MergeError, UsageError
from loraclr.methods.contrast import Contrast, active, refine
from loraclr.methods.options import Checked, Option
from loraclr.methods.problem import Claim, Distances, LayerProblem, LayerSolution
from loraclr.methods.quadratic import Quadratic
from loraclr.statistics import Gap

FEW = 16  # paired rows that the certificate is tried on first
LADDER = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # what `choose` tries, times `ridge`
GUARDS = (1.0, 0.1, 0.3, 3.0, 10.0)  # and then, times `preservation`
OVERGROWN = 3.0  # times the largest input: a delta this large fits noise


@dataclass(frozen=True)
class Loraclr(Checked):
    """Minimises J(D) = (1/N) [sum_i a_i ||X_i (D - D_i)^T||^2 + N w ||X_0 D^T||^2 + mu ||D - P||^2 + sum_i hinge_i^2] + lambda ||D||.

    hinge_i is max(0, margin - distance of anchor i to its nearest negative), all norms are Frobenius. Without an active hinge the
    minimiser is D = (sum_i a_i D_i G_i + mu P)(S + N w G_0 + mu I)^-1, an ordinary LoRA of rank sum_i r_i at most; as the hinge is
    never negative, one look at the negative distances certifies it as the global optimum of J. Where the hinge is active, L-BFGS
    descends from there. An adapter without this layer has the target "no change" on its own features.
    """

    ridge: Annotated[float, Option("mu, in mean diagonals of S: pulls towards the prior, against fitting noise", 0)] = 3e-4
    choose: Annotated[
        Literal["fixed", "held_out"],
        Option(
            "take `ridge`, `prior` and `preservation` as they are, or layer by layer what held-out prompts, six unless told, like best: "
            "1, 3, 10, ... 1000 times the ridge with either prior, then .1 to 10 times the preservation; these prompts then judge no more"
        ),
    ] = "fixed"
    preservation: Annotated[
        float, Option("w: how much concept-free prompts must stay as they are; 1 as all concepts together, 0 needs no such statistics", 0)
    ] = 1.0
    prior: Annotated[Literal["zero", "mean"], Option("P: what `ridge` pulls towards, no change or the mean of the deltas")] = "zero"
    normalise: Annotated[bool, Option("count every concept by the mean over its rows; false: by the sum, as the paper does")] = True
    balance: Annotated[bool, Option("divide every concept's share by what its adapter does there: loud ones do not drown quiet ones")] = (
        False
    )
    importance: Annotated[tuple[float, ...], Option("one factor per concept on its share of the objective; empty: all 1", 0)] = ()
    penalty: Annotated[float, Option("lambda of the paper's eq. (4), on the norm of the delta, not squared", 0)] = 0.0
    margin: Annotated[float, Option("m of eq. (1); 0 switches the hinge off", 0)] = 0.5
    margin_mode: Annotated[
        Literal["absolute", "relative"], Option("m as it is, or per pair times the distance of the two concepts' targets")
    ] = "absolute"
    distance: Annotated[
        Literal["frobenius", "rms"], Option("negative distances over all rows (the paper), or per row: divided by sqrt(rows)")
    ] = "frobenius"
    anchor: Annotated[
        Literal["target", "prediction"], Option("whose nearest negative counts: the target's (paper) or the prediction's (released code)")
    ] = "target"
    space: Annotated[Literal["output", "delta"], Option("compare outputs X (W + D)^T, or only what the adapters add, X D^T")] = "output"
    iterations: Annotated[int, Option("most L-BFGS steps in a layer with an active hinge", 1)] = 100
    certificate: Annotated[
        Literal["bound", "exact"], Option("judge the hinge on the paired rows that were kept, or on all rows in a second pass")
    ] = "bound"
    rounds: Annotated[
        int | None,
        Option("2 and more: go through the UNet's blocks again and make good what is missing; without it 2 where it can, else 1", 1),
    ] = None

    name: ClassVar[str] = "loraclr"
    summary: ClassVar[str] = (
        "the LoRACLR objective at its optimum, with a certificate; then, block by block of a UNet, what is still missing"
    )
    when: ClassVar[str] = "first; several concepts that must all keep their identity, with the base at hand"
    reference: ClassVar[str] = "Simsar et al. 2025, arXiv 2412.09622"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType(
        {
            "exact": MappingProxyType({"ridge": 0.0, "choose": "fixed", "preservation": 0.0, "normalise": False, "penalty": 1e-3}),
            "contrastive": MappingProxyType({"margin": 0.5, "margin_mode": "relative", "distance": "rms"}),
        }
    )

    @property
    def needs(self) -> frozenset[str]:
        hinge = {"sample", "base"} if self.space == "output" else {"sample"}
        exact = {"lockstep"} if self.certificate == "exact" else set()
        again = {"gaps", "base"} if self.rounds is not None and self.rounds > 1 else set()
        return frozenset(
            {"statistics"}
            | again
            | ({"held_out"} if self.choose == "held_out" else set())
            | ({"preserve"} if self.preservation > 0 else set())
            | (hinge | exact if self.margin > 0 else set())
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds is not None and self.rounds > 1 and self._unfit:
            raise UsageError(f"method 'loraclr': rounds={self.rounds} knows no {', '.join(self._unfit)}; leave that out, or rounds at 1")

    @property
    def further(self) -> bool:
        """Whether a further round takes nothing that these hyper-parameters ask for: it has no hinge, either."""
        usual = {
            "margin": (0.0, 0.5),
            "margin_mode": ("absolute",),
            "distance": ("frobenius",),
            "anchor": ("target",),
            "space": ("output",),
        }
        return not self._unfit and all(getattr(self, name) in values for name, values in usual.items())

    @property
    def _unfit(self) -> list[str]:
        """The hyper-parameters, as they are, that a further round does not know."""
        unfit = {
            "choose": self.choose != "fixed",
            "balance": self.balance,
            "prior": self.prior != "zero",
            "penalty": self.penalty > 0,
            "certificate": self.certificate == "exact",
        }
        return [name for name, given in unfit.items() if given]

    def check(self, concepts: int) -> None:
        if self.importance and len(self.importance) != concepts:
            raise UsageError(f"importance has {len(self.importance)} numbers for {concepts} concepts; give one for each")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        self.check(len(problem.concepts))
        return (self._chosen(problem) if self.choose == "held_out" else self)._solve(problem)

    def _chosen(self, problem: LayerProblem) -> Loraclr:
        """These hyper-parameters with the ridge, prior and preservation that held-out prompts like best; the first of equals."""
        judge = Quadratic.held_out(problem)

        def error(quadratic: Quadratic) -> float:
            return judge.value_and_gradient(quadratic.minimiser())[0]

        priors: tuple[Literal["zero", "mean"], ...] = ("zero", "mean") if self.prior == "zero" else ("mean", "zero")
        rungs: dict[Loraclr, float] = {}
        for one in (replace(self, prior=prior) for prior in priors):
            quadratic = one._quadratic(problem)
            for factor in LADDER:
                rungs[replace(one, ridge=self.ridge * factor)] = error(quadratic.with_mu(quadratic.mu * factor))
        found = min(rungs, key=rungs.__getitem__)
        if not self.preservation:
            return found
        guards = [replace(found, preservation=found.preservation * share) for share in GUARDS]
        return min(guards, key=lambda one: error(one._quadratic(problem)))

    def _solve(self, problem: LayerProblem) -> LayerSolution:
        number = len(problem.concepts)
        quadratic = self._quadratic(problem)
        v, extra = quadratic.penalised(number * self.penalty / 2) if self.penalty > 0 else (quadratic.minimiser(), 0.0)
        convex = Outcome(v, quadratic.least(v, extra) / number)
        largest = max(_norm(up, down) for up, down in problem.factors)
        frame = Frame(quadratic.up, quadratic.mu, extra, float(quadratic.right.norm()), largest, convex)
        bare = replace(problem)  # without its factors: answers may wait until all layers are solved
        answer = partial(self._answer, bare, frame)
        if self.margin == 0 or number == 1:
            return answer(convex, "optimal", "global optimum of J on all collected rows: convex, no hinge")
        status, certificate, found, contrast = self._certify(problem, quadratic.up, v)
        if certificate:
            chosen = replace(convex, found=found)
        else:
            v, left = refine(quadratic, contrast, v, penalty=self.penalty, iterations=self.iterations)
            hinge, _, found = contrast.value_and_gradient(quadratic.up, v)
            chosen = Outcome(v, quadratic.value_and_gradient(v)[0] / number, hinge, found, len(contrast.active(found)))
            certificate = f"none: the hinge is active; L-BFGS in the adapters' span stopped with {left:.1e} of the gradient left"
        solution = answer(chosen, status, certificate)
        if self.certificate == "bound":
            return solution
        outcomes = (convex,) if chosen.v is convex.v else (convex, chosen)

        def settle(tables: tuple[Distances, ...]) -> LayerSolution:
            tables = tuple(table.per_row() for table in tables) if self.distance == "rms" else tables
            chosen, status, certificate = self._settled(bare, outcomes, tables)
            distances = next(table for one, table in zip(outcomes, tables, strict=True) if one.v is chosen.v)
            return replace(answer(chosen, status, certificate), distances=distances)

        return replace(solution, claim=Claim(self.space, tuple((quadratic.up, one.v) for one in outcomes), settle))

    def refit(self, problem: LayerProblem, before: Tensor, gaps: Iterable[tuple[str | None, Gap]]) -> LayerSolution:
        """The least of sum_i a_i ||E_i - X'_i (D - B)^T||^2 + N w ||E_0 - X'_0 (D - B)^T||^2 + mu ||D - B||^2 over D, dense (out, in).

        B is the change `before`, X' are the merged model's inputs, E what the hidden states behind the layer lack of those of the adapter's
        own run. `gaps` are those of every concept in turn and, under None, of the prompts without any (i = 0, beside the base's own run);
        one at a time is held. `left` is the part of the concepts' sum_i a_i ||E_i||^2 that is then still missing, before any cut to a rank.
        Raises MergeError where gaps are missing.
        """
        number, wide = len(problem.concepts), (problem.width, problem.width)
        loud = dict(zip(problem.concepts, self.importance or (1.0,) * number, strict=True))
        seen, wanted = torch.zeros(wide, dtype=torch.float64), torch.zeros_like(before)
        free = free_wanted = torch.zeros((), dtype=torch.float64)
        missing, counted, lacking = 0.0, 0, {*problem.concepts, None}
        for name, gap in gaps:
            lacking.discard(name)
            share = (self.preservation * number if name is None else loud[name]) / (gap.count if self.normalise else 1)
            if name is None:
                free, free_wanted = share * gap.square, share * gap.cross
            else:
                seen.add_(gap.square, alpha=share)
                wanted.add_(gap.cross, alpha=share)
                missing, counted = missing + share * gap.size, counted + gap.count
            del gap  # before the next is made
        if self.preservation > 0 and None in lacking:
            raise MergeError(f"{problem.layer}: no concept-free prompts were run; collect some, or set preservation=0")
        if unseen := [name for name in problem.concepts if name in lacking]:
            raise MergeError(f"{problem.layer}: nothing says what {', '.join(unseen)} lacks behind it; run every adapter of the merge")
        mu = self.ridge * float(seen.trace()) / problem.width
        square = seen + free
        more = linalg.ridge_solve(wanted + free_wanted, square, mu)
        left = missing - 2 * float((wanted * more).sum()) + float(((more @ seen) * more).sum())
        notes: dict[str, float | str | bool] = {
            "rows": counted,
            "in_features": problem.width,
            "mu": mu,
            "left": left / missing if missing > 0 else 0.0,
        }
        metric = square + mu * torch.eye(problem.width, dtype=torch.float64)
        return LayerSolution(change=before + more, status="refitted", diagnostics=notes, metric=lambda: metric)

    def _quadratic(self, problem: LayerProblem) -> Quadratic:
        return Quadratic.of(
            problem,
            ridge=self.ridge,
            preservation=self.preservation,
            prior=self.prior,
            normalise=self.normalise,
            importance=self.importance,
            balance=self.balance,
        )

    def _answer(self, problem: LayerProblem, frame: Frame, chosen: Outcome, status: str, certificate: str) -> LayerSolution:
        number, convex, mu = len(problem.concepts), frame.convex, frame.mu + frame.extra
        size, largest = float(chosen.v.norm()), frame.largest
        notes: dict[str, float | str | bool] = {
            "rows": sum(moments.count for moments in problem.moments()),
            "in_features": problem.width,
            "mu": mu,
        }
        known = status != "undecided"  # else what the hinge adds to J is not
        if chosen.found is not None:
            target, prediction = divmod(int(chosen.found.argmin()), number)
            notes |= {"hinge": chosen.hinge, "hinge_active": chosen.active} if known else {}
            notes |= {
                "closest_negative": float(chosen.found.min()),
                "closest_pair": f"{problem.concepts[target]}, prediction of {problem.concepts[prediction]}",
            }
        objective = chosen.value + chosen.hinge + self.penalty * size
        notes |= {"objective": objective} if known else {}
        notes["growth"] = size / largest if largest > 0 else 0.0
        if self.choose == "held_out":
            notes |= {"chosen_on": "held_out", "ridge": self.ridge, "prior": self.prior, "preservation": self.preservation}
        if chosen.active or chosen.v is not convex.v:  # the hinge is never negative: no J is below the least of the rest
            notes["gap"] = max(objective - convex.value - self.penalty * float(convex.v.norm()), 0.0)
        notes["certificate"] = f"{certificate}; J({self._objective(frame.mu)})"
        advice = "" if known else "the paired rows that were kept do not tell whether the hinge is active; set certificate=exact"
        if size > OVERGROWN * largest and not self.preservation:  # with it, what ordinary prompts use is guarded
            advice = f"the delta is {size / largest:.1f} times the largest adapter's: it fits noise; raise `ridge` or `preservation`"
        if self.penalty > 0:
            pull = 2 / number * frame.pull / self.penalty
            notes["data_gradient_over_lambda"] = pull
            if not chosen.v.any():
                status, advice = "zero", f"the penalty outweighs the data, whose gradient is {pull:.2g} of lambda; lower `penalty`"
        solution = LayerSolution.of_factors(frame.up, chosen.v, status=status, advice=advice, **notes)
        # Made anew where somebody asks: the sums of every layer would be kept until all are settled.
        return replace(solution, metric=lambda: self._quadratic(problem).with_mu(mu).metric())

    def _settled(self, problem: LayerProblem, outcomes: tuple[Outcome, ...], tables: tuple[Distances, ...]) -> tuple[Outcome, str, str]:
        """The first outcome, the convex minimiser, where its hinge is inactive on all rows; else the one of least J."""
        number, rows = len(problem.concepts), tables[0].rows
        judged = []
        for outcome, table in zip(outcomes, tables, strict=True):
            margins = torch.full_like(table.found, self.margin) if self.margin_mode == "absolute" else self.margin * table.natural
            found = table.found.clone().fill_diagonal_(torch.inf)
            short = active(margins, found, self.anchor)
            judged.append(replace(outcome, hinge=sum(s * s for _, _, s in short) / number, found=found, active=len(short)))
        if not judged[0].active:
            closest = float(judged[0].found.min()) if judged[0].found is not None else 0.0
            return judged[0], "optimal", f"global optimum of J on all {rows} paired rows: closest negative = {closest:.4g}"
        best = min(judged, key=lambda one: one.value + one.hinge + self.penalty * float(one.v.norm()))
        said = (
            f"none: the hinge is active on all {rows} paired rows for {best.active} of {number} concepts; J is within `gap` of its optimum"
        )
        return best, "refined" if best is not judged[0] else "unrefined", said

    def _certify(self, problem: LayerProblem, up: Tensor, v: Tensor) -> tuple[str, str, Tensor, Contrast]:
        """The status and certificate of the convex minimiser Q V, or `refined` and none where the hinge is active; the distances that it
        rests on, and their contrast.

        Some of the rows bound a distance over all of them from below, which is enough for an absolute margin: a few are tried first.
        A mean over rows is bounded by dividing by the full count, and a margin measured on some rows says nothing of the others.
        """
        collected = max(moments.count for moments in problem.moments())
        for most in (FEW, None) if self.margin_mode == "absolute" else (None,):
            contrast = Contrast.of(
                problem,
                margin=self.margin,
                mode=self.margin_mode,
                anchor=self.anchor,
                space=self.space,
                distance=self.distance,
                most=most,
            )
            found, rows = contrast.distances(up, v), contrast.rows.shape[1]
            bound = found * ((rows / collected) ** 0.5 if self.distance == "rms" else 1.0)
            if (rows >= collected or self.margin_mode == "absolute") and bool((bound >= contrast.margins).all()):
                closest = f"closest negative {'=' if rows >= collected else '>='} {float(bound.min()):.4g}"
                return "optimal", f"global optimum of J on all collected rows: {closest}", bound, contrast
        if self.margin_mode == "absolute" and self.distance == "frobenius" and rows < collected:
            closest = f"closest negative >= {float(bound.min()):.4g} on {rows} of {collected} rows"
            return "undecided", f"undecided: {closest} does not reach the margin, and the hinge is left out", bound, contrast
        if contrast.active(found):
            return "refined", "", found, contrast
        return "optimal", f"global optimum of J on all collected rows, with the hinge on {rows} paired ones", found, contrast

    def _objective(self, mu: float) -> str:
        hinge = f"margin={self.margin:g} {self.margin_mode}, distance={self.distance}, anchor={self.anchor}, space={self.space}"
        return (
            f"lambda={self.penalty:g}, mu={mu:.3g}, prior={self.prior}, preservation={self.preservation:g}, "
            f"normalise={self.normalise}, balance={self.balance}, {hinge if self.margin > 0 else 'margin=0'}"
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """A candidate D = Q V: the convex part of J there without the penalty, the hinge, and the distances that it rests on."""

    v: Tensor  # (k, in)
    value: float
    hinge: float = 0.0
    found: Tensor | None = None  # (concepts, concepts)
    active: int = 0  # anchors whose hinge is


@dataclass(frozen=True, eq=False)
class Frame:
    """What is left of a layer's quadratic once it is minimised: nothing of the size of its Grams."""

    up: Tensor  # Q (out, k)
    mu: float
    extra: float  # the ridge in the penalty's place
    pull: float  # ||R||
    largest: float  # of the adapters' norms
    convex: Outcome


def _norm(up: Tensor, down: Tensor) -> float:
    """||up @ down||_F without the product."""
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())
