from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import relative

from loraclr import linalg
from loraclr.errors import NumericalError


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def spd(n):
    a = draw(n + 3, n)
    return a.T @ a


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_gram_is_float64_whatever_comes_in(dtype):
    rows = draw(7, 4).to(dtype)
    assert linalg.gram(rows).dtype == torch.float64
    assert torch.allclose(linalg.gram(rows), rows.double().T @ rows.double(), atol=1e-13)


@given(out=st.integers(1, 7), width=st.integers(1, 7), k=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_svd_of_product_is_the_svd_of_the_dense_product(out, width, k):
    up, down = draw(out, k), draw(k, width)
    u, s, vh = linalg.svd_of_product(up, down)
    assert torch.allclose(u * s @ vh, up @ down, atol=1e-12)
    dense = torch.linalg.svdvals(up @ down)[: len(s)]
    assert torch.allclose(s[: len(dense)], dense, atol=1e-11)


def test_truncation_is_eckart_young_and_says_what_it_lost():
    up, down = draw(9, 5), draw(5, 7)
    values = torch.linalg.svdvals(up @ down)
    cut = linalg.truncate(up, down, 3)
    assert cut.up.shape == (9, 3) and cut.down.shape == (3, 7)
    assert math.isclose(float((cut.up @ cut.down - up @ down).norm()), float(values[3:].norm()), rel_tol=1e-10)
    assert math.isclose(cut.lost, float(values[3:].norm() / values.norm()), rel_tol=1e-10)
    assert linalg.truncate(up, down, 5).lost < 1e-12
    assert torch.allclose(cut.up.norm(dim=0), cut.down.norm(dim=1))  # balanced, so that neither underflows in float16


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-5, 1e-9, 0.0])
@pytest.mark.parametrize("where", ["up", "down"])
@pytest.mark.parametrize("rank", [2, 6])
def test_a_cut_is_the_best_also_where_factors_are_nearly_dependent(smallest, where, rank):
    """Whichever decomposition it takes: by squares or not."""
    up, down = draw(20, 8), draw(8, 15)
    if where == "up":
        up[:, 5:] = up[:, :3] + smallest * up[:, 5:]
    else:
        down[5:] = down[:3] + smallest * down[5:]
    values = torch.linalg.svdvals(up @ down)
    exact = float(values[rank:].norm())
    for cut in (linalg.truncate(up, down, rank), linalg.truncate_dense(up @ down, rank), linalg.truncate_dense((up @ down).T, rank)):
        change = up @ down if cut.up.shape[0] == 20 else (up @ down).T
        assert cut.up.shape[1] <= rank
        assert float((cut.up @ cut.down - change).norm()) == pytest.approx(exact, rel=1e-9, abs=1e-12 * float(values[0]))
        assert cut.lost == pytest.approx(exact / float(values.norm()), rel=1e-9, abs=1e-12)
    thin = linalg.lowest_rank(up, down)
    assert relative(thin[0] @ thin[1], up @ down) < 1e-13 and thin[0].shape[1] == (5 if smallest == 0 else 8)
    assert torch.allclose(thin[0].norm(dim=0), thin[1].norm(dim=1))


@pytest.mark.parametrize(("out", "width", "k"), [(9, 7, 7), (7, 9, 12), (8, 8, 20), (8, 11, 7)])
def test_more_columns_than_the_product_needs_are_multiplied_out(out, width, k, monkeypatch):
    """Or nearly that many: the same cut, faster."""
    up, down = draw(out, k), draw(k, width)
    values = torch.linalg.svdvals(up @ down)
    monkeypatch.setattr(linalg, "_leading", None)
    monkeypatch.setattr(linalg, "svd_of_product", None)
    cut = linalg.truncate(up, down, 3)
    assert cut.up.shape == (out, 3) and cut.down.shape == (3, width)
    assert float((cut.up @ cut.down - up @ down).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-9)
    assert cut.lost == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-9)
    assert torch.allclose(cut.up.norm(dim=0), cut.down.norm(dim=1))


def test_a_product_of_zero_keeps_its_rank():
    cut = linalg.truncate(draw(5, 8), torch.zeros(8, 6), 2)
    assert cut.up.shape == (5, 2) and cut.down.shape == (2, 6) and not (cut.up @ cut.down).any() and cut.lost == 0


def test_truncation_by_hand():
    up, down = torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0])), torch.eye(4)
    cut = linalg.truncate(up, down, 1)
    assert torch.allclose(cut.up @ cut.down, torch.diag(torch.tensor([4.0, 0, 0, 0], dtype=torch.float64)))
    assert math.isclose(cut.lost, 3 / 5)


def test_lowest_rank_finds_the_rank_behind_stacked_copies():
    up, down = draw(9, 2), draw(2, 7)
    thin = linalg.lowest_rank(torch.cat([up] * 4, 1), torch.cat([down] * 4))
    assert thin[0].shape == (9, 2)
    assert relative(thin[0] @ thin[1], 4 * up @ down) < 1e-14
    assert linalg.lowest_rank(up, torch.zeros(2, 7))[0].shape == (9, 0)


