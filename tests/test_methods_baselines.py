"""Gradient fusion, RegMean, Custom Diffusion, Orthogonal Adaptation: cases worked by hand and the identities that join them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import NAME, features, make_problem, relative

from loraclr import linalg
from loraclr.adapter import LoraLayer
from loraclr.errors import MergeError, NumericalError
from loraclr.methods import make_method
from loraclr.methods.gradient_fusion import GradientFusion
from loraclr.statistics import LayerStats, Moments


def solve(name, problem, **parameters):
    return make_method(name, **parameters).solve(problem)


def stacked(problem):
    rows = features(problem)
    return torch.cat(rows), torch.cat([x @ d.T for x, d in zip(rows, problem.deltas(), strict=True)])


# RegMean and gradient fusion ---------------------------------------------------------------------------------------------------------


def test_regmean_by_hand():
    """Diagonal Grams: every input direction gets the mean by energy, whatever `off_diagonal`."""
    x0, x1 = torch.diag(torch.tensor([2.0, 1])).double(), torch.diag(torch.tensor([1.0, 3])).double()
    a, b = (LoraLayer(NAME, torch.tensor([row]), torch.tensor([[1.0], [0]])) for row in ([5.0, 10], [0.0, 20]))
    problem = make_problem(2, out=2, width=2, features=[x0, x1], layers=[a, b], preserve=0)
    expected = torch.tensor([[(4 * 5 + 0) / 5, (10 + 9 * 20) / 10], [0, 0]]).double()
    for share in (0.0, 0.9, 1.0):
        assert torch.allclose(solve("regmean", problem, off_diagonal=share).delta(), expected, atol=1e-12)


def test_gradient_fusion_sees_all_rows_of_every_concept():
    """The paired rows are the ends of all; where those are all, nothing changes to the last bit."""
    problem = make_problem(3, rows=40)
    whole = dict(zip(problem.concepts, features(problem), strict=True))
    same = replace(problem, statistics=replace(problem.statistics, rows=whole))
    assert torch.equal(solve("gradient-fusion", same).delta(), solve("gradient-fusion", problem).delta())
    more = {name: torch.cat([rows, torch.randn(5 * k, 6).double()]) for k, (name, rows) in enumerate(whole.items())}
    statistics = LayerStats(NAME, {name: Moments.of(rows) for name, rows in more.items()}, sample=whole, rows=more)
    found = solve("gradient-fusion", replace(problem, statistics=statistics))
    expected = solve("regmean", replace(problem, statistics=statistics), off_diagonal=1.0).delta()
    assert relative(found.delta(), expected) < 1e-3 and found.diagnostics["rows"] == 40 + 45 + 50


def test_regmean_with_diagonal_grams_is_the_mean_by_energy_and_in_between_its_formula():
    problem = make_problem(3, weights=[1.0, 0.5, 2.0])
    grams, deltas = [x.T @ x for x in features(problem)], problem.deltas()
    diagonals = [g.diagonal() for g in grams]
    by_energy = sum(d * g for d, g in zip(deltas, diagonals, strict=True)) / sum(diagonals)
    assert relative(solve("regmean", problem, off_diagonal=0.0).delta(), by_energy) < 1e-12
    lifted = [0.9 * g + 0.1 * torch.diag(g.diagonal()) for g in grams]
    expected = sum(d @ g for d, g in zip(deltas, lifted, strict=True)) @ torch.linalg.inv(sum(lifted))
    assert relative(solve("regmean", problem).delta(), expected) < 1e-11


@pytest.mark.parametrize("rows", [20, 2])
def test_regmean_is_the_stacked_least_squares_and_the_optimum_of_loraclr(rows):
    problem = make_problem(3, rows=rows, width=7, preserve=0)
    x, e = stacked(problem)
    expected = (torch.linalg.pinv(x) @ e).T
    found = solve("regmean", problem, off_diagonal=1.0)
    assert relative(found.delta(), expected) < 1e-11
    assert relative(solve("loraclr", problem, ridge=0.0, preservation=0.0, normalise=False).delta(), expected) < 1e-11
    assert torch.linalg.matrix_rank(found.delta()) <= 6


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_equal_features_give_the_average_and_orthogonal_ones_leave_each_alone(off_diagonal):
    x = torch.randn(20, 9, dtype=torch.float64)
    same = make_problem(3, width=9, features=[x] * 3)
    assert relative(solve("regmean", same, off_diagonal=off_diagonal).delta(), solve("average", same).delta()) < 1e-11
    apart = make_problem(3, width=9, features=[x[:, 3 * i : 3 * i + 3] @ torch.eye(9).double()[3 * i : 3 * i + 3] for i in range(3)])
    found = solve("regmean", apart, off_diagonal=off_diagonal).delta()
    for index, seen in enumerate(features(apart)):
        assert relative(seen @ found.T, seen @ apart.delta(index).T) < 1e-11


@pytest.mark.parametrize("rows", [20, 2])
def test_gradient_fusion_descends_to_the_least_squares_of_least_norm(rows):
    problem = make_problem(3, rows=rows, width=7, preserve=0, weights=[1.0, 0.5, 2.0])
    x, e = stacked(problem)
    solution = solve("gradient-fusion", problem)
    assert relative(solution.delta(), (torch.linalg.pinv(x) @ e).T) < 1e-3
    best = float((x @ solution.delta().T - e).square().mean())
    assert math.isclose(solution.diagnostics["first_loss"], float(e.square().mean()), rel_tol=1e-5)
    assert math.isclose(solution.diagnostics["best_loss"], best, rel_tol=1e-3, abs_tol=1e-12)
    assert solution.diagnostics["best_loss"] <= solution.diagnostics["first_loss"]
    assert torch.linalg.matrix_rank(solution.delta(), rtol=1e-6) <= 6


def test_gradient_fusion_in_the_span_is_gradient_fusion_on_the_whole_weight():
    """Mix-of-Show's own variables: the weight W + D of all outputs, starting at W. Stopped early, so that the path is compared."""
    problem = make_problem(3, out=12, width=9, rows=40)
    x, e = stacked(problem)
    weight = problem.weight().float()
    targets = (x @ problem.weight().T + e).float()
    whole = weight.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [whole], lr=1, max_iter=4, history_size=25, tolerance_grad=1e-16, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = torch.nn.functional.mse_loss(x.float() @ whole.T, targets)
        loss.backward()
        return loss

    optimiser.step(closure)
    found = solve("gradient-fusion", problem, steps=4).delta()
    theirs = (whole - weight).detach().double()
    assert relative(found, theirs) < 0.03, "torch takes the first trial step from the gradient's L1 norm, which a basis changes"
    losses = [float((x @ delta.T - e).square().mean()) for delta in (found, theirs)]
    assert math.isclose(*losses, rel_tol=0.02)
    assert relative(found, solve("gradient-fusion", problem).delta()) > 0.06, "four steps are not yet the optimum"


