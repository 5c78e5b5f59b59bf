"""The rounds after the first: the merged model's inputs beside those of each adapter's own run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from concepts import SMALL, fingerprint, three
from problems import features, make_problem

from loraclr.collect import Concept
from loraclr.errors import FormatError, UsageError
from loraclr.merge import _problem, merge
from loraclr.methods import make_method
from loraclr.methods.loraclr import Loraclr
from loraclr.pipeline import Pipeline
from loraclr.refit import _in_order, refitted
from loraclr.statistics import Twin

SETTINGS = {"ridge": 1e-3, "preservation": 0.5, "margin": 0.0}


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


def test_equal_inputs_give_the_first_rounds_optimum():
    problem = make_problem(3)
    kept = problem.statistics.preserve
    twins = {name: Twin.of(x, x) for name, x in zip(problem.concepts, features(problem), strict=True)}
    again = Loraclr(**SETTINGS, rounds=2).refit(problem, twins, Twin(kept.count, kept.gram(), kept.gram()))
    assert torch.allclose(again.delta(), Loraclr(**SETTINGS).solve(problem).delta(), atol=1e-10)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("prior", ["zero", "mean"])
def test_the_gradient_of_what_is_written_in_the_docs_is_zero_in_the_adapters_span(normalise, prior):
    problem = make_problem(2)  # two of rank 2 in 8 outputs: a span of 4
    make = torch.Generator().manual_seed(1)
    pairs = [(x, x + 0.3 * torch.randn(x.shape, generator=make, dtype=torch.float64)) for x in features(problem)]
    free = torch.randn(30, 6, generator=make, dtype=torch.float64), torch.randn(30, 6, generator=make, dtype=torch.float64)
    method = Loraclr(ridge=0.01, preservation=0.5, margin=0.0, importance=(1.0, 2.0), normalise=normalise, prior=prior, rounds=2)
    twins = {name: Twin.of(*pair) for name, pair in zip(problem.concepts, pairs, strict=True)}
    solution = method.refit(problem, twins, Twin.of(*free))
    delta, weight = solution.delta().requires_grad_(), problem.base.double()
    shares = [share / (20 if normalise else 1) for share in (1.0, 2.0)]
    mu = 0.01 * sum(share * float(x.square().sum()) for share, (_, x) in zip(shares, pairs, strict=True)) / 6
    centre = torch.zeros_like(weight) if prior == "zero" else (problem.delta(0) + problem.delta(1)) / 2
    value = mu * (delta - centre).square().sum()
    for index, (share, (own, merged)) in enumerate(zip(shares, pairs, strict=True)):
        value = value + share * (merged @ (weight + delta).T - own @ (weight + problem.delta(index)).T).square().sum()
    value = value + 0.5 * 2 / (30 if normalise else 1) * (free[1] @ (weight + delta).T - free[0] @ weight.T).square().sum()
    (gradient,) = torch.autograd.grad(value, delta)
    span = torch.linalg.qr(torch.cat([up for up, _ in problem.factors], 1))[0]
    assert (span.T @ gradient).norm() < 1e-9 * gradient.norm() and solution.diagnostics["mu"] == pytest.approx(mu)
    assert solution.up.shape[1] == 4  # still an ordinary LoRA of the sum of the ranks


def test_moments_of_two_runs_add_and_nan_is_refused():
    x, y = torch.randn(10, 4), torch.randn(10, 4)
    whole, parts = Twin.of(x, y), Twin.of(x[:3], y[:3]) + Twin.of(x[3:], y[3:])
    assert whole.count == parts.count == 10
    assert torch.allclose(whole.cross, (x.T @ y).double(), atol=1e-5) and torch.allclose(whole.cross, parts.cross)
    assert torch.allclose(whole.square, (y.T @ y).double(), atol=1e-5) and torch.allclose(whole.square, parts.square)
    with pytest.raises(FormatError, match="NaN"):
        Twin.of(x, y / 0)


def test_more_rounds_change_the_last_stage_alone_and_leave_the_base(shared):
    before = fingerprint(shared)
    adapters = three(shared)
    told: list[tuple[str, float]] = []
    once, twice, thrice = (
        merge(
            adapters, base=shared, method=make_method("loraclr", rounds=rounds), collection=SMALL,
            progress=lambda what, share: told.append((what, share)),
        )
        for rounds in (1, 2, 3)
    )  # fmt: skip
    assert fingerprint(shared) == before and max(share for _, share in told) == 1.0
    last = {receipt.layer for receipt in once.layers if receipt.stage == max(r.stage for r in once.layers)}
    assert [receipt.layer for receipt in once.layers] == [receipt.layer for receipt in twice.layers]
    for name, layer in once.adapter.layers.items():
        assert torch.equal(layer.delta(), twice.adapter.layers[name].delta()) == (name not in last)
        assert name in last or torch.equal(layer.delta(), thrice.adapter.layers[name].delta())
        assert layer.rank == twice.adapter.layers[name].rank
    assert {receipt.status for receipt in twice.layers if receipt.layer in last} == {"refitted"}


def test_one_adapter_alone_stays_what_it_is(shared):
    adapter = three(shared)[0]
    settings = {"ridge": 1e-9, "preservation": 0.0}
    twice = merge([adapter], base=shared, method=make_method("loraclr", rounds=2, **settings), collection=SMALL)
    assert twice.mean_residual("fit") < 1e-3


def test_later_blocks_make_good_what_earlier_ones_missed(shared):
    """In a block that is fitted last, the merged model's outputs are nearer to the adapters' own than those of one round."""
    concepts = [Concept(adapter, adapter.call) for adapter in three(shared)]
    method = Loraclr(ridge=1e-6, preservation=0.0, margin=0.0, rounds=2)
    result = merge([c.adapter for c in concepts], base=shared, method=replace(method, rounds=1), collection=SMALL)
    names = [receipt.layer for receipt in result.layers if receipt.stage == max(r.stage for r in result.layers)]
    far: dict[str, list[float]] = {}

    class Watching(Loraclr):
        def refit(self, problem, twins, preserve):
            found = super().refit(problem, twins, preserve)
            weight = problem.base.double()

            def miss(delta):
                total = 0.0
                for index, concept in enumerate(problem.concepts):
                    twin, own = twins[concept], weight + problem.delta(index)
                    ours = weight + delta
                    total += float(((ours @ twin.square) * ours).sum() - 2 * ((own @ twin.cross) * ours).sum()) / twin.count
                return total

            far[problem.layer] = [miss(result.adapter.layers[problem.layer].delta().double().flatten(1)), miss(found.delta())]
            return found

    merged = dict(result.adapter.layers)
    shapes = {name: tuple(shared.base_weight(name).shape) for name in names}
    problems = {name: _problem(name, shapes, concepts, shared, None, 0) for name in names}
    watching = Watching(ridge=1e-6, preservation=0.0, margin=0.0, rounds=2)
    for problem, _ in refitted(shared, concepts, names, method=watching, problem=problems.__getitem__, settings=SMALL, merged=merged):
        assert problem.layer in far
    assert set(far) == set(names) and all(after <= before + 1e-6 * abs(before) for before, after in far.values())


def test_blocks_are_visited_as_the_unet_runs(shared):
    names = [name for adapter in three(shared) for name in adapter.layers if name.startswith("unet.")]
    order = [name.split(".")[1] for name in _in_order(shared, sorted(set(names)))]
    assert order == sorted(order, key=["down_blocks", "mid_block", "up_blocks"].index)


@pytest.mark.parametrize("settings", [{"choose": "held_out"}, {"balance": True}, {"penalty": 1e-3}, {"certificate": "exact"}])
def test_what_further_rounds_cannot_do_is_refused(settings):
    with pytest.raises(UsageError, match=f"rounds=2 knows no {next(iter(settings))}"):
        make_method("loraclr", rounds=2, **settings)
