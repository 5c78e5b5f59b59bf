"""TIES, DARE, KnOTS, pruning and factor averaging: cases worked by hand, identities, and the same numbers as PEFT's functions."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import NAME, make_problem, relative

from loraclr.adapter import DenseLayer, LoraLayer
from loraclr.errors import MergeError
from loraclr.methods import LayerProblem, make_method
from loraclr.methods.knots import aligned
from loraclr.methods.sparse import agreeing_mean, drop_random, keep_largest


def problem_of(*rows: list[list[float]], weights=None, seed=0) -> LayerProblem:
    """Dense concepts, as they are."""
    deltas = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return LayerProblem(
        NAME,
        tuple(deltas[0].shape),
        tuple(f"c{index}" for index in range(len(deltas))),
        tuple(DenseLayer(NAME, delta) for delta in deltas),
        tuple(weights or [1.0] * len(deltas)),
        generator=torch.Generator().manual_seed(seed),
    )


def solve(name, problem, **parameters):
    return make_method(name, **parameters).solve(problem).delta()


# By hand -----------------------------------------------------------------------------------------------------------------------------


def test_ties_on_three_vectors_by_hand():
    """Density 1/2 of four entries keeps two of each; a column's sign is that of its kept sum; zeros do not count in the mean.

    kept:      [4, 0, -3, 0], [2, -6, 0, 0], [0, 5, 1, 0] of the three below
    sums:       6 -> +, -1 -> -, -2 -> -, 0 -> +
    """
    problem = problem_of([[4.0, 1, -3, 0.5]], [[2.0, -6, 1, -1]], [[0.5, 5, 1, -0.25]])
    problem = replace(problem, layers=(*problem.layers[:2], DenseLayer(NAME, torch.tensor([[0.5, 5, 1, -0.25]]))))
    assert solve("ties", problem, density=0.5).tolist() == [[3.0, -6.0, -3.0, 0.0]]
    assert solve("ties", problem, density=0.5, scale=2.0).tolist() == [[6.0, -12.0, -6.0, 0.0]]
    # frequency: one + and one - in the second and third columns: ties, which elect +
    assert solve("ties", problem, density=0.5, election="frequency").tolist() == [[3.0, 5.0, 1.0, 0.0]]


def test_a_tie_elects_plus_and_weights_count_in_the_election():
    problem = problem_of([[2.0, -1]], [[-2.0, -3]])
    assert solve("ties", problem, density=1.0).tolist() == [[2.0, -2.0]]
    assert solve("ties", replace(problem, weights=(1.0, 1.5)), density=1.0).tolist() == [[-3.0, -2.75]]


def test_trimming_by_hand():
    values = torch.tensor([[3.0, -1], [0.5, -2]])
    assert keep_largest(values, 0.5).tolist() == [[3.0, 0], [0, -2.0]]
    assert keep_largest(values, 0.99).tolist() == [[3.0, -1], [0, -2.0]], "int(3.96) are kept"
    assert keep_largest(values, 1.0) is values and not keep_largest(values, 0.2).any()
    assert keep_largest(torch.tensor([1.0, -1, 2, 0]), 0.5).tolist() == [1, -1, 2, 0], "of equals all stay: no order decides"


def test_pruning_by_hand():
    problem = problem_of([[4.0, 1, -3, 0]], [[1.0, -6, 2, 5]], weights=[1.0, 0.5])
    assert solve("magnitude-prune", problem, density=0.5).tolist() == [[4.0, -3, -3, 2.5]]


def test_dare_by_hand():
    """Each entry is 0 or its own over the density, and the second concept's mask is its own."""
    problem = problem_of([[1.0] * 256], [[100.0] * 256])
    change = solve("dare-linear", problem, density=0.25)
    assert set(change.flatten().tolist()) == {0.0, 4.0, 400.0, 404.0}
    ties = solve("dare-ties", problem, density=0.25)
    assert set(ties.flatten().tolist()) == {0.0, 4.0, 400.0, 202.0}
    assert torch.equal(ties == 0, change == 0) and torch.equal(ties == 202, change == 404)


