from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from problems import NAME, features, make_problem, relative

from loraclr import linalg
from loraclr.adapter import DenseLayer, LoraLayer
from loraclr.errors import MergeError, NumericalError, UsageError
from loraclr.methods import METHODS, NEEDS, AdapterMethod, LayerMethod, make_method, method_names, parameters, residuals
from loraclr.methods.contrast import Contrast
from loraclr.methods.loraclr import GUARDS, LADDER, Loraclr
from loraclr.methods.loraclr_reference import LoraclrReference
from loraclr.methods.problem import Siblings
from loraclr.methods.quadratic import Quadratic, _Sums
from loraclr.statistics import LayerStats, Moments

EYE = torch.eye(8, dtype=torch.float64)  # writes any delta (8, in) as Q V
PLAIN = Loraclr(ridge=0.0, preservation=0.0, normalise=False, margin=0.0)


def stacked(problem):
    """X and E of the stacked least squares X D^T = E."""
    rows = features(problem)
    return torch.cat(rows), torch.cat([x @ d.T for x, d in zip(rows, problem.deltas(), strict=True)])


def objective(problem, delta, *, penalty=0.0, margin=0.0, anchor="target", distance="frobenius", mse=0.0):
    """The reference's loss in float64."""
    reference = LoraclrReference(penalty=penalty, margin=margin, anchor=anchor, distance=distance, mse=mse)
    rows, weight = problem.sample(), problem.weight()
    return reference.loss(delta, rows, weight, rows @ (weight + torch.stack(problem.deltas())).mT)


