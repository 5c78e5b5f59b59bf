"""Intervals cover what they promise, and know what was drawn together."""

from __future__ import annotations

import math

import pytest
import torch

from loraclr.errors import UsageError
from loraclr.evaluate import estimate, interval, paired
from loraclr.evaluate import intervals as module


def test_interval_holds_the_mean_and_shrinks_with_more_values():
    values = torch.tensor([0.0, 1.0] * 50)
    low, high = interval(values)
    assert low < 0.5 < high
    narrow = interval(values.repeat(16))
    assert narrow[1] - narrow[0] < (high - low) / 2
    assert interval(values) == (low, high)


def test_it_is_the_plain_bootstrap_written_out():
    values = torch.randn(40, dtype=torch.float64)
    drawn = values[torch.randint(40, (2000, 40), generator=torch.Generator().manual_seed(5))].mean(1).sort().values
    low, high = interval(values, seed=5)
    assert (low, high) == pytest.approx((float(drawn.quantile(0.025)), float(drawn.quantile(0.975))), abs=1e-12)


def test_two_clusters_by_hand():
    """Two concepts, all 0 and all 1: two draws make a mean of 0, 1/2 or 1 with chances 1/4, 1/2, 1/4."""
    values, concepts = torch.tensor([0.0] * 10 + [1.0] * 10), ["a"] * 10 + ["b"] * 10
    assert interval(values, factors=[concepts]) == (0.0, 1.0)
    assert interval(values, factors=[concepts], level=0.4) == (0.5, 0.5)
    low, high = interval(values)
    assert low > 0.2 and high < 0.8  # as if 20 pictures were 20 concepts


def test_a_factor_without_influence_changes_nothing():
    """Values that depend on the concept alone: how often a prompt or a seed is drawn cancels."""
    effect = torch.randn(6, dtype=torch.float64)
    concepts = [concept for concept in range(6) for _ in range(4)]
    crossed = [concepts, [prompt for _ in range(6) for prompt in (0, 0, 1, 1)], [0, 1] * 12]
    # The first factor's draws come first, so they are the same ones.
    assert interval(effect[concepts], factors=crossed, draws=1) == pytest.approx(interval(effect[concepts], factors=[concepts], draws=1))
    wide, plain = interval(effect[concepts], factors=crossed), interval(effect[concepts], factors=[concepts])
    assert wide == pytest.approx(plain, abs=0.15 * float(effect.std()))


def test_a_factor_of_one_level_adds_nothing():
    values = torch.randn(30, dtype=torch.float64)
    assert interval(values, factors=[["only"] * 30]) == pytest.approx((float(values.mean()),) * 2)


def test_levels_are_names_and_chunks_do_not_show(monkeypatch):
    values, concepts = torch.randn(24, dtype=torch.float64), [k % 4 for k in range(24)]
    whole = interval(values, factors=[concepts])
    assert interval(values, factors=[[f"concept {k}" for k in concepts]]) == whole
    monkeypatch.setattr(module, "_AT_ONCE", 24 * 7)
    assert interval(values, factors=[concepts]) == pytest.approx(whole)


def test_nan_is_no_value():
    values = torch.tensor([1.0, math.nan, 3.0])
    found = estimate(values, factors=[["a", "b", "c"]])
    assert (found.mean, found.count) == (2.0, 2) and (found.low, found.high) == (1.0, 3.0)
    assert all(math.isnan(value) for value in interval(torch.tensor([math.nan])))
    nothing = estimate(torch.tensor([math.nan]))
    assert math.isnan(nothing.mean) and nothing.count == 0


def test_pairs_see_what_two_intervals_cannot():
    hard = 10 * torch.randn(50, dtype=torch.float64)  # prompts differ far more than the two methods
    found = paired(hard + 0.5, hard)
    assert found.mean == pytest.approx(0.5) and found.high - found.low < 1e-9
    assert interval(hard + 0.5)[0] < interval(hard)[1]
    swapped = paired(hard, hard + 0.5)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_a_pair_that_lacks_one_is_left_out():
    found = paired(torch.tensor([1.0, math.nan, 5.0]), torch.tensor([0.0, 0.0, math.nan]))
    assert (found.mean, found.count) == (1.0, 1)


def coverage(*, clustered: bool) -> float:
    """The share of 150 made-up studies, 12 concepts of 10 pictures around a true mean of 0, whose interval holds 0."""
    concepts = [concept for concept in range(12) for _ in range(10)]
    held = 0
    for study in range(150):
        generator = torch.Generator().manual_seed(study)
        values = torch.randn(12, generator=generator)[concepts] + torch.randn(120, generator=generator)
        low, high = interval(values, factors=[concepts] if clustered else [], draws=400)
        held += low <= 0 <= high
    return held / 150


def test_only_intervals_that_draw_concepts_cover_other_concepts():
    assert coverage(clustered=True) > 0.82  # the percentile bootstrap of 12 is known to be a little short of .95
    assert coverage(clustered=False) < 0.62


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (torch.ones(3), {"factors": [["a", "b"]]}, r"factors of \[2\] length"),
        (torch.ones(2, 2), {}, "shape .2, 2."),
        (torch.ones(2), {"draws": 0}, "0 draws"),
        (torch.ones(2), {"level": 1.0}, "level 1.0"),
    ],
)
def test_mistakes_are_said(values, settings, message):
    with pytest.raises(UsageError, match=message):
        interval(values, **settings)


def test_unequal_numbers_cannot_be_paired():
    with pytest.raises(UsageError, match="3 values cannot be paired with 2"):
        paired(torch.ones(3), torch.ones(2))