def test_knots_by_hand():
    """Two adapters on one shared direction: [D_1 D_2] = e_1 [1 0 3 | 2 -1 0], so U = e_1 and the pieces are the rows themselves."""
    first, second = [[1.0, 0, 3], [0, 0, 0]], [[2.0, -1, 0], [0, 0, 0]]
    basis, pieces = aligned(problem_of(first, second))
    assert basis.shape == (2, 1) and torch.allclose(basis, torch.tensor([[1.0], [0]]).double(), atol=1e-15)
    assert torch.allclose(torch.cat(pieces), torch.tensor([[1.0, 0, 3], [2, -1, 0]]).double(), atol=1e-14)
    found = make_method("knots", density=1.0).solve(problem_of(first, second))
    assert torch.allclose(found.delta(), torch.tensor([[1.5, -1, 3], [0, 0, 0]]).double(), atol=1e-14)
    assert found.up.shape[1] == 1
    found = solve("knots", problem_of(first, second), density=1 / 3)  # one entry of three: 3 and 2
    assert torch.allclose(found, torch.tensor([[2.0, 0, 3], [0, 0, 0]]).double(), atol=1e-14)


def test_linear_by_hand():
    """(2 b_1 + 3 b_2)(2 a_1 + 3 a_2) with scales 4 and 9, ranks 1."""
    a = LoraLayer(NAME, torch.tensor([[1.0, 0]]), torch.tensor([[1.0], [0]]), 4.0)
    b = LoraLayer(NAME, torch.tensor([[0.0, 1]]), torch.tensor([[0.0], [1]]), 9.0)
    problem = LayerProblem(NAME, (2, 2), ("a", "b"), (a, b), (1.0, 1.0))
    assert torch.allclose(solve("linear", problem), torch.tensor([[4.0, 6], [6, 9]]).double())
    assert torch.allclose(solve("linear", replace(problem, weights=(1.0, -1.0))), torch.tensor([[4.0, -6], [6, -9]]).double())
    assert solve("sum", problem).tolist() == [[4, 0], [0, 9]]


# Identities --------------------------------------------------------------------------------------------------------------------------


def test_dare_is_the_sum_in_the_mean():
    problem = make_problem(3, out=5, width=4)
    exact, density, draws = solve("sum", problem), 0.4, 3000
    found = torch.zeros_like(exact)
    for seed in range(draws):
        found += solve("dare-linear", replace(problem, generator=torch.Generator().manual_seed(seed)), density=density) / draws
    deviation = ((1 / density - 1) * sum(d.square() for d in problem.deltas()) / draws).sqrt()
    assert ((found - exact).abs() < 5 * deviation).all()
    assert (found - exact).abs().max() > 0


def test_dare_masks_are_of_the_concept_and_the_seed():
    problem = make_problem(3)
    other = replace(problem, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(solve("dare-linear", problem), solve("dare-linear", other))
    spent = replace(problem, generator=torch.Generator().manual_seed(0))
    torch.rand(7, generator=spent.generator)
    assert torch.equal(solve("dare-linear", problem), solve("dare-linear", spent)), "earlier draws do not matter"
    alone = replace(problem, layers=(problem.layers[0], None, None))
    kept = solve("dare-linear", alone) != 0
    assert torch.equal(solve("dare-linear", alone)[kept], (problem.delta(0) * 2)[kept]) and 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("name", ["ties", "dare-linear", "dare-ties", "magnitude-prune", "knots"])
def test_density_bounds(name):
    problem = make_problem(2)
    assert not solve(name, problem, density=0.0).any()
    assert solve(name, problem, density=1.0).any()


def test_knots_with_a_plain_sum_is_the_sum():
    problem = make_problem(3, out=9, width=7, weights=[1.0, 0.5, -2.0])
    basis, pieces = aligned(problem)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-13)
    assert relative(basis @ sum(pieces), solve("sum", problem)) < 1e-13
    for piece, delta in zip(pieces, problem.deltas(), strict=True):
        assert relative(basis @ piece, delta) < 1e-13