def descend(function, start, steps=200):
    """L-BFGS to the end, in float64."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point], max_iter=steps, history_size=30, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = function(point)
        loss.backward()
        return loss

    optimiser.step(closure)
    return point.detach()


# The shelf of methods --------------------------------------------------------------------------------------------------------------


def test_every_method_describes_itself():
    assert tuple(METHODS) == (
        "loraclr", "loraclr-reference",
        "average", "gradient-fusion", "regmean", "custom-diffusion", "orthogonal", "pplus", "ziplora", "lorahub",
        "sum", "svd", "ties", "dare-linear", "dare-ties", "magnitude-prune", "knots", "linear",
        "iso-c", "tsv", "core-space",
    )  # fmt: skip
    for name, method in METHODS.items():
        made = make_method(name)
        assert (
            isinstance(made, LayerMethod) != isinstance(made, AdapterMethod)
            and made.name == name
            and made.summary
            and made.when
            and made.reference
        )
        assert made.needs <= set(NEEDS)
        for row in parameters(method):
            assert row.help and getattr(made, row.name) == row.default
    assert "loraclr:exact" in method_names() and "average" in method_names()
    for name in method_names():
        make_method(name)


def test_other_names_make_the_same_method():
    assert make_method("concat", scale=0.5) == make_method("task-arithmetic", scale=0.5) == make_method("sum", scale=0.5)
    names = [word for method in METHODS.values() for word in (method.name, *method.aliases)]
    assert len(names) == len(set(names))
    with pytest.raises(UsageError, match="Did you mean 'concat'"):
        make_method("conkat")
    with pytest.raises(UsageError, match=r"density=1\.5 must be a finite number, at least 0 and at most 1"):
        make_method("ties", density=1.5)


def test_presets_give_way_to_parameters():
    assert make_method("loraclr:exact", margin=0.25) == Loraclr(ridge=0.0, preservation=0.0, normalise=False, penalty=1e-3, margin=0.25)
    assert make_method("loraclr-reference:official").mse == 0.1


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_a_preset_of_another_method_is_named_with_it(preset):
    with pytest.raises(UsageError, match=f"no preset '{preset}'. Did you mean 'loraclr-reference:{preset}'.* It has: exact, contrastive"):
        make_method(f"loraclr:{preset}")


def test_all_configuration_errors_come_in_one_message():
    for name, meant in (("LORACLR", "loraclr"), ("Ties", "ties"), ("DARE-Linear", "dare-linear")):
        with pytest.raises(UsageError, match=f"no method '{name}'. Did you mean '{meant}'"):
            make_method(name)
    with pytest.raises(UsageError, match="Did you mean 'loraclr'"):
        make_method("loracrl")
    with pytest.raises(UsageError) as caught:
        make_method("loraclr:exakt", rige=1.0, prior="meen", ridge=-1.0, iterations=2.5, importance=[1.0])
    text = str(caught.value)
    for part in ("'exact'", "'ridge'", "'mean'", "ridge=-1.0", "at least 0", "iterations=2.5", "whole number", "importance", "tuple"):
        assert part in text
    with pytest.raises(UsageError, match="margin=nan"):
        Loraclr(margin=math.nan)


def test_needs_follow_the_parameters():
    assert Loraclr().needs == {"statistics", "preserve", "sample", "base"}
    assert Loraclr(space="delta", preservation=0.0).needs == {"statistics", "sample"}
    assert PLAIN.needs == {"statistics"}


# Closed form -----------------------------------------------------------------------------------------------------------------------


def test_two_concepts_by_hand():
    """Concept 0 sees x_1 twice and x_2, concept 1 sees x_2 and x_3: shared directions get the mean by energy, others their own."""
    x0, x1 = torch.diag(torch.tensor([2.0, 1, 0, 0]))[:2].double(), torch.diag(torch.tensor([0, 1.0, 3, 0]))[1:3].double()
    a = LoraLayer(NAME, torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[1.0], [0], [0], [0]]), 4.0)
    b = LoraLayer(NAME, torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[0.0], [1], [0], [0]]), 2.0)
    problem = make_problem(2, out=4, width=4, features=[x0, x1], layers=[a, b], preserve=0)
    expected = torch.tensor([[4.0, 2, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    solution = PLAIN.solve(problem)  # 2 + 2 rows are not fewer than 4 features: the Gram form, singular in x_4
    assert torch.allclose(solution.delta(), expected, atol=1e-12)
    lifted = Loraclr(ridge=1.0, preservation=0.0, normalise=False, margin=0.0).solve(problem)  # S = diag(4, 2, 9, 0), mu = 15 / 4
    weights = torch.tensor([4 / 7.75, 2 / 5.75, 9 / 12.75, 0], dtype=torch.float64)
    assert torch.allclose(lifted.delta(), expected * weights, atol=1e-12)
    assert lifted.diagnostics["mu"] == 3.75


@pytest.mark.parametrize("rows", [20, 2])
def test_it_is_the_stacked_least_squares_of_least_norm(rows):
    problem = make_problem(3, rows=rows, width=7, preserve=0)
    x, e = stacked(problem)
    expected = (torch.linalg.pinv(x) @ e).T
    found = PLAIN.solve(problem).delta()
    assert relative(found, expected) < 1e-11
    limit = descend(lambda d: objective(problem, d).total, torch.zeros_like(found))  # where gradient descent from 0 goes, F 14
    assert relative(limit, expected) < 1e-5


@pytest.mark.parametrize("rows", [20, 2])
@pytest.mark.parametrize("prior", ["zero", "mean"])
@pytest.mark.parametrize("normalise", [False, True])
def test_ridge_prior_importance_and_preservation_are_a_stacked_least_squares(rows, prior, normalise):
    problem = make_problem(3, rows=rows, width=16 if rows == 2 else 7, preserve=5, weights=[1.0, 0.5, 2.0])
    importance, w = (1.0, 3.0, 0.5), 0.7
    method = Loraclr(ridge=0.1, preservation=w, prior=prior, normalise=normalise, importance=importance, margin=0.0)
    solution = method.solve(problem)
    mu = solution.diagnostics["mu"]
    preserve = problem.statistics.preserve
    shares = [a / (rows if normalise else 1) for a in importance]
    xs = [x * s**0.5 for x, s in zip(features(problem), shares, strict=True)]
    assert math.isclose(mu, 0.1 * sum(float(x.square().sum()) for x in xs) / problem.width, rel_tol=1e-12)
    root = torch.linalg.cholesky(preserve.gram() + 1e-13 * torch.eye(problem.width)).T  # the same Gram in width rows
    x0 = root * (3 * w / (preserve.count if normalise else 1)) ** 0.5  # as much as w of the three concepts' mean, three times
    eye = mu**0.5 * torch.eye(problem.width, dtype=torch.float64)
    p = torch.stack(problem.deltas()).mean(0) if prior == "mean" else torch.zeros(problem.out, problem.width, dtype=torch.float64)
    x = torch.cat([*xs, x0, eye])
    e = torch.cat([*(x @ d.T for x, d in zip(xs, problem.deltas(), strict=True)), x0 @ torch.zeros_like(p).T, eye @ p.T])
    assert relative(solution.delta(), (torch.linalg.pinv(x) @ e).T) < 1e-8
    assert math.isclose(solution.diagnostics["objective"], float((x @ solution.delta().T - e).square().sum()) / 3, rel_tol=1e-8)


@pytest.mark.parametrize("rows", [20, 2])
def test_balance_is_importance_by_the_inverse_of_what_each_adapter_does(rows):
    problem = make_problem(3, rows=rows, width=16 if rows == 2 else 7, weights=[1.0, 0.1, 5.0])
    xs, deltas = features(problem), problem.deltas()
    inverse = [rows / float((x @ d.T).square().sum()) for x, d in zip(xs, deltas, strict=True)]
    level = sum(float(x.square().sum()) for x in xs) / sum(f * float(x.square().sum()) for f, x in zip(inverse, xs, strict=True))
    settings = {"ridge": 0.1, "preservation": 0.3, "margin": 0.0}
    balanced = Loraclr(balance=True, **settings).solve(problem)
    weighed = Loraclr(importance=tuple(f * level for f in inverse), **settings).solve(problem)
    assert relative(balanced.delta(), weighed.delta()) < 1e-9
    assert math.isclose(balanced.diagnostics["mu"], Loraclr(**settings).solve(problem).diagnostics["mu"], rel_tol=1e-9)
    louder = replace(problem, weights=(1.0, 0.1, 500.0))  # however loud one is, the quiet one keeps its residual
    residual = [residuals(p, Loraclr(balance=True, **settings).solve(p).delta())["fit/c1"] for p in (problem, louder)]
    plain = [residuals(p, Loraclr(**settings).solve(p).delta())["fit/c1"] for p in (problem, louder)]
    assert residual[1] < plain[1]


def test_balance_counts_an_adapter_that_does_nothing_like_the_mean_of_the_others():
    problem = make_problem(3)
    absent = replace(problem, layers=(problem.layers[0], None, problem.layers[2]))
    solution = Loraclr(balance=True, preservation=0.0, ridge=1e-9, margin=0.0).solve(absent)
    assert residuals(absent, solution.delta())["fit/c0"] < 1
    nothing = replace(problem, layers=(LoraLayer(NAME, torch.zeros(2, 6), torch.zeros(8, 2)), None, None))
    assert not Loraclr(balance=True, margin=0.0).solve(nothing).delta().any()


def test_dual_and_primal_agree():
    problem = make_problem(2, rows=4, width=9, preserve=0)
    fit = {name: Moments(m.width, m.count, None, m.gram()) for name, m in problem.statistics.fit.items()}  # the same sums, without the rows
    primal = replace(problem, statistics=LayerStats(NAME, fit))
    for prior in ("zero", "mean"):
        method = Loraclr(ridge=0.01, preservation=0.0, prior=prior, margin=0.0)
        assert relative(method.solve(problem).delta(), method.solve(primal).delta()) < 1e-10


def test_rank_and_column_space():
    problem = make_problem(3, out=12, width=10, rank=2)
    solution = PLAIN.solve(problem)
    assert solution.up.shape == (12, 6) and solution.down.shape == (6, 10)
    b = torch.cat([problem.factors[i][0] for i in range(3)], 1)
    assert relative(b @ torch.linalg.pinv(b) @ solution.delta(), solution.delta()) < 1e-12
    wide = PLAIN.solve(make_problem(5, out=8, width=6, rank=2))  # 10 columns are more than any (8, 6) needs
    assert wide.up.shape == (8, 6) and wide.down.shape == (6, 6)


@pytest.mark.parametrize("prior", ["zero", "mean"])
@pytest.mark.parametrize("preserve", [0, 30])
def test_held_out_prompts_choose_ridge_and_prior_and_then_preservation(prior, preserve):
    """The chosen solution is a fixed one, and none of the others that are tried is nearer to the adapters on the held-out rows."""
    problem = make_problem(3, rows=40, preserve=preserve)
    settings = {"ridge": 1e-3, "preservation": 0.3 if preserve else 0.0, "margin": 0.0, "prior": prior}
    chosen = make_method("loraclr", choose="held_out", **settings).solve(problem)

    def error(**changed):
        found = residuals(problem, make_method("loraclr", **{**settings, **changed}).solve(problem).delta())
        return sum(value**2 for key, value in found.items() if key.startswith("held_out/"))

    told = {key: chosen.diagnostics[key] for key in ("ridge", "prior", "preservation")}
    assert torch.allclose(chosen.delta(), make_method("loraclr", **{**settings, **told}).solve(problem).delta(), atol=1e-10)
    rungs = {(other, 1e-3 * factor): error(prior=other, ridge=1e-3 * factor) for other in ("zero", "mean") for factor in LADDER}
    assert rungs[told["prior"], told["ridge"]] == min(rungs.values()) < rungs[prior, 1e-3]  # the features are too few for the smallest
    guards = {settings["preservation"] * share: error(**{**told, "preservation": settings["preservation"] * share}) for share in GUARDS}
    assert guards[told["preservation"]] == min(guards.values()) and (preserve or told["preservation"] == 0)


def test_held_out_choice_leaves_a_single_adapter_as_it_is():
    problem = make_problem(1, rows=40, preserve=0)
    same = replace(problem, statistics=replace(problem.statistics, held_out=problem.statistics.fit))
    settings = {"preservation": 0.0, "margin": 0.0}
    chosen = make_method("loraclr", choose="held_out", **settings).solve(same)
    assert chosen.diagnostics["prior"] == "mean" and torch.allclose(chosen.delta(), problem.deltas()[0])
    without = replace(problem, statistics=replace(problem.statistics, held_out={}))
    with pytest.raises(MergeError, match=r"no held-out statistics to choose by; collect some held-out prompts, or set choose='fixed'"):
        make_method("loraclr", choose="held_out", **settings).solve(without)


def test_equal_grams_give_the_average_and_orthogonal_inputs_keep_everyone():
    x = torch.randn(20, 6, dtype=torch.float64)
    problem = make_problem(3, features=[x] * 3)
    assert relative(PLAIN.solve(problem).delta(), torch.stack(problem.deltas()).mean(0)) < 1e-10
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    parts = [torch.randn(20, 2, dtype=torch.float64) @ q[2 * i : 2 * i + 2] for i in range(3)]
    problem = make_problem(3, features=parts)
    assert max(residuals(problem, PLAIN.solve(problem).delta())[f"fit/c{i}"] for i in range(3)) < 1e-7


@pytest.mark.parametrize("rows", [20, 2])
def test_objective_and_gradient_from_grams_are_those_of_the_features(rows):
    problem = make_problem(3, rows=rows, width=7, preserve=0)
    quadratic = Quadratic.of(problem)
    delta = quadratic.up @ torch.randn(6, 7, dtype=torch.float64)  # q knows deltas in the span of the adapters' columns
    delta.requires_grad_()
    loss = objective(problem, delta).total * 3
    (gradient,) = torch.autograd.grad(loss, delta)
    up = quadratic.up
    assert torch.allclose(up.T @ up, torch.eye(up.shape[1], dtype=torch.float64), atol=1e-12)
    value, found = quadratic.value_and_gradient(up.T @ delta.detach())
    assert math.isclose(value, float(loss.detach()), rel_tol=1e-12)
    assert relative(found, up.T @ gradient) < 1e-12


def test_repeated_rows_change_nothing_but_the_scale():
    problem = make_problem(2, preserve=0)
    again = make_problem(2, preserve=0, features=[x.repeat(3, 1) for x in features(problem)], base=problem.base)
    again = replace(again, layers=problem.layers)
    for normalise in (False, True):
        method = Loraclr(ridge=0.1, preservation=0.0, normalise=normalise, margin=0.0)
        assert relative(method.solve(again).delta(), method.solve(problem).delta()) < 1e-12
    delta = torch.randn(8, 6, dtype=torch.float64)
    for distance, factor in (("frobenius", 3**0.5), ("rms", 1.0), ("token", 1.0)):
        one, three = (objective(p, delta, distance=distance).positive for p in (problem, again))
        assert torch.allclose(three, one * factor)


# The unsquared penalty: preset `exact` ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [20, 2])
@pytest.mark.parametrize("penalty", [1e-3, 0.1, 1.0, 10.0])
def test_exact_is_where_the_gradient_of_eq_5_vanishes(rows, penalty):
    problem = make_problem(3, rows=rows, width=7, preserve=0)
    solution = make_method("loraclr:exact", penalty=penalty).solve(problem)
    delta = solution.delta().requires_grad_()
    loss = objective(problem, delta, penalty=penalty, margin=0.5).total
    (gradient,) = torch.autograd.grad(loss, delta)
    scale = 2 / 3 * float(sum((d @ x.T @ x).norm() for d, x in zip(problem.deltas(), features(problem), strict=True)))
    assert float(gradient.norm()) < 1e-12 * scale + 1e-8 * penalty
    assert math.isclose(solution.diagnostics["objective"], float(loss.detach()), rel_tol=1e-9, abs_tol=1e-11)
    assert solution.status == "optimal" and "global optimum of J on all collected rows" in solution.diagnostics["certificate"]


def test_exact_is_zero_iff_the_penalty_outweighs_the_data():
    problem = make_problem(3, preserve=0)
    edge = 2 / 3 * float(sum(d @ x.T @ x for d, x in zip(problem.deltas(), features(problem), strict=True)).norm())
    sizes = []
    for share in (1e-8, 0.1, 0.5, 0.999, 1.001):
        solution = make_method("loraclr:exact", penalty=share * edge).solve(problem)
        sizes.append(float(solution.delta().norm()))
        assert math.isclose(solution.diagnostics["data_gradient_over_lambda"], 1 / share, rel_tol=1e-9)
    assert sizes == sorted(sizes, reverse=True) and sizes[-2] > 0 == sizes[-1]
    assert solution.status == "zero" and "lower `penalty`" in solution.advice
    assert math.isclose(sizes[0], float(PLAIN.solve(problem).delta().norm()), rel_tol=1e-5)


@pytest.mark.parametrize("anchor", ["target", "prediction"])
def test_fast_equals_reference_at_the_optimum(anchor):
    """The solver against the paper's objective on raw features, driven to its end by L-BFGS from a random start."""
    problem = make_problem(3, preserve=0)
    found = make_method("loraclr:exact", penalty=0.1, anchor=anchor).solve(problem)
    end = descend(lambda d: objective(problem, d, penalty=0.1, margin=0.5, anchor=anchor).total, torch.randn(8, 6, dtype=torch.float64))
    assert relative(found.delta(), end) < 1e-6
    slow = LoraclrReference(penalty=0.1, anchor=anchor, steps=400, learning_rate=2e-2).solve(problem)
    assert relative(slow.delta().double(), found.delta()) < 2e-2
    assert slow.diagnostics["best_loss"] >= found.diagnostics["objective"] * (1 - 1e-6)