def test_what_a_cut_loses_is_right_where_factors_undo_each_other():
    """`up` undoes most of `down`, each step of whose Cholesky factor looks harmless: squares would tell what is lost to 1 % only."""
    k, rank = 28, 14
    lower = torch.eye(k, dtype=torch.float64) - torch.ones(k, k, dtype=torch.float64).tril(-1)
    columns, rows = (torch.linalg.qr(draw(40, k))[0] for _ in range(2))
    values = torch.linspace(1, 0.5, k, dtype=torch.float64)
    up, down = columns * values @ torch.linalg.inv(lower), lower @ rows.T
    assert linalg._leading(up, down, rank) is None
    exact = float(values[rank:].norm() / values.norm())
    assert linalg.truncate(up, down, rank).lost == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("least", "rank"), [(1e-2, 4), (1e-6, 4), (1e-6, 2)])
def test_small_singular_values_are_not_found_from_their_squares(least, rank):
    """What is cut, or what is kept last, beside 1."""
    values = torch.tensor([1.0, 0.5] + [least] * 4, dtype=torch.float64)
    left, right = (torch.linalg.qr(draw(12, 6))[0] for _ in range(2))
    cut, dense = linalg._leading(left * values, right.T, rank), linalg.truncate_dense(left * values @ right.T, rank)
    assert (cut is not None) == (least == 1e-2)
    exact = float(values[rank:].norm() / values.norm())
    for found in (dense, linalg.truncate(left * values, right.T, rank)):
        assert found.lost == pytest.approx(exact, rel=1e-8)


def test_a_column_that_rounds_to_nothing_is_dropped():
    up = torch.eye(20, 2, dtype=torch.float64) * torch.tensor([1, 1e-20])
    assert linalg.lowest_rank(up, torch.eye(2, 15))[0].shape == (20, 1)


def test_columns_that_cancel_in_part_are_no_factors_for_float16():
    q, z, near = torch.linalg.qr(draw(20, 2))[0].T, torch.linalg.qr(draw(15, 2))[0].T, 0.11
    up = torch.stack([q[0], near * q[1] - (1 - near**2) ** 0.5 * q[0]], 1)
    down = torch.stack([z[0], z[0] + 1.1e-5 * z[1]])
    thin = linalg.lowest_rank(up, down)
    assert relative(thin[0].half().double() @ thin[1].half().double(), up @ down) < 1e-3


def test_stacked_factors_that_are_well_apart_are_kept_as_they_are():
    up, down = draw(200, 6), draw(6, 150)
    thin = linalg.lowest_rank(up, down)
    assert torch.allclose(thin[0] * (up.norm(dim=0) / thin[0].norm(dim=0)), up) and relative(thin[0] @ thin[1], up @ down) < 1e-14


@pytest.mark.parametrize("nearly", ["neither", "up", "down", "both"])
def test_lowest_factors_survive_float16(nearly):
    """Columns that cancel each other would not: they are told apart by their singular values."""
    up, down = draw(20, 6), draw(6, 15)
    if nearly in ("up", "both"):
        up[:, 3:] = up[:, :3] + 1e-4 * up[:, 3:]
    if nearly in ("down", "both"):
        down[3:] = -down[:3] + 1e-4 * down[3:]
    found = linalg.lowest_rank(up, down)
    assert found[0].shape == (20, 6)
    assert relative(found[0].half().double() @ found[1].half().double(), up @ down) < 1e-3


@pytest.mark.parametrize(("out", "width", "rank"), [(5, 7, 2), (7, 5, 2), (5, 7, 5), (7, 5, 5), (4, 4, 0)])
def test_factor_is_exact_and_lowest(out, width, rank):
    change = draw(out, rank) @ draw(rank, width)
    up, down = linalg.factor(change)
    assert up.shape == (out, rank) and down.shape == (rank, width)
    assert torch.allclose(up @ down, change, atol=1e-12)


def test_ridge_solve_by_hand():
    square = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    right = torch.tensor([[2.0, 8.0]], dtype=torch.float64)
    assert torch.allclose(linalg.ridge_solve(right, square, 1.0), torch.tensor([[1.0, 2.0]], dtype=torch.float64))


