from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraclr import statistics
from loraclr.errors import FormatError
from loraclr.statistics import LayerStats, Moments, load_statistics, save_statistics


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_streaming_is_the_same_in_any_portions(cuts):
    rows = draw(sum(cuts), 6)
    moments = Moments.empty(6)
    for part in rows.split(cuts):
        moments = moments + Moments.of(part)
    assert moments.count == len(rows)
    assert torch.allclose(moments.gram(), rows.T @ rows, atol=1e-12)
    assert (moments.rows is not None) == (len(rows) < 6)  # fewer rows than features: the rows are smaller


@pytest.mark.parametrize("cuts", [[3, 2, 9], [9, 1], [5, 1], [6, 6]])
def test_a_run_sums_up_as_its_moments_do(cuts):
    rows = draw(sum(cuts), 6)
    run, summed = Moments.empty(6), Moments.empty(6)
    for part in rows.split(cuts):
        run, summed = run.extended(part), summed + Moments.of(part)
    assert (run.count, run.kept, run.few) == (summed.count, summed.kept, summed.few)
    assert torch.allclose(run.gram(), summed.gram(), rtol=1e-12) and torch.equal(run.loaded().gram(), run.gram())
    assert torch.equal(run.half(), run.loaded().half())
    assert torch.allclose((run + run).gram(), 2 * summed.gram(), rtol=1e-12)