def test_gradient_fusion_takes_fewer_steps_in_spatial_layers():
    problem = make_problem(2, rows=30, width=9)
    for layer, steps in {NAME: 7, "text_encoder.encoder.layers.0.mlp.fc1": 7, "unet.mid_block.attn1.to_k": 2}.items():
        found = solve("gradient-fusion", replace(problem, layer=layer), steps=7, spatial_steps=2).delta()
        assert torch.equal(found, solve("gradient-fusion", problem, steps=steps).delta())


def test_gradient_fusion_does_not_descend_from_nan():
    with pytest.raises(NumericalError, match="the loss at the base is nan"):
        GradientFusion()._descend(torch.ones(2, 3), torch.full((2, 2), math.nan), 4, 5)


# Custom Diffusion --------------------------------------------------------------------------------------------------------------------


def few(concepts=3, *, width=12, rows=2, preserve=60, **settings):
    """Fewer constraints than inputs."""
    return make_problem(concepts, width=width, rows=rows, preserve=preserve, shared=0.0, **settings)


def test_custom_diffusion_by_hand():
    """One constraint t = (1, 1), captions of energy 1 and 3: the change goes 3 : 1 to the direction that captions use less."""
    layer = LoraLayer(NAME, torch.tensor([[4.0, 4]]), torch.tensor([[1.0]]))
    problem = make_problem(1, out=1, width=2, features=[torch.ones(1, 2).double()], layers=[layer], preserve=0)
    captions = Moments.of(torch.diag(torch.tensor([1.0, 3**0.5])))
    problem = replace(problem, statistics=replace(problem.statistics, preserve=captions))
    assert torch.allclose(solve("custom-diffusion", problem, ridge=0.0).delta(), torch.tensor([[6.0, 2]]).double(), atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_custom_diffusion_meets_its_constraints_with_the_least_change(ridge):
    """Identity of Lagrange: D T^T = V^T, and D C lies in the row span of T, so no change along the constraints costs less."""
    problem = few(weights=[1.0, 0.5, 2.0])
    t, e = stacked(problem)
    solution = solve("custom-diffusion", problem, ridge=ridge)
    delta, gram = solution.delta(), problem.statistics.preserve.gram()
    metric = gram + ridge * gram.diagonal().mean() * torch.eye(12).double()
    assert relative(t @ delta.T, e) < 1e-12
    pulled = delta @ metric
    assert relative(pulled @ torch.linalg.pinv(t) @ t, pulled) < 1e-12
    assert solution.diagnostics["constraints"] == 6 and solution.diagnostics["left_out"] == 0 and solution.advice == ""
    other = delta + torch.randn_like(delta) @ (torch.eye(12).double() - torch.linalg.pinv(t) @ t)  # meets them too
    assert relative(t @ other.T, e) < 1e-12
    assert float((delta @ metric * delta).sum()) < float((other @ metric * other).sum())
    assert torch.linalg.matrix_rank(delta) <= 6


def test_custom_diffusion_wants_nothing_where_adapters_do_nothing():
    problem = few(2)
    still = replace(problem, layers=tuple(LoraLayer(NAME, layer.down, layer.up * 0) for layer in problem.layers))
    assert not solve("custom-diffusion", still).delta().any()


def test_rows_in_common_bind_only_where_the_concepts_agree():
    """The begin mark is the same row for all: with different wishes it is left out, with equal ones it stays."""
    problem = few(3)
    mark = torch.randn(1, 12, dtype=torch.float64)
    common = few(3, features=[torch.cat([mark, x]) for x in features(problem)])
    common = replace(common, layers=problem.layers, statistics=replace(common.statistics, preserve=problem.statistics.preserve))
    solution = solve("custom-diffusion", common)
    assert solution.diagnostics["left_out"] == 3 and solution.diagnostics["unmet"] < 1e-9
    assert relative(solution.delta(), solve("custom-diffusion", problem).delta()) < 1e-9
    agreed = replace(common, layers=(problem.layers[0],) * 3)
    solution = solve("custom-diffusion", agreed)
    assert solution.diagnostics["left_out"] == 0 and relative(mark @ solution.delta().T, mark @ problem.delta(0).T) < 1e-9


def test_nearly_equal_words_blow_up_and_say_so():
    one = few(1, rows=2)
    x = features(one)[0]
    pair = few(2, features=[x, x + 1e-2 * torch.randn_like(x)])
    solution = solve("custom-diffusion", pair)
    assert solution.diagnostics["growth"] > 3 and "times the largest adapter's" in solution.advice


def test_more_constraints_than_inputs_are_met_in_the_least_squares_sense():
    problem = make_problem(3, width=6, rows=20)
    solution = solve("custom-diffusion", problem)
    assert relative(solution.delta(), solve("regmean", problem, off_diagonal=1.0).delta()) < 1e-9
    assert "contradict each other" in solution.advice and solution.diagnostics["unmet"] > 1e-3


def test_custom_diffusion_knows_only_keys_and_values():
    problem = few(3)
    for layer in ("unet.mid_block.attn2.to_q", "unet.mid_block.attn1.to_k", "text_encoder.encoder.layers.0.mlp.fc1"):
        other = replace(problem, layer=layer, statistics=LayerStats(layer, {}))
        assert torch.equal(solve("custom-diffusion", other).delta(), solve("average", problem).delta())
        untouched = solve("custom-diffusion", other, others="none")
        assert not untouched.delta().any() and untouched.status == "untouched" and untouched.advice
    bare = replace(problem, statistics=replace(problem.statistics, preserve=None))
    with pytest.raises(MergeError, match="no statistics of concept-free captions"):
        solve("custom-diffusion", bare)


# Orthogonal Adaptation ---------------------------------------------------------------------------------------------------------------


def drawn(rows: list[list[int]], *, width=16, out=8):
    """Adapters whose `down` are these rows of one orthogonal matrix, halved, as Orthogonal Adaptation trains them."""
    matrix = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    layers = [LoraLayer(NAME, matrix[torch.tensor(own)] / 2, torch.randn(out, len(own), dtype=torch.float64)) for own in rows]
    return make_problem(len(rows), width=width, out=out, layers=layers, preserve=0)


def test_disjoint_rows_leave_each_concept_its_own_inputs():
    problem = drawn([[0, 1, 2], [5, 9], [3, 4, 15]])
    solution = solve("orthogonal", problem)
    for index, (_, down) in enumerate(problem.factors):
        assert relative(solution.delta() @ down.T, problem.delta(index) @ down.T) < 1e-13
        assert torch.allclose(down @ down.T, torch.eye(len(down)).double() / 4, atol=1e-14)
    assert solution.diagnostics == {"shared_rows": 0, "largest_cosine": pytest.approx(0, abs=1e-13)} and not solution.advice


def test_shared_rows_are_named():
    solution = solve("orthogonal", drawn([[0, 1, 2], [2, 9], [1, 2, 15]]))
    assert solution.status == "shared" and solution.diagnostics["shared_rows"] == 4
    assert solution.diagnostics["largest_cosine"] == pytest.approx(1)
    assert "c0 and c1 share 1 rows of `down`; c0 and c2 share 2 rows of `down`; c1 and c2 share 1 rows" in solution.advice
    assert "retrain one with another `--set index=N` (another seed for rows=random)" in solution.advice
    half = drawn([[0, 1], [1, 2]])
    half = replace(half, layers=tuple(LoraLayer(NAME, -layer.down.half(), layer.up, 3.0) for layer in half.layers))
    assert solve("orthogonal", half).diagnostics["shared_rows"] == 1, "whatever sign, scale and precision"


def test_the_same_draw_shares_every_row():
    solution = solve("orthogonal", drawn([[3, 7, 11], [3, 7, 11]]))
    assert solution.diagnostics["shared_rows"] == 3 and solution.diagnostics["largest_cosine"] == pytest.approx(1)


def test_ordinary_adapters_are_summed_and_their_nearness_told():
    problem = make_problem(3, width=40, weights=[1.0, 0.5, -2.0])
    solution = solve("orthogonal", problem, scale=1.5)
    assert relative(solution.delta(), solve("sum", problem, scale=1.5).delta()) < 1e-15
    assert solution.status == "ok" and 0 < solution.diagnostics["largest_cosine"] < 1
    spans = [torch.linalg.qr(down.T)[0] for _, down in problem.factors]
    cosines = [float(torch.linalg.svdvals(spans[i].T @ spans[j])[0]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert solution.diagnostics["largest_cosine"] == pytest.approx(max(cosines))


def test_block_diagonal_by_hand():
    found = linalg.block_diagonal([torch.ones(1, 2), torch.zeros(0, 1), 2 * torch.ones(2, 1)])
    assert found.tolist() == [[1, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 2]]
