"""Strength and cross-talk: what they must be by their definition on features, and how layers add up."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from problems import features, make_problem

from loraclr import linalg
from loraclr.methods import cross_talk, make_method, residuals
from loraclr.methods.crosstalk import inner_products, residuals_of, tables_of
from loraclr.statistics import Moments


def of_delta(problem, delta):
    return cross_talk(problem, *linalg.identity_factors(delta))


def test_inner_products_are_those_of_the_outputs():
    problem = make_problem(3, rows=9)
    for rows in (torch.randn(9, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)):
        outputs = [rows @ delta.T for delta in problem.deltas()]
        table = inner_products(problem.factors, [Moments.of(rows)])[0]
        expected = torch.tensor([[float((a * b).sum()) for b in outputs] for a in outputs], dtype=torch.float64)
        assert torch.allclose(table, expected, rtol=1e-10)


def test_a_mixture_has_its_coefficients_on_everybodys_features():
    problem = make_problem(3)
    mix = 0.7 * problem.delta(0) - 0.2 * problem.delta(2)
    found = of_delta(problem, mix)
    assert torch.allclose(found.after, torch.tensor([[0.7, 0.0, -0.2]] * 3, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(found.heard, found.after.abs() * found.before)


def test_both_are_what_features_say():
    problem = make_problem(3)
    delta = torch.randn(8, 6, dtype=torch.float64)
    found = of_delta(problem, delta)
    for i, x in enumerate(features(problem)):
        outputs = torch.stack([(x @ d.T).flatten() for d in problem.deltas()], 1)
        assert torch.allclose(found.before[i], outputs.norm(dim=0) / outputs[:, i].norm(), rtol=1e-10)
        joint = torch.linalg.lstsq(outputs, (x @ delta.T).flatten()[:, None]).solution[:, 0]
        assert torch.allclose(found.after[i], joint, atol=1e-9)


def test_summary_by_hand():
    """Adapters of one entry each on a common unit input: the second is twice as loud, the merge takes half of each."""
    one, two = (torch.zeros(2, 1, dtype=torch.float64) for _ in range(2))
    one[0], two[1] = 1.0, 2.0
    problem = make_problem(2, out=2, width=1, rank=1, features=[torch.ones(1, 1, dtype=torch.float64)] * 2)
    layers = [replace(layer, up=up, down=torch.ones(1, 1, dtype=torch.float64), scale=1.0)
              for layer, up in zip(problem.layers, (one, two), strict=True)]  # fmt: skip
    found = of_delta(replace(problem, layers=tuple(layers)), (one + two) / 2)
    assert found.before.tolist() == [[1.0, 2.0], [0.5, 1.0]]
    assert torch.allclose(found.after, torch.full((2, 2), 0.5, dtype=torch.float64))
    assert found.summary() == pytest.approx({"strength": 0.5, "before": 1.25, "after": 0.625})


def test_the_sum_hears_everybody_fully_and_the_mean_a_share():
    problem = make_problem(3)
    for method, share in (("sum", 1.0), ("average", 1 / 3)):
        solution = make_method(method).solve(problem)
        found = cross_talk(problem, solution.up, solution.down)
        assert torch.allclose(found.after, torch.full((3, 3), share, dtype=torch.float64), atol=1e-9)
        assert found.summary()["after"] == pytest.approx(share * found.summary()["before"])


def test_layers_count_alike_however_large_their_features_are():
    a, b = make_problem(3, seed=1), make_problem(3, seed=2, width=7, out=5)
    loud = make_problem(3, seed=2, width=7, out=5, features=[x * 1000 for x in features(b)])
    problem_loud = replace(b, statistics=loud.statistics)
    parts = [of_delta(problem, sum(problem.deltas()) * 0.3 + problem.delta(1)) for problem in (a, b, problem_loud)]
    assert torch.allclose((parts[0] + parts[1]).after, (parts[0] + parts[2]).after, atol=1e-9)
    assert torch.allclose((parts[0] + parts[1]).before ** 2, (parts[0].before ** 2 + parts[1].before ** 2) / 2)
    assert torch.allclose((parts[0] + parts[1]).after, torch.tensor([[0.3, 1.3, 0.3]] * 3, dtype=torch.float64), atol=1e-9)


def test_the_order_of_concepts_only_reorders():
    problem = make_problem(3)
    delta = torch.randn(8, 6, dtype=torch.float64)
    found = of_delta(problem, delta)
    for order in map(list, itertools.permutations(range(3))):
        shuffled = replace(problem, concepts=tuple(problem.concepts[i] for i in order), layers=tuple(problem.layers[i] for i in order))
        assert torch.allclose(of_delta(shuffled, delta).after, found.after[order][:, order], atol=1e-9)


def test_a_concept_without_the_layer_says_nothing_there_and_is_not_heard():
    problem = make_problem(3)
    absent = replace(problem, layers=(problem.layers[0], None, problem.layers[2]))
    found = of_delta(absent, absent.delta(0))
    assert found.acting.tolist() == [True, False, True]
    assert found.after[1].isnan().all() and found.before[1].isnan().all()
    assert torch.allclose(found.after[0], torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), atol=1e-9)
    assert found.before[0, 1] == 0
    both = found + of_delta(problem, problem.delta(0))  # a layer where it acts makes up for it
    assert not both.after.isnan().any()


def test_adapters_that_are_alike_share_what_cannot_be_told_apart():
    problem = make_problem(2)
    twins = replace(problem, layers=(problem.layers[0], problem.layers[0]))
    assert torch.allclose(of_delta(twins, twins.delta(0)).after[0], torch.full((2,), 0.5, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("rows", [4, 40])
def test_residuals_are_in_the_same_tables(rows):
    problem = make_problem(3, rows=rows)
    problem = replace(problem, layers=(*problem.layers[:2], None))
    up, down = torch.randn(8, 3, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    found = residuals_of(tables_of(problem, up, down), problem.concepts, 3)
    assert {f"fit/{name}": pytest.approx(value, rel=1e-9) for name, value in found.items()} == residuals(problem, (up, down), ["fit"])
    assert set(found) == {"c0", "c1"}