def test_by_hand():
    moments = Moments.of(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    assert moments.gram().tolist() == [[1.0, 2.0], [2.0, 13.0]]
    assert moments.energy(torch.tensor([[1.0, 1.0]])) == 18.0  # 3^2 + 3^2
    assert moments.scaled(2.0).energy(torch.tensor([[1.0, 1.0]])) == 36.0


@pytest.mark.parametrize("count", [3, 9])
def test_energy_is_the_energy_of_the_outputs(count):
    rows, delta = draw(count, 5), draw(4, 5)
    assert math.isclose(Moments.of(rows).energy(delta), float((rows @ delta.T).square().sum()), rel_tol=1e-12)


def test_half_precision_features_do_not_overflow():
    rows = torch.full((4, 2), 300.0, dtype=torch.float16)
    assert Moments.of(rows).gram().tolist() == [[360000.0, 360000.0], [360000.0, 360000.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_features_are_refused(bad):
    with pytest.raises(FormatError, match="float32"):
        Moments.of(torch.tensor([[1.0, bad]]))


def test_widths_must_agree():
    with pytest.raises(ValueError, match="do not add"):
        Moments.empty(2) + Moments.empty(3)


def stats(concepts, rows=4, width=6):
    return LayerStats(
        "unet.x",
        {name: Moments.of(draw(rows, width)) for name in concepts},
        {name: Moments.of(draw(9, width)) for name in concepts},
        Moments.of(draw(9, width)),
        {name: draw(3, width) for name in concepts},
        {name: draw(4 + number, width) for number, name in enumerate(concepts)},
    )


def test_statistics_of_two_runs_sum():
    a, b = stats(["x", "y"]), stats(["y", "z"])
    both = a + b
    assert both.concepts == ("x", "y", "z")
    assert both.fit["y"].count == 8 and both.fit["x"].count == 4
    assert torch.allclose(both.fit["y"].gram(), a.fit["y"].gram() + b.fit["y"].gram())
    assert torch.allclose(both.preserve.gram(), a.preserve.gram() + b.preserve.gram())


@pytest.mark.parametrize("rows", [4, 9])
def test_save_and_load(tmp_path, rows):
    original = {"unet.x": stats(["x", "a/b"], rows)}
    save_statistics(original, tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors")["unet.x"]
    for kind in ("fit", "held_out"):
        for name, moments in getattr(original["unet.x"], kind).items():
            found = getattr(again, kind)[name]
            assert found.count == moments.count and (found.rows is None) == (moments.rows is None)
            assert torch.equal(found.gram(), moments.gram())
    assert torch.equal(again.preserve.gram(), original["unet.x"].preserve.gram())
    for kind in ("sample", "rows"):
        assert all(torch.equal(getattr(again, kind)[name], rows) for name, rows in getattr(original["unet.x"], kind).items())


@pytest.fixture
def narrow(monkeypatch):
    """Layers of more than 40 inputs count as wide; 16 rows stand for theirs."""
    monkeypatch.setattr(statistics, "WIDEST", 40)
    monkeypatch.setattr(statistics, "SKETCH", 16)


def streamed(rows, parts):
    moments = Moments.of(rows[: parts[0]])
    for part in rows[parts[0] :].split(parts[1:]):
        moments = moments.extended(part)
    return moments


def test_a_wide_layer_is_exact_until_its_rows_are_many(narrow):
    rows = draw(16, 50)
    exact = streamed(rows, [7, 9])
    assert not exact.sketched and torch.equal(exact.rows, rows) and exact.kept == exact.count == 16
    many = exact.extended(draw(1, 50))
    assert many.sketched and (many.kept, many.count) == (16, 17) and many.few
    assert not streamed(draw(90, 40), [30, 60]).sketched


def test_a_sketch_holds_every_row_once_with_a_sign(narrow):
    """Rows e_k: their sketch is the matrix that makes it."""
    found = streamed(torch.eye(50, dtype=torch.float64), [10, 15, 25])
    assert torch.equal(found.rows.abs().sum(0), torch.ones(50, dtype=torch.float64))
    assert found.rows.shape == (16, 50) and set(found.rows.unique().tolist()) == {-1.0, 0.0, 1.0}
    again = streamed(torch.eye(50, dtype=torch.float64), [10, 15, 25])
    assert torch.equal(found.rows, again.rows), "chance is seeded"


def test_a_sketch_is_right_on_average_and_as_exact_as_it_says(narrow, monkeypatch):
    """Portions of one row again and again, where equal signs of two portions would show: ||X d||^2 is off by sqrt(2 / SKETCH)."""
    errors = []
    for seed in range(200):
        rows = draw(1, 60).expand(40, 60) + 0.1 * draw(40, 60)
        delta = draw(1, 60)
        monkeypatch.setattr(statistics, "_sketch", lambda rows, first, seed=seed: original(rows, 1000 * seed + first))
        errors.append(streamed(rows, [10, 10, 20]).energy(delta) / float((rows @ delta.T).square().sum()) - 1)
    errors = torch.tensor(errors)
    assert abs(float(errors.mean())) < 0.08  # 200 of them: a standard error of 0.025
    assert 0.2 < float(errors.square().mean().sqrt()) < 0.5  # (2 / 16)^(1/2) = 0.35


original = statistics._sketch


def test_sketches_sum_scale_and_are_kept(narrow, tmp_path):
    a, b = streamed(draw(30, 50), [10, 20]), streamed(draw(30, 50), [10, 20])
    both = a + b
    assert both.sketched and (both.count, both.kept) == (60, 32)
    assert torch.allclose(both.gram(), a.gram() + b.gram())
    assert a.scaled(2.0).sketched and torch.allclose(a.scaled(2.0).gram(), 2 * a.gram())
    save_statistics({"x": LayerStats("x", {"c": a}, preserve=Moments.of(draw(3, 50)))}, tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors")["x"]
    assert again.fit["c"].sketched and again.fit["c"].count == 30 and torch.equal(again.fit["c"].rows, a.rows)
    assert not again.preserve.sketched


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_features_of_a_wide_layer_are_refused(narrow, bad):
    rows = draw(20, 50)
    rows[3, 7] = bad
    for refused in (lambda: Moments.of(rows), lambda: Moments.of(draw(20, 50)).extended(rows)):
        with pytest.raises(FormatError, match="float32"):
            refused()


def test_inner_is_what_energies_are_made_of():
    up, down = draw(4, 2), draw(2, 5)
    for count in (3, 9):
        moments = Moments.of(draw(count, 5))
        assert math.isclose(float((moments.inner(down) * (up.T @ up)).sum()), moments.energy(up @ down), rel_tol=1e-12)