def test_official_objective_without_hinge_only_reweights_the_data():
    """F 21: 0.1 MSE is the data term times 0.1 / (rows * out)."""
    problem = make_problem(3, preserve=0)
    delta = torch.randn(8, 6, dtype=torch.float64)
    factor = 1 + 0.1 / (20 * 8)
    official = objective(problem, delta, penalty=1e-3, mse=0.1).total
    expected = objective(problem, delta).total * factor + 1e-3 * delta.norm()
    assert math.isclose(float(official), float(expected), rel_tol=1e-12)
    found = make_method("loraclr:exact", importance=(factor,) * 3).solve(problem)
    assert math.isclose(found.diagnostics["objective"], float(objective(problem, found.delta(), penalty=1e-3, mse=0.1).total), rel_tol=1e-9)


# The hinge ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["target", "prediction"])
@pytest.mark.parametrize("distance", ["frobenius", "rms"])
def test_hinge_and_its_gradient_are_those_of_autograd(anchor, distance):
    problem = make_problem(3)
    delta = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    margin = 60.0 if distance == "frobenius" else 14.0
    with_hinge = objective(problem, delta, margin=margin, anchor=anchor, distance=distance)
    hinge = with_hinge.total - objective(problem, delta, anchor=anchor, distance=distance).total
    (gradient,) = torch.autograd.grad(hinge, delta)
    contrast = Contrast.of(problem, margin=margin, mode="absolute", anchor=anchor, space="output", distance=distance)
    value, found, table = contrast.value_and_gradient(EYE, delta.detach())
    assert value > 0 and len(contrast.active(table)) == int((with_hinge.negative < margin).sum())
    assert math.isclose(value, float(hinge.detach()), rel_tol=1e-9)
    assert relative(found, gradient) < 1e-9


