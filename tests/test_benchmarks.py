"""The benchmark of all methods: nobody is left out, memory is real, every goal has a verdict."""

from __future__ import annotations

import sys

import pytest

from benchmarks.methods import GOALS, PEFTS, Case, Row, by_layer, megabytes, verdicts
from benchmarks.solver import Kind
from loraclr.methods import METHODS, LayerMethod
from loraclr.methods.describe import needs_base


def test_all_that_solve_by_layer_are_in_it_and_run():
    names = by_layer()
    assert set(METHODS) - set(names) == {"pplus"} | {name for name, method in METHODS.items() if not isinstance(method(), LayerMethod)}
    assert set(PEFTS) | {method for method, _ in GOALS} <= set(names)
    for name in names:
        case = Case("k/v", (40, 32), name, (2, 4), Kind("k/v", 40, 32, 60, 1.0) if needs_base(METHODS[name]) else None)
        solution = case.ours(case.given())()
        assert solution.up is not None
        assert solution.delta().shape == (40, 32) and solution.delta().isfinite().all(), name


@pytest.mark.skipif(sys.platform != "linux", reason="told by Linux")
def test_memory_is_above_the_inputs_and_grows_with_the_layer():
    """Elsewhere than where the seconds were taken: after a warm run the allocator has the pages already, and nothing is seen."""
    case = Case("large", (1280, 1280), "ties", (4, 4))
    delta = 1280 * 1280 * 8 / 1e6
    found = megabytes(case)
    assert found is not None
    assert 2 * delta < found < 20 * delta


def row(layer: str, method: str, faster: float, goal: bool | None = True) -> Row:
    return Row(layer, method, 1.0, None, 4, None, faster, None, None, None, goal)


def test_every_goal_is_told_met_or_not():
    rows = [row("a, 320 x 320", "svd", 1.5), row("b, 1280 x 1280", "svd", 9.0, False), row("a, 320 x 320", "sum", 0.5, False)]
    rows += [row("b, 1280 x 1280", "sum", 2.0), row("a, 320 x 320", "loraclr", 1.0, None)]
    assert verdicts(rows) == [
        (False, "sum: not slower than PEFT, 1 of 2 layers (0.50 on a)"),
        (False, "svd, b, 1280 x 1280: 10 times as fast as PEFT (here 9.0)"),
        (True, "svd: not slower than PEFT, 1 of 1 layers (at least 1.50 on a)"),
    ]
    assert not verdicts([row("a, 320 x 320", "sum", 2.0, None)])
