"""What every merge method owes its users, whatever its formula: each law over all methods."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from problems import NAME, features, make_problem, relative

from loraclr.adapter import DenseLayer, LoraLayer
from loraclr.methods import METHODS, AdapterMethod, ModelProblem, make_method

SHRUNK = {"preservation": 0.0, "ridge": 1e-11}  # without preservation and ridge, which trade faithfulness for safety on purpose
LONG = {"steps": 400, "learning_rate": 3e-2, "margin": 0.0, "penalty": 0.0}
FAITHFUL = {  # method -> hyper-parameters in which it reproduces what it is given, and how nearly
    "loraclr": (SHRUNK, 1e-8),
    "loraclr:exact": ({"penalty": 1e-8}, 1e-8),
    "loraclr:contrastive": (SHRUNK, 1e-8),
    "loraclr-reference": (LONG, 1e-2),
    "loraclr-reference:official": (LONG, 1e-2),
    "average": ({}, 1e-13),
    "gradient-fusion": ({}, 1e-4),
    "regmean": ({"off_diagonal": 1.0}, 1e-8),
    "custom-diffusion": ({"ridge": 1e-9}, 1e-8),
    "orthogonal": ({}, 1e-13),
    "sum": ({}, 1e-13),
    "svd": ({}, 1e-13),
    "ties": ({"density": 1.0}, 1e-13),
    "dare-linear": ({"density": 1.0}, 1e-13),
    "dare-ties": ({"density": 1.0}, 1e-13),
    "magnitude-prune": ({"density": 1.0}, 1e-13),
    "knots": ({"density": 1.0}, 1e-13),
    "linear": ({}, 1e-13),
    "tsv": ({}, 1e-13),
    "core-space": ({"density": 1.0}, 1e-13),
}
MODELS = ("ziplora", "lorahub")  # solve all layers at once and stop early: they bring nobody back (but see test_methods_models.py)
TOKENS = ("pplus",)  # leaves weights alone on purpose: a law of its own
LEVELLED = ("iso-c",)  # changes even one adapter on purpose: laws of its own in test_methods_spectral.py
DEFAULT = (*FAITHFUL, *MODELS, *LEVELLED)
ORDERED = tuple(name for name in DEFAULT if name != "lorahub")  # which local optimum a search finds may depend on the order
ZEROED = tuple(name for name in DEFAULT if name != "ziplora")  # a change of zero has columns, which others are kept apart from
# In float32: a loss that is flat within sqrt(eps) of the optimum, and steps and searches that follow its rounding.
SINGLE = {"loraclr-reference": 1e-4, "gradient-fusion": 1e-3, "ziplora": 1e-3, "lorahub": 1e-2}
COPIES = {  # the weights under which N copies are one: 1 where not said
    **dict.fromkeys(("sum", "svd", "orthogonal", "dare-linear", "magnitude-prune"), 1 / 3),
    "linear": 1 / 9,  # N factors times N factors
}


def solve(method, problem):
    """For a method that judges whole models, one of this layer, whose predictions are the layer's change."""
    if not isinstance(method, AdapterMethod):
        return method.solve(problem)
    wanted = [delta.float() for delta in problem.deltas()]

    def loss(changes, draw):
        return torch.stack([(changes[NAME] - own).square().mean() for own in wanted]).mean()

    return method.solve_model(ModelProblem(problem.concepts, {NAME: problem}, loss))[NAME]


def near(name, tolerance):
    return SINGLE.get(name.partition(":")[0], tolerance)


def test_no_method_is_above_the_law():
    assert {name.partition(":")[0] for name in (*FAITHFUL, *TOKENS, *MODELS, *LEVELLED)} == set(METHODS)
    assert all(isinstance(make_method(name), AdapterMethod) for name in MODELS)


def test_tokens_alone_leave_the_weights_as_they_are():
    problem = make_problem(3)
    solution = make_method("pplus").solve(problem)
    assert not solution.delta().any() and solution.delta().shape == (8, 6)
    assert "c0, c1, c2 is left out" in solution.advice