def test_anchors_are_each_other_transposed():
    problem = make_problem(3)
    delta = torch.randn(8, 6, dtype=torch.float64)
    tables = [
        Contrast.of(problem, margin=0.5, mode="absolute", anchor=anchor, space="output", distance="frobenius").distances(EYE, delta)
        for anchor in ("target", "prediction")
    ]
    assert torch.equal(*tables)
    for anchor, axis in (("target", 1), ("prediction", 0)):
        assert torch.allclose(objective(problem, delta, anchor=anchor).negative, tables[0].amin(axis))
    x, w = features(problem), problem.weight()
    assert math.isclose(float(tables[0][0, 2]), float((x[0] @ (w + problem.delta(0)).T - x[2] @ (w + delta).T).norm()), rel_tol=1e-12)


def test_relative_margin_does_not_see_the_scale_of_the_features():
    problem = make_problem(3)
    scaled = make_problem(3, features=[x * 7 for x in features(problem)])
    scaled = replace(problem, statistics=scaled.statistics)
    delta = torch.randn(8, 6, dtype=torch.float64)
    made = [Contrast.of(p, margin=1.5, mode="relative", anchor="target", space="delta", distance="rms") for p in (problem, scaled)]
    one, seven = (contrast.value_and_gradient(EYE, delta) for contrast in made)
    assert len(made[0].active(one[2])) == len(made[1].active(seven[2])) > 0
    assert math.isclose(one[0] * 49, seven[0], rel_tol=1e-12)


