"""All merge methods, in the order in which they are listed everywhere."""

from __future__ import annotations

from typing import Any

from loraclr.errors import UsageError
from loraclr.methods.average import Average
from loraclr.methods.core_space import CoreSpace
from loraclr.methods.crosstalk import CrossTalk, cross_talk
from loraclr.methods.custom_diffusion import CustomDiffusion
from loraclr.methods.dare_linear import DareLinear
from loraclr.methods.dare_ties import DareTies
from loraclr.methods.gradient_fusion import GradientFusion
from loraclr.methods.iso_c import IsoC
from loraclr.methods.knots import Knots
from loraclr.methods.linear import Linear
from loraclr.methods.loraclr import Loraclr
from loraclr.methods.loraclr_reference import LoraclrReference
from loraclr.methods.lorahub import Lorahub
from loraclr.methods.magnitude_prune import MagnitudePrune
from loraclr.methods.options import Parameter, faults, nearest, parameters
from loraclr.methods.orthogonal import Orthogonal
from loraclr.methods.pplus import Pplus
from loraclr.methods.problem import (
    NEEDS,
    AdapterMethod,
    LayerMethod,
    LayerProblem,
    LayerSolution,
    Method,
    ModelProblem,
    residuals,
)
from loraclr.methods.regmean import Regmean
from loraclr.methods.sum import Sum
from loraclr.methods.svd import Svd
from loraclr.methods.ties import Ties
from loraclr.methods.tsv import Tsv
from loraclr.methods.ziplora import Ziplora

METHODS: dict[str, type] = {
    method.name: method
    for method in (
        *(Loraclr, LoraclrReference),
        *(Average, GradientFusion, Regmean, CustomDiffusion, Orthogonal, Pplus, Ziplora, Lorahub),  # the baselines of its tables
        *(Sum, Svd, Ties, DareLinear, DareTies, MagnitudePrune, Knots, Linear),  # what people use
        *(IsoC, Tsv, CoreSpace),  # of 2025, by weights alone
    )
}

__all__ = [
    "METHODS",
    "NEEDS",
    "AdapterMethod",
    "CrossTalk",
    "LayerMethod",
    "LayerProblem",
    "LayerSolution",
    "Method",
    "ModelProblem",
    "Parameter",
    "cross_talk",
    "find_method",
    "make_method",
    "method_names",
    "parameters",
    "residuals",
]


def method_names() -> tuple[str, ...]:
    """Every name `make_method` takes: `loraclr`, `loraclr:exact`, ..."""
    return tuple(name + suffix for name, method in METHODS.items() for suffix in ("", *(f":{preset}" for preset in _presets(method))))


def find_method(name: str) -> Any:
    """The class of that name or alias, without a preset. Raises UsageError."""
    for method in METHODS.values():
        if name in _names(method):
            return method
    known = [word for method in METHODS.values() for word in _names(method)]
    raise UsageError(f"no method {name!r}.{nearest(name, known)} There are: {', '.join(method_names())}.")


def make_method(name: str, **parameters: object) -> Method:
    """The method of that name or alias, or `NAME:PRESET`, with these hyper-parameters over the preset's.

    Raises UsageError that names everything wrong at once: the name, unknown parameters and values out of range.
    """
    base, _, preset = name.partition(":")
    method = find_method(base)
    presets = _presets(method)
    found = []
    if preset and preset not in presets:
        elsewhere = [f"{other}:{preset}" for other, owner in METHODS.items() if preset in _presets(owner)]
        hint = f" Did you mean {elsewhere[0]!r}?" if elsewhere else nearest(preset, presets)
        found.append(f"no preset {preset!r}.{hint} It has: {', '.join(presets) or 'none'}.")
    found += faults(method, parameters)
    if found:
        raise UsageError(f"method {base!r}: " + " ".join(found))
    made: Method = method(**{**presets.get(preset, {}), **parameters})
    return made


def _names(method: Any) -> tuple[str, ...]:
    return (method.name, *method.aliases)


def _presets(method: Any) -> dict[str, dict[str, object]]:
    return {name: dict(values) for name, values in method.presets.items()}
