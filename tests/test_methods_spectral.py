"""Iso-C, task singular vectors and Core Space: each beside its formula on dense deltas, what it leaves alone, and at a command line."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import NAME, make_problem, relative

from loraclr import linalg
from loraclr.adapter import DenseLayer, LoraLayer
from loraclr.cli import main
from loraclr.formats import load_adapter
from loraclr.merge import merge
from loraclr.methods import LayerProblem, make_method
from loraclr.methods.core_space import cored
from loraclr.methods.sparse import agreeing_mean, keep_largest
from loraclr.toybox import open_toybox

METHODS = ("iso-c", "tsv", "core-space")


def toybox_files():
    return sorted(path for path in open_toybox().adapter_paths().values() if path.suffix == ".safetensors")


def solve(name, problem, **parameters):
    return make_method(name, **parameters).solve(problem).delta()


def mixed(ranks=(1, 3, 2), weights=(1.0, -0.5, 2.0), out=9, width=8, missing=True):
    """Adapters of these ranks, and one that lacks the layer."""
    make = torch.Generator().manual_seed(3)
    layers = [LoraLayer(NAME, torch.randn(r, width, generator=make), torch.randn(out, r, generator=make), 0.7) for r in ranks]
    return make_problem(
        len(ranks) + missing,
        out=out,
        width=width,
        layers=[*layers, *[None] * missing],
        weights=[*weights, *[1.0] * missing],
    )


def orthogonal(sizes, out=9, width=8):
    """Adapters whose columns and whose rows are orthogonal to each other's, with these singular values."""
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (out, width))
    layers, start = [], 0
    for own in sizes:
        stop = start + len(own)
        layers.append(DenseLayer(NAME, left[:, start:stop] * torch.tensor(own, dtype=torch.float64) @ right[:, start:stop].T))
        start = stop
    return make_problem(len(layers), out=out, width=width, layers=layers)


def polar(matrix):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > 1e-9] @ vh[s > 1e-9]


# Iso-C -------------------------------------------------------------------------------------------------------------------------------


def test_iso_c_is_its_formula_on_the_dense_sum():
    problem = mixed()
    u, s, vh = torch.linalg.svd(sum(problem.deltas()))
    solution = make_method("iso-c", scale=1.5).solve(problem)
    assert relative(solution.delta(), 1.5 * s[:6].mean() * u[:, :6] @ vh[:6]) < 1e-12
    values = torch.linalg.svdvals(solution.delta())
    assert torch.allclose(values[:6], 1.5 * s[:6].mean().expand(6)) and values[6:].max() < 1e-13
    assert solution.up.shape[1] == 6 and solution.lost == 0


def test_iso_c_of_full_rank_changes_is_the_papers():
    problem = make_problem(2, layers=[DenseLayer(NAME, torch.randn(8, 6, dtype=torch.float64)) for _ in range(2)])
    u, s, vh = torch.linalg.svd(sum(problem.deltas()), full_matrices=False)
    assert relative(solve("iso-c", problem), u * s.mean() @ vh) < 1e-12


def test_iso_c_leaves_equal_singular_values_alone():
    even, uneven = orthogonal([(2.0, 2.0, 2.0)]), orthogonal([(3.0, 1.0)])
    assert relative(solve("iso-c", even), even.delta(0)) < 1e-12
    assert relative(solve("iso-c", uneven), uneven.delta(0)) > 0.3
    assert relative(solve("iso-c", orthogonal([(2.0,), (2.0, 2.0)])), sum(orthogonal([(2.0,), (2.0, 2.0)]).deltas())) > 0.1


def test_iso_c_levels_no_rounding():
    """Two adapters that cancel each other but for the third: what is left of them is not raised to its strength."""
    one = make_problem(1)
    big = replace(one.layers[0], scale=1e6)
    problem = make_problem(3, layers=[big, replace(big, up=big.up.clone()), make_problem(1, seed=1).layers[0]], weights=[1.0, -1.0, 1.0])
    solution = make_method("iso-c").solve(problem)
    assert solution.up.shape[1] == 2
    assert relative(solution.delta(), solve("iso-c", replace(problem, weights=(0.0, 0.0, 1.0)))) < 1e-6


def test_iso_c_cuts_the_sum_before_it_levels_it():
    problem = mixed()
    u, s, vh = torch.linalg.svd(sum(problem.deltas()))
    solution = make_method("iso-c", rank=2).solve(problem)
    assert relative(solution.delta(), s[:2].mean() * u[:, :2] @ vh[:2]) < 1e-12
    assert solution.lost == pytest.approx(float(s[2:].norm() / s.norm())) and solution.status == "truncated"