def test_margin_zero_is_no_hinge_and_needs_no_sample():
    problem = make_problem(3)
    bare = replace(problem, base=None, statistics=LayerStats(NAME, problem.statistics.fit, preserve=problem.statistics.preserve))
    solution = Loraclr(margin=0.0).solve(bare)
    assert "no hinge" in solution.diagnostics["certificate"] and "hinge_active" not in solution.diagnostics
    assert torch.equal(solution.delta(), Loraclr(margin=1e-9).solve(problem).delta())
    with pytest.raises(MergeError, match=r"no paired rows of c0.*margin=0"):
        Loraclr().solve(bare)
    bare = replace(problem, base=None)
    with pytest.raises(MergeError, match="space='delta'"):
        Loraclr().solve(bare)
    Loraclr(space="delta").solve(bare)


def test_a_part_of_the_rows_certifies_sums_but_not_means():
    problem = make_problem(3, rows=40)
    part = LayerStats(
        NAME, problem.statistics.fit, {}, problem.statistics.preserve, {n: x[:10] for n, x in problem.statistics.sample.items()}
    )
    partly = replace(problem, statistics=part)
    text = Loraclr().solve(partly).diagnostics["certificate"]
    assert text.startswith("global optimum of J on all collected rows: closest negative >= ")
    text = Loraclr(margin=1.0, distance="rms").solve(partly).diagnostics["certificate"]
    assert text.startswith("global optimum of J on all collected rows: closest negative >= ")
    text = Loraclr(margin=1e6).solve(partly).diagnostics
    assert text["certificate"].startswith("undecided: closest negative >= ") and "hinge_active" not in text
    bound = float(Loraclr(distance="rms").solve(partly).diagnostics["closest_negative"])  # half of what the ten rows show
    method = Loraclr(margin=1.5 * bound, distance="rms")
    assert "all collected rows, with the hinge on 10 paired ones" in method.solve(partly).diagnostics["certificate"]
    text = Loraclr(margin=0.1, margin_mode="relative").solve(partly).diagnostics["certificate"]
    assert "all collected rows, with the hinge on 10 paired ones" in text
    text = Loraclr(margin=0.1, margin_mode="relative").solve(problem).diagnostics["certificate"]
    assert text.startswith("global optimum of J on all collected rows: closest negative = ")


