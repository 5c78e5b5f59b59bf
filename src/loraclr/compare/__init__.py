"""Many methods on the same adapters: how near, how strong, how crossed, how large, how slow, and what their pictures look like."""

from __future__ import annotations

from loraclr.compare.comparison import Comparison, Entry
from loraclr.compare.measures import Measure, measure
from loraclr.compare.run import compare, every_method

__all__ = ["Comparison", "Entry", "Measure", "compare", "every_method", "measure"]