def faithful(name, **changes):
    parameters, tolerance = FAITHFUL[name]
    return make_method(name, **{**parameters, **changes}), tolerance


@pytest.mark.parametrize("name", FAITHFUL)
def test_one_adapter_comes_back(name):
    problem = make_problem(1, rows=40)
    method, tolerance = faithful(name)
    assert relative(method.solve(problem).delta().double(), problem.delta(0)) < tolerance


@pytest.mark.parametrize("ridge", [1e-6, 1.0, 1e6])
def test_one_adapter_comes_back_with_the_mean_prior_at_any_ridge(ridge):
    problem = make_problem(1)
    solution = make_method("loraclr", prior="mean", ridge=ridge, preservation=0.0).solve(problem)
    assert relative(solution.delta(), problem.delta(0)) < 1e-12
    three = make_problem(3)
    far = make_method("loraclr", prior="mean", ridge=1e9, preservation=0.0, margin=0.0).solve(three)
    assert relative(far.delta(), torch.stack(three.deltas()).mean(0)) < 1e-8


@pytest.mark.parametrize("name", FAITHFUL)
def test_one_adapter_comes_back_on_few_rows(name):
    """With fewer rows than features it comes back on the collected features only, where the method looks at features."""
    method, tolerance = faithful(name)
    problem = make_problem(1, rows=3, preserve=30 if "preserve" in method.needs else 0)
    x = features(problem)[0]
    delta = method.solve(problem).delta().double()
    assert relative(x @ delta.T, x @ problem.delta(0).T) < max(tolerance, 1e-6)


@pytest.mark.parametrize("name", FAITHFUL)
def test_copies_are_one(name):
    """Weights summing to 1 in the sums, weights of 1 in means and least squares. A fixed margin wants copies apart: no hinge."""
    one = make_problem(1, rows=40)
    weights = [COPIES.get(name, 1.0)] * 3
    copies = make_problem(3, features=features(one) * 3, layers=one.layers * 3, weights=weights, base=one.base)
    method, tolerance = faithful(name, **({"margin": 0.0} if name in ("loraclr", "loraclr:exact") else {}))
    assert relative(method.solve(copies).delta().double(), one.delta(0)) < tolerance


@pytest.mark.parametrize("name", ORDERED)
def test_order_is_irrelevant(name):
    problem = make_problem(3)
    expected = solve(make_method(name), problem).delta()
    for order in itertools.permutations(range(3)):
        shuffled = replace(problem, concepts=tuple(problem.concepts[i] for i in order), layers=tuple(problem.layers[i] for i in order))
        found = solve(make_method(name), shuffled).delta()
        assert relative(found, expected) < near(name, 1e-8)


@pytest.mark.parametrize("name", ZEROED)
def test_a_layer_that_an_adapter_lacks_is_a_change_of_zero(name):
    problem = make_problem(3)
    absent = replace(problem, layers=(problem.layers[0], None, None))
    zero = LoraLayer(NAME, torch.zeros(2, 6), torch.zeros(8, 2))
    explicit = replace(problem, layers=(problem.layers[0], zero, zero))
    found = solve(make_method(name), absent).delta()
    assert relative(found, solve(make_method(name), explicit).delta()) < near(name, 1e-9)
    assert float(found.norm()) > 0
    share = {"average": 1 / 3, "sum": 1.0, "svd": 1.0, "orthogonal": 1.0, "linear": 1.0}.get(name)
    if share is not None:
        assert relative(found, problem.delta(0) * share) < 1e-12


IDLE = ("sum", "orthogonal", "svd", "ties", "dare-linear", "dare-ties", "magnitude-prune", "knots", "linear", "iso-c", "tsv", "core-space")


