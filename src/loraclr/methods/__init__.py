"""All merge methods, in the order in which they are listed everywhere."""

from __future__ import annotations

from typing import Any

from loraclr.errors import UsageError
from loraclr.methods.average import Average
from loraclr.methods.loraclr import Loraclr
from loraclr.methods.loraclr_reference import LoraclrReference
from loraclr.methods.options import Parameter, faults, nearest, parameters
from loraclr.methods.problem import LayerMethod, LayerProblem, LayerSolution, cross_talk, residuals
from loraclr.methods.sum import Sum
from loraclr.methods.svd import Svd

METHODS: dict[str, type] = {method.name: method for method in (Loraclr, LoraclrReference, Average, Sum, Svd)}

__all__ = [
    "METHODS",
    "LayerMethod",
    "LayerProblem",
    "LayerSolution",
    "Parameter",
    "cross_talk",
    "make_method",
    "method_names",
    "parameters",
    "residuals",
]


def method_names() -> tuple[str, ...]:
    """Every name `make_method` takes: `loraclr`, `loraclr:exact`, ..."""
    return tuple(name + suffix for name, method in METHODS.items() for suffix in ("", *(f":{preset}" for preset in _presets(method))))


def make_method(name: str, **parameters: object) -> LayerMethod:
    """The method of that name, or `NAME:PRESET`, with these hyper-parameters over the preset's.

    Raises UsageError that names everything wrong at once: the name, unknown parameters and values out of range.
    """
    base, _, preset = name.partition(":")
    method = METHODS.get(base)
    if method is None:
        raise UsageError(f"no method {base!r}.{nearest(base, METHODS)} There are: {', '.join(method_names())}.")
    presets = _presets(method)
    found = []
    if preset and preset not in presets:
        found.append(f"no preset {preset!r}.{nearest(preset, presets)} It has: {', '.join(presets) or 'none'}.")
    found += faults(method, parameters)
    if found:
        raise UsageError(f"method {base!r}: " + " ".join(found))
    made: LayerMethod = method(**{**presets.get(preset, {}), **parameters})
    return made


def _presets(method: Any) -> dict[str, dict[str, object]]:
    return {name: dict(values) for name, values in method.presets.items()}
