"""What a certificate of the optimum rests on: gradients, exact distances of all pairs, and how far from the optimum a descent can be."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from concepts import KEYS, SMALL, SPATIAL, TEXT, fingerprint, three
from problems import NAME, features, make_problem, relative

from loraclr.adapter import DenseLayer
from loraclr.collect import ALL_ROWS, Concept, collect
from loraclr.lockstep import settled
from loraclr.merge import merge
from loraclr.methods import LayerProblem, LayerSolution, make_method
from loraclr.methods.contrast import Contrast, Tally
from loraclr.methods.loraclr import Loraclr
from loraclr.methods.problem import Claim
from loraclr.methods.quadratic import Quadratic
from loraclr.pipeline import Pipeline
from loraclr.statistics import LayerStats

EYE = torch.eye(8, dtype=torch.float64)
PLAIN = {"ridge": 0.01, "preservation": 0.0, "normalise": False}


@pytest.fixture(scope="module")
def shared(_tiny_original) -> Pipeline:
    return Pipeline(_tiny_original)


def written_out(problem, delta, *, margin, mode, space, distance, anchor, penalty=0.0, mu=0.0):
    """J as docs/method.md writes it, on features, for autograd."""
    xs, number = features(problem), len(problem.concepts)
    outputs = [torch.zeros(len(x), problem.out, dtype=torch.float64) if space == "delta" else x @ problem.weight().T for x in xs]
    targets = [y + x @ problem.delta(i).T for i, (x, y) in enumerate(zip(xs, outputs, strict=True))]
    predictions = [y + x @ delta.T for x, y in zip(xs, outputs, strict=True)]
    unit = len(xs[0]) ** -0.5 if distance == "rms" else 1.0
    value = sum((x @ (delta - problem.delta(i)).T).square().sum() for i, x in enumerate(xs)) + mu * delta.square().sum()
    for a in range(number):
        gaps = []
        for b in range(number):
            if a != b:
                i, j = (a, b) if anchor == "target" else (b, a)
                least = margin * (unit * (targets[i] - targets[j]).norm() if mode == "relative" else 1.0)
                gaps.append(least - unit * (targets[i] - predictions[j]).norm())
        value = value + torch.stack(gaps).amax().clamp(min=0).square()
    return value / number + penalty * delta.norm()


@pytest.mark.parametrize("penalty", [0.0, 0.7])
@pytest.mark.parametrize("anchor", ["target", "prediction"])
@pytest.mark.parametrize("distance", ["frobenius", "rms"])
@pytest.mark.parametrize(
    ("mode", "space", "margin"), [("absolute", "output", 70.0), ("relative", "output", 1.4), ("relative", "delta", 6.0)]
)
def test_j_and_its_gradient_are_those_of_autograd(mode, space, margin, distance, anchor, penalty):
    problem = make_problem(3)
    delta = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    kind = {"mode": mode, "space": space, "distance": distance, "anchor": anchor}
    quadratic = Quadratic.of(problem, ridge=0.01)
    expected = written_out(problem, delta, margin=margin, penalty=penalty, mu=quadratic.mu, **kind)
    (gradient,) = torch.autograd.grad(expected, delta)
    d = delta.detach()
    hinge, push, table = (contrast := Contrast.of(problem, margin=margin, **kind)).value_and_gradient(EYE, d)
    value, pull = replace(quadratic, up=EYE, right=quadratic.up @ quadratic.right).value_and_gradient(d)
    assert hinge > 0 and contrast.active(table)
    assert math.isclose(value / 3 + hinge + penalty * float(d.norm()), float(expected), rel_tol=1e-9)
    assert relative(pull / 3 + push + penalty * d / d.norm(), gradient) < 1e-9


# Exact distances ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["output", "delta"])
@pytest.mark.parametrize("cuts", [[20], [1, 7, 12]])
def test_distances_add_up_over_any_portions(space, cuts):
    problem = make_problem(3)
    changes = [(EYE, torch.randn(8, 6, dtype=torch.float64)) for _ in range(2)]
    tally = Tally(problem, space, changes)
    for part in torch.stack(features(problem)).split(cuts, 1):
        tally.add(part)
    contrast = Contrast.of(problem, margin=1.0, mode="relative", anchor="target", space=space, distance="frobenius")
    for change, found in zip(changes, tally.distances(), strict=True):
        assert found.rows == 20
        assert torch.allclose(found.found.clone().fill_diagonal_(torch.inf), contrast.distances(*change), rtol=1e-12)
        assert torch.allclose(found.natural, contrast.margins, rtol=1e-12)


def partly(problem, rows=10):
    part = {name: x[:rows] for name, x in problem.statistics.sample.items()}
    return replace(problem, statistics=LayerStats(NAME, problem.statistics.fit, {}, problem.statistics.preserve, part))


def settle(problem, method):
    """Solved on a part of the rows, settled on all."""
    solution = method.solve(partly(problem))
    return solution, settle_on(problem, solution)


def settle_on(problem, solution):
    tally = Tally(problem, solution.claim.space, solution.claim.changes)
    tally.add(torch.stack(features(problem)))
    return solution.claim.settle(tally.distances())


def test_what_a_part_of_the_rows_leaves_undecided_all_of_them_decide():
    problem = make_problem(3, rows=40)
    part, whole = (float(Loraclr(**PLAIN).solve(p).diagnostics["closest_negative"]) for p in (partly(problem), problem))
    method = Loraclr(**PLAIN, margin=(part + whole) / 2, certificate="exact")
    before, after = settle(problem, method)
    assert before.diagnostics["certificate"].startswith("undecided") and before.status == "undecided"
    assert not {"hinge", "hinge_active", "objective"} & before.diagnostics.keys()
    assert (bound := method.solve(partly(problem))).status == "undecided" and Loraclr(**PLAIN).solve(problem).status == "optimal"
    assert bound.advice == "the paired rows that were kept do not tell whether the hinge is active; set certificate=exact"
    assert after.status == "optimal" and after.diagnostics["hinge_active"] == 0 and not after.advice
    assert after.diagnostics["certificate"].startswith("global optimum of J on all 40 paired rows: closest negative = ")
    full = Contrast.of(problem, margin=1.0, mode="absolute", anchor="target", space="output", distance="frobenius")
    table = full.distances(after.up, after.down)
    off = ~torch.eye(3, dtype=torch.bool)
    assert torch.allclose(after.distances.found[off], table[off]) and before.distances is None
    own = [x @ (after.delta() - problem.delta(k)).T for k, x in enumerate(features(problem))]
    assert torch.allclose(after.distances.found.diagonal(), torch.stack([part.norm() for part in own]))
    assert after.diagnostics["closest_negative"] == pytest.approx(float(table.min()))
    i, j = divmod(int(table.argmin()), 3)
    assert after.diagnostics["closest_pair"] == f"c{i}, prediction of c{j}" and "gap" not in after.diagnostics
    assert torch.equal(before.delta(), after.delta())


@pytest.mark.parametrize("anchor", ["target", "prediction"])
@pytest.mark.parametrize(
    "settings",
    [
        {"margin": 2.2},
        {"margin": 0.6, "margin_mode": "relative", "distance": "rms"},
        {"margin": 1.1, "margin_mode": "relative", "space": "delta"},
    ],
)
def test_the_gap_is_no_less_than_what_a_descent_still_finds(settings, anchor):
    """An absolute margin is given in closest distances. J of the receipt is that of the features, on all rows."""
    problem = make_problem(3, rows=40, shared=4.0)
    settings = {**PLAIN, "anchor": anchor, **settings}
    kind = {"mode": settings.get("margin_mode", "absolute"), "space": settings.get("space", "output")}
    if kind["mode"] == "absolute":
        settings["margin"] *= float(Loraclr(**PLAIN).solve(problem).diagnostics["closest_negative"])
    _, after = settle(problem, Loraclr(**settings, certificate="exact"))
    kind |= {"distance": settings.get("distance", "frobenius"), "anchor": anchor, "margin": settings["margin"]}
    mu = Quadratic.of(problem, ridge=0.01).mu
    assert after.diagnostics["hinge_active"] > 0 and after.diagnostics["certificate"].startswith("none: the hinge is active on all 40")
    assert after.diagnostics["objective"] == pytest.approx(float(written_out(problem, after.delta(), mu=mu, **kind)), rel=1e-9)
    d = after.delta().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([d], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = written_out(problem, d, mu=mu, **kind)
        loss.backward()
        return loss

    optimiser.step(closure)
    still = after.diagnostics["objective"] - float(written_out(problem, d.detach(), mu=mu, **kind))
    assert 0 <= still <= after.diagnostics["gap"] * (1 + 1e-9)


def test_a_refinement_that_all_rows_do_not_ask_for_is_taken_back():
    """On two rows that concepts share the hinge is active; over all of them it is not."""
    problem = make_problem(3, rows=40)
    near = [torch.cat([features(problem)[0][:2] + 1e-3 * k, x[2:]]) for k, x in enumerate(features(problem))]
    problem = make_problem(3, rows=40, features=near, layers=problem.layers, base=problem.base)
    start = Loraclr(**PLAIN, margin=0.0).solve(problem)
    kind = {"margin": 1.0, "mode": "absolute", "anchor": "target", "space": "output", "distance": "rms"}
    part, whole = (float(Contrast.of(p, **kind).distances(start.up, start.down).min()) for p in (partly(problem, 2), problem))
    assert part < whole
    method = Loraclr(**PLAIN, margin=(part + whole) / 2, distance="rms", certificate="exact")
    solution = method.solve(partly(problem, 2))
    assert solution.status == "refined" and solution.diagnostics["gap"] > 0
    after = settle_on(problem, solution)
    assert after.status == "optimal" and torch.equal(after.delta(), start.delta())


def test_only_an_exact_certificate_asks_for_a_second_pass():
    assert "lockstep" in make_method("loraclr", certificate="exact").needs
    assert "lockstep" not in make_method("loraclr").needs | make_method("loraclr", certificate="exact", margin=0.0).needs
    assert Loraclr().solve(make_problem(3)).claim is None
    assert Loraclr(certificate="exact").solve(make_problem(1)).claim is None


# In the model ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [TEXT, KEYS, SPATIAL])
@pytest.mark.parametrize("padded", [True, False])
def test_side_by_side_sees_what_one_after_the_other_collected(shared, names, padded):
    before = fingerprint(shared)
    ada, ben, cai = three(shared)
    dense = {name: DenseLayer(name, layer.delta()) for name, layer in cai.layers.items()} | {
        SPATIAL[3]: DenseLayer(SPATIAL[3], ada.layers[SPATIAL[3]].delta() * 0.5)
    }
    cai = replace(cai, layers=dense)
    concepts = [Concept(ada, "ada woman"), Concept(ben, "<ben> man", 0.5), Concept(cai, "cai")]
    earlier = {name: ada.layers[name] for name in (*TEXT, *KEYS) if name not in names and names is not TEXT}
    settings = replace(SMALL, padded=padded, seed=3)
    kept = collect(shared, concepts, list(names), settings=replace(settings, sample=ALL_ROWS), merged=earlier)
    generator, solved = torch.Generator().manual_seed(0), []
    for name in names:
        weight = shared.base_weight(name)
        flat = weight.flatten(1)
        up = torch.randn(flat.shape[0], 2, generator=generator).double()
        down = torch.randn(2, flat.shape[1], generator=generator).double() * 0.05
        problem = LayerProblem(
            name, tuple(weight.shape), tuple(c.name for c in concepts), tuple(c.adapter.layers.get(name) for c in concepts),
            tuple(c.weight for c in concepts), flat, kept[name],
        )  # fmt: skip
        found: dict[str, object] = {}
        solved.append(
            (problem, LayerSolution(up, down, claim=Claim("output", ((up, down),), lambda t, f=found: f.update(table=t[0]) or f)))
        )
    for (problem, solution), (_, found) in zip(solved, settled(shared, concepts, solved, settings=settings, merged=earlier), strict=True):
        contrast = Contrast.of(problem, margin=1.0, mode="relative", anchor="target", space="output", distance="frobenius")
        table = found["table"]
        assert table.rows == problem.sample().shape[1]
        off = table.found.clone().fill_diagonal_(torch.inf)
        assert torch.allclose(off, contrast.distances(solution.up, solution.down), rtol=1e-3), problem.layer
        assert torch.allclose(table.natural.fill_diagonal_(0), contrast.margins, rtol=1e-3)
    assert fingerprint(shared) == before


def test_a_merge_with_an_exact_certificate(shared):
    adapters, results = three(shared), {}
    for certificate in ("bound", "exact"):
        parameters = {"certificate": certificate, "margin": 1.0, "distance": "rms", "margin_mode": "relative"}
        results[certificate] = merge(adapters, base=shared, parameters=parameters, collection=SMALL)
    exact = {layer.layer: layer.diagnostics for layer in results["exact"].layers}
    assert all("paired rows" in notes["certificate"] and "J(lambda=0, mu=" in notes["certificate"] for notes in exact.values())
    active = [notes for notes in exact.values() if notes["hinge_active"]]
    assert active and all(notes["gap"] >= 0 for notes in active)
    assert all(" on all " in notes["certificate"] for notes in exact.values())
    for layer in json.loads(json.dumps(results["exact"].receipt()))["layers"]:
        merged, alone = (torch.tensor(layer["distances"][kind]) for kind in ("merged", "alone"))
        assert merged.shape == alone.shape == (3, 3) and torch.equal(alone, alone.T) and not alone.diagonal().any()
        assert float(merged[~torch.eye(3, dtype=torch.bool)].min()) == pytest.approx(layer["diagnostics"]["closest_negative"], rel=1e-5)
    assert not any(layer.distances for layer in results["bound"].layers)
    assert not all(" on all " in layer.diagnostics["certificate"] for layer in results["bound"].layers if layer.diagnostics["hinge_active"])
