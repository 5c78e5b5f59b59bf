from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert all(torch.equal(again.sample[name], rows) for name, rows in original["unet.x"].sample.items())