@pytest.mark.parametrize("name", IDLE)
def test_an_adapter_that_does_nothing_changes_nothing(name):
    """Without features nothing is known of its concept. Only the mean counts it."""
    problem = make_problem(3)
    idle = LoraLayer(NAME, torch.randn(2, 6), torch.zeros(8, 2))
    more = replace(problem, concepts=(*problem.concepts, "idle"), layers=(*problem.layers, idle), weights=(*problem.weights, 1.0))
    if name == "linear":  # its `down` is added to the others' all the same
        assert relative(solve(make_method(name), more).delta(), solve(make_method(name), problem).delta()) > 0.1
    else:
        assert relative(solve(make_method(name), more).delta(), solve(make_method(name), problem).delta()) < 1e-12
    average = make_method("average")
    assert relative(average.solve(more).delta(), average.solve(problem).delta() * 3 / 4) < 1e-13


@pytest.mark.parametrize("name", [name for name in DEFAULT if name != "linear"])
def test_scale_and_weight_are_folded_once(name):
    """Not in `linear`, whose answer depends on where in the factors a scale stands: see test_methods_practice.py."""
    problem = make_problem(2, weights=[1.5, 1.0])
    a, b = problem.layers
    folded = replace(problem, layers=(LoraLayer(NAME, a.down, a.up * a.scale * 1.5), LoraLayer(NAME, a.down * 0 + b.down * b.scale, b.up)))
    folded = replace(folded, weights=(1.0, 1.0))
    found, expected = (solve(make_method(name), p).delta() for p in (problem, folded))
    assert relative(found, expected) < near(name, 1e-11)


@pytest.mark.parametrize("name", [name for name in DEFAULT if name != "linear"])
def test_a_dense_layer_is_its_lora(name):
    problem = make_problem(2)
    dense = replace(problem, layers=(DenseLayer(NAME, problem.layers[0].delta(torch.float64)), problem.layers[1]))
    found, expected = (solve(make_method(name), p).delta() for p in (dense, problem))
    assert relative(found, expected) < near(name, 1e-10)


@pytest.mark.parametrize("name", DEFAULT)
def test_a_convolution_is_linear_on_its_flattened_kernel(name):
    problem = make_problem(2, width=12)
    kernels = tuple(LoraLayer(NAME, layer.down.view(2, 3, 2, 2), layer.up.view(8, 2, 1, 1), layer.scale) for layer in problem.layers)
    convolution = replace(problem, shape=(8, 3, 2, 2), layers=kernels, base=problem.base.view(8, 3, 2, 2))
    found, expected = (solve(make_method(name), p).delta() for p in (convolution, problem))
    assert found.shape == (8, 12)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", DEFAULT)
def test_half_precision_files_give_the_same_merge(name):
    problem = make_problem(3)
    half = replace(problem, layers=tuple(LoraLayer(NAME, a.down.half(), a.up.half(), a.scale) for a in problem.layers))
    found, expected = (solve(make_method(name), p).delta() for p in (half, problem))
    assert relative(found, expected) < 3e-3


@pytest.mark.parametrize("name", DEFAULT)
def test_the_same_input_gives_the_same_bits_and_is_left_alone(name):
    problem = make_problem(3)
    before = [(layer.up.clone(), layer.down.clone()) for layer in problem.layers]
    gram = problem.statistics.fit["c0"].gram().clone()
    solutions = [solve(make_method(name), problem) for _ in range(2)]
    assert torch.equal(solutions[0].delta(), solutions[1].delta())
    assert solutions[0].diagnostics == solutions[1].diagnostics
    assert all(
        torch.equal(layer.up, up) and torch.equal(layer.down, down) for layer, (up, down) in zip(problem.layers, before, strict=True)
    )
    assert torch.equal(problem.statistics.fit["c0"].gram(), gram)


@pytest.mark.parametrize("name", DEFAULT)
def test_nothing_leaks_into_autograd(name):
    problem = make_problem(2)
    torch.set_grad_enabled(False)  # the collecting and merging stages run without gradients
    try:
        quiet = solve(make_method(name), problem)
    finally:
        torch.set_grad_enabled(True)
    loud = solve(make_method(name), problem)
    assert not loud.delta().requires_grad
    assert torch.equal(quiet.delta(), loud.delta())