@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("anchor", ["target", "prediction"])
def test_an_active_hinge_is_descended_within_the_span(anchor, penalty):
    problem = make_problem(3, out=12, shared=4.0)
    settings = {"ridge": 0.01, "preservation": 0.0, "normalise": False, "penalty": penalty, "anchor": anchor}
    margin = 1.3 * float(Loraclr(**settings).solve(problem).diagnostics["closest_negative"])
    start = Loraclr(**settings, margin=0.0).solve(problem).delta()
    solution = Loraclr(**settings, margin=margin, iterations=300).solve(problem)
    mu = Quadratic.of(problem, ridge=0.01).mu

    def loss(d):
        return objective(problem, d, penalty=penalty, margin=margin, anchor=anchor).total + mu / 3 * d.square().sum()

    assert solution.status == "refined" and solution.diagnostics["certificate"].startswith("none: the hinge is active")
    assert loss(solution.delta()) < loss(start)
    assert math.isclose(solution.diagnostics["objective"], float(loss(solution.delta())), rel_tol=1e-9)
    b = torch.linalg.qr(torch.cat([problem.factors[i][0] for i in range(3)], 1))[0]
    assert solution.up.shape == (12, 6) and relative(b @ b.T @ solution.delta(), solution.delta()) < 1e-10
    inside = descend(lambda v: loss(b @ v), b.T @ solution.delta())  # nothing nearby in the span is better
    assert float(loss(b @ inside)) > float(loss(solution.delta())) * (1 - 1e-4)


def test_contrastive_does_separate():
    problem = make_problem(3, shared=0.1, base=torch.zeros(8, 6, dtype=torch.float64))
    plain, apart = Loraclr(ridge=1.0).solve(problem), make_method("loraclr:contrastive", margin=0.9, ridge=1.0).solve(problem)
    table = Contrast.of(problem, margin=0.9, mode="relative", anchor="target", space="output", distance="rms")
    assert table.value_and_gradient(EYE, plain.delta())[0] > table.value_and_gradient(EYE, apart.delta())[0] > 0
    assert apart.diagnostics["hinge_active"] > 0


# The reference --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_reference_never_returns_worse_than_the_base(preset):
    problem = make_problem(3)
    for steps in (1, 50):
        solution = make_method(f"loraclr-reference:{preset}", steps=steps).solve(problem)
        notes = solution.diagnostics
        assert notes["best_loss"] <= notes["first_loss"] and notes["best_step"] == steps  # the last iterate counts too
        recomputed = objective(problem, solution.delta().double(), penalty=1e-3, margin=0.5, mse=0.1 if preset == "official" else 0.0).total
        assert math.isclose(notes["best_loss"], float(recomputed), rel_tol=1e-5)
    wild = make_method(f"loraclr-reference:{preset}", optimiser="gd", learning_rate=10.0).solve(problem)
    assert wild.diagnostics["best_step"] == 0 and not wild.delta().any() and "learning_rate" in wild.advice


def test_reference_takes_adamw_steps():
    """The first AdamW step from 0 moves every entry by the learning rate against its gradient's sign."""
    problem = make_problem(2)
    solution = LoraclrReference(steps=1).solve(problem)
    start = torch.zeros(8, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(problem, start, penalty=1e-3, margin=0.5).total, start)
    assert torch.allclose(solution.delta().double(), -1e-4 * gradient.sign(), atol=1e-9)
    assert math.isclose(solution.diagnostics["data_gradient_over_lambda"], float(gradient.norm()) / 1e-3, rel_tol=1e-5)
    descended = LoraclrReference(steps=1, optimiser="gd", learning_rate=1e-6).solve(problem)
    assert relative(descended.delta().double(), -1e-6 * gradient) < 1e-5


def test_adam_destroys_the_rank_that_descent_keeps():
    """Three adapters of rank 2: optimum and plain descent stay in the span of their six columns, AdamW's steps by sign fill the layer."""
    problem = make_problem(3, out=12, width=10, rank=2)

    def rank(method):
        values = torch.linalg.svdvals(method.solve(problem).delta().double())
        return int((values > 1e-4 * values[0]).sum())

    assert rank(LoraclrReference()) == rank(make_method("loraclr-reference:official")) == 10
    assert rank(LoraclrReference(optimiser="gd", learning_rate=1e-3)) == rank(PLAIN) == rank(make_method("gradient-fusion")) == 6


def test_reference_distances_by_hand():
    problem = make_problem(2, rows=3)
    delta = torch.randn(8, 6, dtype=torch.float64)
    x, w = features(problem), problem.weight()
    own = [a @ (delta - d).T for a, d in zip(x, problem.deltas(), strict=True)]
    other = x[0] @ (w + problem.delta(0)).T - x[1] @ (w + delta).T
    for distance, norm in (
        ("frobenius", lambda e: e.norm()),
        ("rms", lambda e: e.norm() / 3**0.5),
        ("token", lambda e: e.norm(dim=1).mean()),
    ):
        loss = objective(problem, delta, distance=distance)
        assert torch.allclose(loss.positive, torch.stack([norm(e) for e in own]))
        assert torch.isclose(loss.negative[0], norm(other))


