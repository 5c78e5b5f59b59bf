"""Several adapters in one picture without merging them: what is done at sampling time instead, at the price of a UNet pass for each.

The baselines that merging is compared with. One strategy, one file, one frozen dataclass whose fields are its hyper-parameters.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from loraclr.errors import UsageError
from loraclr.strategies.cast import Cast
from loraclr.strategies.clora import Clora
from loraclr.strategies.omg import Omg
from loraclr.strategies.scene import Scene, Strategy
from loraclr.strategies.words import Part

__all__ = ["STRATEGIES", "Cast", "Clora", "Omg", "Part", "Scene", "Strategy", "make_strategy"]

STRATEGIES: dict[str, type[Omg] | type[Clora]] = {kind.name: kind for kind in (Omg, Clora)}


def make_strategy(name: str, settings: Mapping[str, Any] | None = None) -> Strategy:
    """By its name, with its published settings where `settings` says nothing else. Raises UsageError for other names."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no strategy called {name!r}; the strategies are {', '.join(STRATEGIES)}{hint}")
    fields = STRATEGIES[name].__dataclass_fields__
    if unknown := sorted(set(settings or {}) - set(fields)):
        raise UsageError(f"strategy {name} has no {', '.join(unknown)}; it has {', '.join(fields)}")
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in (settings or {}).items()
    }  # JSON has no tuples
    return STRATEGIES[name](**plain)