@pytest.mark.parametrize("mu", [1e-3, 1.0, 100.0])
def test_dual_solve_is_the_primal(mu):
    rows, targets = draw(4, 9), draw(4, 3)
    primal = linalg.ridge_solve(targets.T @ rows, rows.T @ rows, mu)
    assert relative(linalg.dual_solve(targets, rows, rows @ rows.T, mu), primal) < 1e-11


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_ridge_solve_without_ridge_is_the_least_norm_solution_where_many_rows_are_of_low_rank(noise):
    generator = torch.Generator().manual_seed(3)
    some = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    rows = some.repeat(40, 1) + noise * torch.randn(200, 12, generator=generator, dtype=torch.float64)  # as float32 rounds them
    change = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    square = rows.T @ rows
    found = linalg.ridge_solve(change @ square, square, 0.0)
    assert torch.allclose(found, change @ torch.linalg.pinv(some) @ some, atol=1e-5 if noise else 1e-9)
    assert found.norm() <= change.norm() * (1 + 1e-5)


def test_dual_solve_without_ridge_is_the_least_norm_solution_even_with_repeated_rows():
    rows = draw(4, 9)
    rows[3] = rows[0]
    targets = draw(4, 3)
    targets[3] = targets[0]
    found = linalg.dual_solve(targets, rows, rows @ rows.T, 0.0)
    assert relative(found, (torch.linalg.pinv(rows) @ targets).T) < 1e-10
    assert relative(rows @ found.T, targets) < 1e-10


def test_cholesky_has_a_voice():
    with pytest.raises(NumericalError, match="NaN"):
        linalg.cholesky(torch.full((2, 2), torch.nan))
    with pytest.raises(NumericalError, match=r"not positive definite.*raise `ridge`"):
        linalg.cholesky(torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64))
    vector = draw(4, 1)
    with pytest.warns(RuntimeWarning, match=r"singular: added .*e-\d\d, 1e-12"):
        lower = linalg.cholesky(vector @ vector.T)
    assert relative(lower @ lower.T, vector @ vector.T) < 1e-10
    with pytest.raises(NumericalError, match="NaN"):
        linalg.dual_solve(torch.ones(1, 1), torch.full((1, 2), torch.nan), torch.full((1, 1), torch.nan), 0.0)


@given(share=st.floats(1e-9, 0.999), start=st.floats(1e-12, 1e6), spread=st.floats(0, 8), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_secular_root_from_any_start(share, start, spread, seed):
    make = torch.Generator().manual_seed(seed)
    eigen = 10 ** (-spread * torch.rand(6, generator=make, dtype=torch.float64))
    right = torch.randn(6, generator=make, dtype=torch.float64)
    target = share * float(right.norm())
    mu = linalg.secular_root(lambda mu: float((right / (eigen + mu)).norm()), target, start=start)
    assert math.isclose(mu * float((right / (eigen + mu)).norm()), target, rel_tol=1e-8)


def test_secular_root_refuses_nan():
    with pytest.raises(NumericalError, match="NaN"):
        linalg.secular_root(lambda mu: math.nan, 1.0, start=1.0)


def test_activation_aware_truncation_is_the_rank_constrained_optimum():
    up, down, metric, mu = draw(6, 4), draw(4, 5), spd(5), 0.3
    delta, lifted = up @ down, metric + mu * torch.eye(5)
    root = torch.linalg.cholesky(lifted)

    def error(candidate):
        return float(((candidate - delta) @ root).norm() / (delta @ root).norm())

    cut = linalg.truncate_aware(up, down, 2, metric=metric, mu=mu)
    values = torch.linalg.svdvals(delta @ root)
    assert math.isclose(error(cut.up @ cut.down), float(values[2:].norm() / values.norm()), rel_tol=1e-9)
    assert math.isclose(cut.lost, error(cut.up @ cut.down), rel_tol=1e-6)
    plain = linalg.truncate(up, down, 2)
    assert error(cut.up @ cut.down) < error(plain.up @ plain.down)
    assert relative((full := linalg.truncate_aware(up, down, 4, metric=metric)).up @ full.down, delta) < 1e-12


def test_activation_aware_truncation_needs_no_inverse():
    rows = draw(1, 5)
    up, down = draw(6, 4), draw(4, 5)
    cut = linalg.truncate_aware(up, down, 1, metric=rows.T @ rows)  # one direction is seen: rank 1 loses nothing of it
    assert relative(rows @ (cut.up @ cut.down).T, rows @ (up @ down).T) < 1e-12
    assert cut.lost < 1e-6


@pytest.mark.parametrize("width", [1, 7, linalg.BLOCK, linalg.BLOCK + 3, 2 * linalg.BLOCK])
def test_half_of_a_gram_is_all_of_it(width):
    rows = torch.randn(2, 9, width)
    square = linalg.gram(rows[0])
    assert torch.allclose(square, rows[0].double().T @ rows[0].double(), atol=1e-10) and torch.equal(square, square.T)
    half = linalg.half_gram(rows[0])
    assert torch.equal(half, linalg.half(square)) and torch.equal(linalg.whole(half, width), square)
    both = linalg.half_gram(rows[1], half)
    assert torch.allclose(linalg.whole(both, width), square + linalg.gram(rows[1]), atol=1e-10)
    assert torch.equal(half, linalg.half(square)), "what it is added to stays"
