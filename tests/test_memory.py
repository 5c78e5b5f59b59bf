"""What a piece of work takes in memory: what it allocates, whatever the process did before; no number where the system has none."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from concepts import three

from loraclr import memory
from loraclr.compare import compare
from loraclr.memory import PeakMemory
from loraclr.methods import make_method
from loraclr.pipeline import Pipeline

TOLERANCE = 10.0  # megabytes: what libraries set up once, and holes between what is in use
linux = pytest.mark.skipif(sys.platform != "linux", reason="told by Linux")


def pieces(megabytes: int, size: int = 20_000) -> list[torch.Tensor]:
    """So much in tensors of `size` numbers each; once they are freed but for the last, the allocator keeps the pages of small ones."""
    return [torch.ones(size) for _ in range(megabytes * 1_000_000 // (4 * size))]


@dataclass(frozen=True)
class Hungry:
    """The sum, made beside so many megabytes in small pieces, below it in memory: their pages stay with the allocator."""

    megabytes: int
    name: ClassVar[str] = "hungry"
    summary: ClassVar[str] = "takes memory"
    reference: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    def solve(self, problem):
        held = pieces(self.megabytes)
        solution = make_method("sum").solve(problem)
        del held
        return solution


@linux
@pytest.mark.parametrize("size", [20_000, 1_000_000, 16_000_000], ids="{:.0e}".format)
def test_what_is_allocated_is_seen_at_once_and_again(size):
    """Also for an instant, and where the allocator has the pages still from the time before."""
    for _ in range(3):
        with PeakMemory() as peak:
            pieces(64, size)
        assert peak.megabytes == pytest.approx(64, abs=TOLERANCE)
        pinned = pieces(100)[-1]
    assert pinned.all()


@linux
def test_what_is_in_use_already_does_not_count():
    held = torch.ones(20_000_000)
    with PeakMemory() as peak:
        held += 1
    assert peak.megabytes < TOLERANCE < 80 < peak.held


@linux
def test_a_page_of_a_file_is_nobodys_need(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(64_000_000))
    with PeakMemory() as peak:
        mapped = torch.from_file(str(path), size=16_000_000, shared=True)
        assert not float(mapped.sum())
    assert peak.megabytes < TOLERANCE


@pytest.fixture(scope="module")
def adapters(_tiny_original):
    return three(Pipeline(_tiny_original))


@linux
def test_methods_take_what_they_take_in_any_order(adapters):
    methods = {"sum": make_method("sum"), "large": Hungry(90), "ties": make_method("ties"), "small": Hungry(30)}
    compare(adapters, methods={"ties": make_method("ties")})  # libraries' first use
    orders = [list(methods), list(reversed(methods)), ["large", "small", "ties", "sum"]]
    found = [{e.label: e.megabytes for e in compare(adapters, methods={name: methods[name] for name in order}).entries} for order in orders]
    for label in methods:
        values = [one[label] for one in found]
        assert max(values) - min(values) < TOLERANCE, (label, values)
        if label != "ties":  # takes what its tables take
            assert values == pytest.approx([{"large": 90, "small": 30, "sum": 0}[label]] * 3, abs=TOLERANCE)


@pytest.mark.parametrize("lacks", ["trim", "peak", "status"])
def test_what_cannot_be_measured_is_no_number(adapters, tmp_path, monkeypatch, lacks):
    """Another allocator; a /proc that is read only; a system without it."""
    if lacks == "trim":
        monkeypatch.setattr(memory, "give_back", lambda: False)
    elif lacks == "peak":
        monkeypatch.setattr(memory, "PROC", tmp_path)
        (tmp_path / "clear_refs").mkdir()
    else:
        monkeypatch.setattr(memory, "PROC", tmp_path / "nowhere")
    found = compare(adapters, methods={"sum": make_method("sum")})
    assert math.isnan(found.entries[0].megabytes) and found.report()["methods"][0]["megabytes"] is None
