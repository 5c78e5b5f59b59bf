"""A short seeded run of what `make fuzz` does at length."""

from __future__ import annotations

import fuzzing
import pytest


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_file_is_read_or_refused(seed):
    found, failures = fuzzing.run(300, seed)
    assert not failures, failures[0]
    read = sum(times for kind, times in found.items() if kind.endswith(": read"))
    refused = sum(times for kind, times in found.items() if kind.endswith(": refused"))
    assert read > 10 and refused > 150  # or the damage would be none, or everything would be refused unread


def test_a_reader_that_lets_something_through_is_found(monkeypatch):
    def careless(path, base):
        raise KeyError("lora_up")

    monkeypatch.setattr(fuzzing, "load_adapter", careless)
    with pytest.raises(KeyError):
        fuzzing.run(1, 0)