@pytest.mark.parametrize(("out", "width", "rank"), [(9, 7, 2), (3, 8, 2), (8, 3, 2), (12, 11, 1)])
def test_knots_from_factors_is_knots_from_dense_deltas(out, width, rank):
    """By the definition: an SVD of the deltas side by side. Signs of singular vectors are free, and the entries' votes with them."""
    problem = make_problem(3, out=out, width=width, rank=rank, preserve=0)
    u, s, vh = torch.linalg.svd(torch.cat(problem.deltas(), 1), full_matrices=False)
    keep = s > 1e-5
    u, pieces = u[:, keep], (s[keep, None] * vh[keep]).split(width, 1)
    merged = agreeing_mean((keep_largest(piece, 0.4) for piece in pieces), "total")
    found = make_method("knots", density=0.4).solve(problem)
    assert relative(found.delta(), u @ merged) < 1e-11
    assert int(keep.sum()) == min(3 * rank, out) and found.up.shape[1] == min(3 * rank, out, width)


def test_linear_is_not_the_sum_and_depends_on_how_a_delta_is_split():
    problem = make_problem(3, weights=[1.0, 2.0, 0.5])
    parts = [
        (math.sqrt(w * a.scale) * a.up.double(), math.sqrt(w * a.scale) * a.down.double())
        for a, w in zip(problem.layers, problem.weights, strict=True)
    ]
    extra = sum(parts[i][0] @ parts[j][1] for i in range(3) for j in range(3) if i != j)
    assert relative(solve("linear", problem) - solve("sum", problem), extra) < 1e-12
    a = problem.layers[0]
    moved = replace(problem, layers=(LoraLayer(NAME, a.down / 7, a.up * 7, a.scale), *problem.layers[1:]))
    assert relative(moved.delta(0), problem.delta(0)) < 1e-6
    assert relative(solve("linear", moved), solve("linear", problem)) > 0.5
    apart = [LoraLayer(NAME, torch.eye(6)[[i]] * (i + 1), torch.eye(8)[:, [i]]) for i in range(3)]
    assert relative(solve("linear", replace(problem, layers=tuple(apart))), solve("sum", replace(problem, layers=tuple(apart)))) > 0.5, (
        "even for orthogonal adapters"
    )


def test_linear_refuses_what_has_no_factors_to_add():
    problem = make_problem(2)
    a, b = problem.layers
    dense = DenseLayer(NAME, a.delta())
    with pytest.raises(MergeError, match=r"LoRAs of one rank, these are of ranks 1, 2; use `sum` or `svd`"):
        solve("linear", replace(problem, layers=(a, LoraLayer(NAME, b.down[:1], b.up[:, :1]))))
    with pytest.raises(MergeError, match=r"LoRAs of one rank, these are"):
        solve("linear", replace(problem, layers=(a, dense)))
    with pytest.raises(MergeError, match=r"with a dense one"):
        solve("linear", replace(problem, layers=(None, dense)))


# Beside PEFT -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft.utils.merge_utils")


@pytest.mark.parametrize("density", [0.1, 0.37, 0.9])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_ties_is_pefts(peft, density, election):
    problem = make_problem(5, out=16, width=12, weights=[1.0, 0.5, 2.0, 1.0, 3.0])
    expected = peft.ties(problem.deltas(), torch.ones(5, dtype=torch.float64), density, election)
    assert relative(solve("ties", problem, density=density, election=election), expected) < 1e-14
    weighted = peft.ties(make_problem(5, out=16, width=12).deltas(), torch.tensor(problem.weights).double(), density, election)
    assert (relative(weighted, expected) > 1e-3) == (election == "total"), "PEFT's weights come after the election"