def test_half_precision_distances_overflow_as_in_the_released_code():
    """F 22: beyond an inner product of 65504 the positive distance is 1e-6 and its gradient 0; ours is unaffected."""
    torch.manual_seed(0)
    weight, rows = torch.eye(64), torch.randn(1, 1100, 64)  # 70400 entries of variance 1
    targets = rows + 0.05 * torch.randn_like(rows)
    delta = torch.zeros(64, 64, requires_grad=True)
    broken = LoraclrReference(fp16_cross=True, penalty=0.0).loss(delta, rows, weight, targets)
    assert math.isclose(float(broken.positive.detach()), 1e-6, rel_tol=1e-3)
    (gradient,) = torch.autograd.grad(broken.total, delta)
    assert not gradient.any()
    sound = LoraclrReference(penalty=0.0).loss(delta, rows, weight, targets)
    assert math.isclose(float(sound.positive.detach()), float((targets - rows).norm()), rel_tol=1e-5)
    small = LoraclrReference(fp16_cross=True).loss(delta, rows[:, :300], weight, targets[:, :300])
    assert math.isclose(float(small.positive.detach()), float((targets - rows)[:, :300].norm()), rel_tol=0.2)


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_dead_contrast_leaves_the_base_iff_the_penalty_outweighs_the_rest(share):
    """What the released code is left with where its distances overflow: 0.1 MSE + lambda ||D||, at its optimum."""
    problem = make_problem(3, preserve=0)
    factor = 0.1 / (20 * 8)
    pull = 2 / 3 * factor * float(sum(d @ x.T @ x for d, x in zip(problem.deltas(), features(problem), strict=True)).norm())
    solution = make_method("loraclr:exact", importance=(factor,) * 3, penalty=share * pull, margin=0.0).solve(problem)
    assert (solution.status == "zero") == (share > 1)
    slow = LoraclrReference(margin=0.0, penalty=share * pull / factor, steps=5).solve(problem)
    assert (float(slow.diagnostics["data_gradient_over_lambda"]) < 1) == (share > 1) == ("outweighs" in slow.advice)


# Errors, receipts ------------------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named():
    problem = make_problem(3)

    def having(**changes):
        return replace(problem, **changes)

    with pytest.raises(MergeError, match="no feature rows of c0, c1, c2; collect"):
        PLAIN.solve(having(statistics=None))
    fit = {**problem.statistics.fit, "c1": Moments.empty(6)}
    with pytest.raises(MergeError, match="no feature rows of c1;"):
        PLAIN.solve(having(statistics=LayerStats(NAME, fit)))
    with pytest.raises(MergeError, match="set preservation=0"):
        Loraclr(margin=0.0).solve(having(statistics=LayerStats(NAME, problem.statistics.fit)))
    with pytest.raises(UsageError, match="2 numbers for 3 concepts"):
        Loraclr(importance=(1.0, 2.0)).solve(problem)
    sample = {**problem.statistics.sample, "c1": problem.statistics.sample["c1"][:4]}
    with pytest.raises(MergeError, match=r"not paired: \[20, 4, 20\]"):
        Loraclr().solve(having(statistics=LayerStats(NAME, problem.statistics.fit, {}, problem.statistics.preserve, sample)))
    with pytest.raises(MergeError, match="width 6 for 5 inputs"):
        PLAIN.solve(having(shape=(8, 5)))
    bad = LoraLayer(NAME, torch.full((2, 6), torch.nan), torch.ones(8, 2))
    with pytest.raises(NumericalError, match="NaN"):
        LoraclrReference().solve(having(layers=(bad, None, None)))


def test_residuals_are_those_of_the_features():
    problem = make_problem(2)
    delta = torch.randn(8, 6, dtype=torch.float64)
    found = residuals(problem, delta)
    x, d = features(problem)[1], problem.delta(1)
    assert set(found) == {"fit/c0", "fit/c1", "held_out/c0", "held_out/c1"}
    assert math.isclose(found["fit/c1"], float((x @ (delta - d).T).norm() / (x @ d.T).norm()), rel_tol=1e-10)
    assert residuals(problem, problem.delta(0))["fit/c0"] < 1e-7
    assert math.isclose(residuals(problem, torch.zeros_like(delta))["held_out/c0"], 1.0)
    absent = replace(problem, layers=(None, problem.layers[1]))
    assert set(residuals(absent, delta)) == {"fit/c1", "held_out/c1"}


def test_growth_is_called_out():
    """Two concepts that differ only along a faint direction: to tell them apart the delta must be huge there."""
    common = torch.randn(4, 6, dtype=torch.float64)
    problem = make_problem(2, rows=1, features=[common[:1], common[:1] + 0.01 * common[1:2]], preserve=0)
    solution = PLAIN.solve(problem)
    assert solution.diagnostics["growth"] > 10 and "raise `ridge`" in solution.advice
    assert not Loraclr(preservation=0.0, margin=0.0, ridge=0.1).solve(problem).advice