# TSV ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "out", "width"), [(None, 9, 8), (1, 9, 8), (3, 9, 8), (3, 4, 8), (3, 9, 3)])
def test_tsv_is_its_formula_on_dense_deltas(kept, out, width):
    problem = mixed(out=out, width=width)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in problem.deltas()[:3]]
    ranks = [min(kept or min(out, width) // 3, rank, out, width) for rank in (1, 3, 2)]
    u = torch.cat([part[0][:, :r] for part, r in zip(parts, ranks, strict=True)], 1)
    s = torch.cat([part[1][:r] for part, r in zip(parts, ranks, strict=True)])
    v = torch.cat([part[2][:r] for part, r in zip(parts, ranks, strict=True)])
    solution = make_method("tsv", kept=kept, scale=0.5).solve(problem)
    assert relative(solution.delta(), 0.5 * polar(u) * s @ polar(v)) < 1e-11
    cut = sum(float(part[1][r:].square().sum()) for part, r in zip(parts, ranks, strict=True))
    assert solution.lost == pytest.approx((cut / sum(float(part[1].square().sum()) for part in parts)) ** 0.5, abs=1e-12)


def test_tsv_of_orthogonal_adapters_is_the_sum_and_of_copies_the_adapter():
    apart = orthogonal([(3.0, 1.0), (2.0,), (0.5, 0.25)])
    assert relative(solve("tsv", apart), sum(apart.deltas())) < 1e-12
    one = make_problem(1)
    copies = make_problem(3, layers=one.layers * 3, weights=[1.0, 2.0, 3.0], base=one.base)
    assert relative(solve("tsv", copies), 2 * one.delta(0)) < 1e-12, "of the mean weight"
    up, down = one.layers[0].up, one.layers[0].down
    near = replace(one.layers[0], up=up * (1 + 1e-7 * torch.randn(8, 2)), down=down * (1 + 1e-7 * torch.randn(2, 6)))
    assert relative(solve("tsv", make_problem(2, layers=[one.layers[0], near])), one.delta(0)) < 1e-5, "the same but for rounding"


def test_tsvs_bases_are_orthonormal():
    problem = make_problem(3, out=12, width=10)
    solution = make_method("tsv").solve(problem)
    values = torch.linalg.svdvals(solution.delta())[:6]
    own = torch.cat([torch.linalg.svdvals(delta)[:2] for delta in problem.deltas()]).sort(descending=True).values
    assert torch.allclose(values, own), "the singular values are those of the adapters"
    assert not torch.allclose(torch.linalg.svdvals(sum(problem.deltas()))[:6], own)


def test_the_nearest_orthonormal_columns():
    columns = torch.nn.functional.normalize(torch.randn(9, 4, dtype=torch.float64), dim=0)
    found = linalg.orthonormalised(columns)
    assert torch.allclose(found.T @ found, torch.eye(4, dtype=torch.float64))
    square = found.T @ columns  # the polar factor is the one that leaves a symmetric positive rest
    assert torch.allclose(square, square.T) and torch.linalg.eigvalsh(square).min() > 0
    assert linalg.orthonormalised(torch.zeros(5, 0, dtype=torch.float64)).shape == (5, 0)


# Core Space --------------------------------------------------------------------------------------------------------------------------


def test_cores_hold_all_of_every_delta():
    problem = mixed()
    left, cores, right = cored(problem)
    assert left.shape == (9, 6) and right.shape == (6, 8) and all(core.shape == (6, 6) for core in cores)
    for core, delta in zip(cores, problem.deltas(), strict=True):
        assert float((left @ core @ right - delta).norm()) < 1e-13 * float(problem.delta(0).norm())
    assert torch.allclose(left.T @ left, torch.eye(6, dtype=torch.float64)) and torch.allclose(right @ right.T, left.T @ left)
    mean = make_method("core-space", rule="mean").solve(problem)
    assert relative(mean.delta(), sum(problem.deltas()) / 4) < 1e-13
    assert relative(mean.delta(), solve("average", problem)) < 1e-13


@pytest.mark.parametrize("isotropic", [False, True])
def test_core_space_is_its_formula_on_dense_deltas(isotropic):
    """Bases from SVDs of the balanced factors side by side, TIES on U^T D_i V; the bases' signs do not matter but where a vote ties."""
    problem = mixed(missing=False)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in problem.deltas()]
    ranks = (1, 3, 2)
    ups = torch.cat([u[:, :r] * s[:r].sqrt() for (u, s, _), r in zip(parts, ranks, strict=True)], 1)
    downs = torch.cat([s[:r, None].sqrt() * vh[:r] for (_, s, vh), r in zip(parts, ranks, strict=True)])
    left, right = torch.linalg.svd(ups, full_matrices=False)[0], torch.linalg.svd(downs, full_matrices=False)[2]
    cores = [keep_largest(left.T @ delta @ right.T, 0.4) for delta in problem.deltas()]
    expected = left @ agreeing_mean(cores, "total") @ right
    if isotropic:
        u, s, vh = torch.linalg.svd(expected)
        rank = int((s > 1e-10).sum())
        expected = u[:, :rank] * s[:rank].mean() @ vh[:rank]
    assert relative(solve("core-space", problem, density=0.4, isotropic=isotropic), expected) < 1e-10


def test_what_depends_on_no_basis_is_what_it_is_without_a_core():
    problem = mixed()
    assert relative(solve("core-space", problem, rule="mean", isotropic=True, scale=4.0), solve("iso-c", problem)) < 1e-11
    cut = make_method("core-space", rule="mean", isotropic=True, rank=3).solve(problem)
    assert relative(4 * cut.delta(), solve("iso-c", problem, rank=3)) < 1e-11 and cut.lost > 0


def test_core_space_does_not_ask_how_a_delta_is_split():
    problem = make_problem(3)
    a = problem.layers[0]
    turn = torch.tensor([[1.0, 0.5], [0.0, 0.25]], dtype=torch.float64)
    split = LoraLayer(NAME, turn @ a.down, a.up @ torch.linalg.inv(turn), a.scale)
    other = replace(problem, layers=(split, *problem.layers[1:]))
    assert relative(solve("core-space", other), solve("core-space", problem)) < 1e-10


def test_entries_that_are_nothing_but_rounding_do_not_vote():
    for _ in range(4):
        problem = orthogonal([(4.0, 2.0), (3.0, 1.5, 1.0), (2.5,)], out=40, width=30)
        assert relative(solve("core-space", problem, density=1.0), sum(problem.deltas())) < 1e-12


def test_a_lone_adapter_of_low_rank_is_not_trimmed_away():
    problem = make_problem(1, rank=1)
    assert relative(solve("core-space", problem), problem.delta(0)) < 1e-12
    assert relative(solve("core-space", make_problem(1, rank=3)), make_problem(1, rank=3).delta(0)) < 1e-12


# All three ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_adapters_that_change_nothing(name):
    zero = LoraLayer(NAME, torch.zeros(2, 6), torch.zeros(8, 2))
    for layers in ([None, zero], [zero], [None]):
        solution = make_method(name).solve(make_problem(len(layers), layers=layers))
        assert solution.delta().shape == (8, 6) and not solution.delta().any() and solution.lost == 0


@pytest.mark.parametrize("name", [*METHODS, "core-space, a vote of two"])
def test_neither_order_nor_the_signs_of_factors_matter(name):
    name, _, voting = name.partition(", ")
    problem = mixed(ranks=(3, 3), weights=(1.0, 1.5)) if voting else mixed()
    number = len(problem.layers)
    made = make_method(name, **({"election": "frequency", "density": 1.0} if voting else {}))
    expected = made.solve(problem).delta()
    flipped = [layer and replace(layer, up=-layer.up, down=-layer.down) for layer in problem.layers]
    for order in itertools.permutations(range(number)):
        shuffled = replace(
            problem,
            concepts=tuple(problem.concepts[i] for i in order),
            layers=tuple(flipped[i] for i in order),
            weights=tuple(problem.weights[i] for i in order),
        )
        assert relative(made.solve(shuffled).delta(), expected) < 1e-10


@st.composite
def shapes(draw):
    out, width, number = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    make = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    ranks = [draw(st.integers(1, 4)) for _ in range(number)]
    layers = [LoraLayer(NAME, torch.randn(r, width, generator=make), torch.randn(out, r, generator=make), 1.0) for r in ranks]
    names = tuple(f"c{index}" for index in range(number))
    return LayerProblem(NAME, (out, width), names, tuple(layers), tuple(draw(st.sampled_from([1.0, -0.5, 2.0])) for _ in ranks))


@pytest.mark.parametrize("name", METHODS)
@given(problem=shapes())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_of_any_shape_the_result_lies_between_the_adapters_directions(name, problem):
    found = make_method(name).solve(problem)
    assert found.delta().shape == (problem.out, problem.width) and bool(found.delta().isfinite().all())
    columns, rows = torch.cat([up for up, _ in problem.factors], 1), torch.cat([down for _, down in problem.factors])
    left, right = linalg.span(columns), linalg.span(rows.T)
    assert float((left @ left.T @ found.delta() @ right @ right.T - found.delta()).norm()) < 1e-9 * float(found.delta().norm() + 1)


@pytest.mark.parametrize("name", METHODS)
def test_at_the_command_line(name, tmp_path, capsys):
    files = toybox_files()[:3]
    target = tmp_path / "merged.safetensors"
    assert main(["merge", *map(str, files), "--method", name, "--output", str(target), "--rank", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == name and {layer["rank"] for layer in told["layers"]} == {2}
    assert all(0 < layer["lost"] < 1 for layer in told["layers"])
    merged = load_adapter(target)
    assert set(merged.layers) == {layer["layer"] for layer in told["layers"]}
    if name == "iso-c":
        values = torch.linalg.svdvals(merged.layers[told["layers"][0]["layer"]].delta(torch.float64).flatten(1))
        assert float(values[1]) == pytest.approx(float(values[0]), rel=1e-2) and float(values[2]) < 1e-2 * float(values[0])


def test_the_receipts_loss_is_of_both_cuts():
    """`svd` cuts to 3, the file to 2: together the best approximation of rank 2."""
    files = toybox_files()[:2]
    result = merge(files, method="svd", parameters={"rank": 3}, rank=2)
    alone = merge(files, method="svd", rank=2)
    plain = merge(files, method="sum", rank=2)
    assert all(layer.lost > 0 for layer in alone.layers)
    for layer, once, other in zip(result.layers, alone.layers, plain.layers, strict=True):
        assert layer.lost == pytest.approx(other.lost, rel=1e-5) and once.lost == pytest.approx(other.lost, rel=1e-5)