@pytest.mark.parametrize("density", [0.1, 0.37, 0.9])
def test_pruning_is_pefts(peft, density):
    problem = make_problem(4, out=16, width=12, weights=[1.0, 0.5, 2.0, -1.0])
    unweighted = [make_problem(4, out=16, width=12).delta(index) for index in range(4)]
    expected = peft.magnitude_prune(unweighted, torch.tensor(problem.weights).double(), density)
    assert relative(solve("magnitude-prune", problem, density=density), expected) < 1e-14


def test_dare_is_pefts_on_the_same_masks(peft, monkeypatch):
    """PEFT draws from the global state; handed our masks, its answers are ours."""
    problem, density = make_problem(4, out=16, width=12), 0.3
    made = make_method("dare-linear", density=density)
    masks = []
    for index in range(4):
        others = tuple(layer if number == index else None for number, layer in enumerate(problem.layers))
        masks.append((made.solve(replace(problem, layers=others)).delta() != 0).double())
    ones = torch.ones(4, dtype=torch.float64)
    for name, function in (("dare-linear", peft.dare_linear), ("dare-ties", peft.dare_ties)):
        left = list(masks)
        monkeypatch.setattr(torch, "bernoulli", partial(_first_of, left))
        expected = function(problem.deltas(), ones, density)
        assert not left
        monkeypatch.undo()
        assert relative(solve(name, problem, density=density), expected) < 1e-14


def _first_of(masks, input):
    return masks.pop(0)


def test_drop_random_keeps_its_share():
    values = torch.ones(100_000, dtype=torch.float64)
    kept = drop_random(values, 0.3, torch.Generator().manual_seed(0))
    assert abs(float((kept != 0).double().mean()) - 0.3) < 0.01 and abs(float(kept.mean()) - 1) < 0.03


def test_whole_models_are_pefts(tmp_path):
    """`add_weighted_adapter` of PEFT on a real model, in all types that compute on deltas or are a stack of factors."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = torch.nn.Sequential(torch.nn.Linear(24, 32, bias=False))
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), adapter_name="x")
    for name in "yz":
        model.add_adapter(name, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    names, weights = ["x", "y", "z"], [1.0, 0.5, 2.0]
    for name in names:
        torch.nn.init.normal_(layer.lora_A[name].weight)
        torch.nn.init.normal_(layer.lora_B[name].weight)
    layers = tuple(
        LoraLayer(NAME, layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name]) for name in names
    )
    problem = LayerProblem(NAME, (32, 24), tuple(names), layers, tuple(weights), generator=torch.Generator().manual_seed(0))

    def theirs(kind, **settings):
        model.add_weighted_adapter(names, weights, f"{kind}-merged", combination_type=kind, **settings)
        return layer.get_delta_weight(f"{kind}-merged").detach().double()

    def cut(delta, rank):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        return u[:, :rank] * s[:rank] @ vh[:rank]

    assert relative(theirs("cat"), solve("concat", problem)) < 1e-6
    assert relative(theirs("linear"), solve("linear", problem)) < 1e-6
    assert relative(theirs("svd", svd_rank=4), solve("svd", problem, rank=4)) < 1e-5
    assert relative(theirs("magnitude_prune_svd", svd_rank=24, density=0.3), solve("magnitude-prune", problem, density=0.3)) < 1e-5
    one = replace(problem, weights=(1.0,) * 3)
    weights[:] = one.weights
    assert relative(theirs("ties_svd", svd_rank=5, density=0.3), cut(solve("ties", one, density=0.3), 5)) < 1e-5
    # without "_svd" PEFT votes on the factors, which is another thing altogether
    assert relative(theirs("ties", density=0.3), solve("ties", one, density=0.3)) > 0.5