@pytest.mark.parametrize("rows", [20, 1])
def test_the_metric_of_a_solution_cuts_to_the_optimum_at_that_rank(rows):
    """J(D) - J(D*) is ||(D - D*) M^(1/2)||^2 for every D, so the nearest of rank r in M is the best of rank r in J."""
    problem = make_problem(3, rows=rows, rank=1)
    quadratic = Quadratic.of(problem, ridge=0.1, preservation=0.3, normalise=True)
    solution = make_method("loraclr", ridge=0.1, preservation=0.3, margin=0.0).solve(problem)
    cut = linalg.truncate_aware(solution.up, solution.down, 1, metric=solution.metric())
    plain = linalg.truncate(solution.up, solution.down, 1)

    def above(delta):
        return quadratic.value_and_gradient(quadratic.up.T @ delta)[0] - quadratic.value_and_gradient(quadratic.up.T @ solution.delta())[0]

    own = relative(cut.up @ cut.down, solution.delta())
    assert own > 1e-3
    gap = (cut.up @ cut.down) - solution.delta()
    assert above(cut.up @ cut.down) == pytest.approx(float(((gap @ solution.metric()) * gap).sum()), rel=1e-9)
    assert above(cut.up @ cut.down) < above(plain.up @ plain.down)


def test_svd_truncates_and_says_so():
    problem = make_problem(3, out=12, width=10, rank=2)
    total = sum(problem.deltas())
    values = torch.linalg.svdvals(total)
    solution = make_method("svd", rank=3).solve(problem)
    assert solution.up.shape[1] == 3 and solution.status == "truncated"
    assert math.isclose(solution.lost, float(values[3:].norm() / values.norm()), rel_tol=1e-9)
    assert relative(make_method("svd", rank=6).solve(problem).delta(), total) < 1e-13  # F 9
    assert make_method("svd").solve(problem).up.shape[1] == 2


def test_weights_and_scale_in_the_linear_methods():
    problem = make_problem(3, weights=[1.0, -0.5, 2.0])
    total = sum(w * layer.delta(torch.float64) for w, layer in zip((1.0, -0.5, 2.0), problem.layers, strict=True))
    assert relative(make_method("sum", scale=0.3).solve(problem).delta(), 0.3 * total) < 1e-13
    assert relative(make_method("average").solve(problem).delta(), total / 3) < 1e-13


@pytest.mark.parametrize("rank", [2, 6])
def test_dense_inputs(rank):
    """A dense change of low rank is factored, one of full rank makes the result as wide as the layer."""
    change = torch.randn(8, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64)
    lora = make_problem(2).layers[1]
    problem = make_problem(2, layers=[DenseLayer(NAME, change), lora])
    x, e = stacked(problem)
    solution = PLAIN.solve(problem)
    assert relative(solution.delta(), (torch.linalg.pinv(x) @ e).T) < 1e-11
    assert solution.up.shape[1] == (4 if rank == 2 else 6)
    assert relative(make_method("sum").solve(problem).delta(), change + lora.delta(torch.float64)) < 1e-13


# ---- what siblings share


@pytest.mark.parametrize("rows", [4, 40], ids=["dual", "primal"])
@pytest.mark.parametrize("settings", [{}, {"prior": "mean"}, {"preservation": 0.0}, {"choose": "held_out"}, {"penalty": 0.1}])
def test_siblings_are_solved_as_alone_and_their_sums_are_made_once(rows, settings, monkeypatch):
    """Layers that saw the very same rows, with adapters of their own; then one that saw others."""
    one, other = (make_problem(2, rows=rows, width=30, preserve=8, seed=seed) for seed in (0, 1))
    two = replace(one, layers=make_problem(2, rows=rows, width=30, seed=5).layers)
    method, siblings, made = Loraclr(**settings), Siblings(), []
    alone = [method.solve(problem).delta() for problem in (one, two, other, one)]
    add = _Sums._add
    monkeypatch.setattr(_Sums, "_add", lambda self, moments: made.append(moments.count) or add(self, moments))
    counts, found = [], []
    for problem in (one, two, other, one):
        made.clear()
        found.append(method.solve(replace(problem, siblings=siblings)).delta())
        counts.append(len(made))
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    if "choose" not in settings:
        assert counts[0] == counts[2] == counts[3] == 2 + (settings.get("preservation", 1.0) > 0) and counts[1] == 0


def test_a_solution_that_waits_holds_no_sums():
    """As many wait as a stage has layers, each with Grams of its inputs; the metric of a cut is made anew, and is the same."""
    problem = make_problem(3, rows=40)
    assert problem.statistics is not None
    solution = Loraclr(certificate="exact", margin=0.5, margin_mode="relative").solve(problem)
    seen = [*problem.statistics.fit.values(), problem.statistics.preserve]
    (sums,) = map(weakref.ref, problem.siblings.of(seen).values())
    assert solution.claim is not None and sums() is not None
    problem.siblings.of([])  # as the next layer does
    gc.collect()
    assert sums() is None
    assert torch.allclose(solution.metric(), Loraclr(margin=0.0).solve(problem).metric(), rtol=1e-12)
