"""Many LoRAs in, one model out: merging N adapters of a diffusion model without retraining and without their training data.

    merged = loraclr.merge(["rhea.safetensors", "theo.safetensors"], base=loraclr.Pipeline.load("path/or/hub-id"))
    merged.save("both.safetensors")

Nothing heavy is imported before a name below is used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loraclr.adapter import Adapter, DenseLayer, LoraLayer
    from loraclr.collect import Collection, Concept, collect
    from loraclr.compare import Comparison, compare
    from loraclr.errors import FormatError, LoraclrError, MergeError, MergeWarning, NumericalError, PipelineError, TrainError, UsageError
    from loraclr.evaluate import Evaluation, Subject, Variant, evaluate
    from loraclr.formats import describe, load_adapter, save_adapter
    from loraclr.fuse import fuse
    from loraclr.generate import Generated, Region, generate, parse_region
    from loraclr.judges import open_judge
    from loraclr.merge import LayerReceipt, MergeResult, merge
    from loraclr.methods import METHODS, LayerMethod, LayerProblem, LayerSolution, make_method
    from loraclr.pack import Pack
    from loraclr.pipeline import Pipeline
    from loraclr.preflight import Preflight, preflight
    from loraclr.statistics import LayerStats, load_statistics, save_statistics
    from loraclr.toybox import Toybox, open_toybox
    from loraclr.train import RECIPES, Recipe, make_recipe, shared_rows, train
    from loraclr.verify import Verification, verify

__all__ = [
    "METHODS",
    "RECIPES",
    "Adapter",
    "Collection",
    "Comparison",
    "Concept",
    "DenseLayer",
    "Evaluation",
    "FormatError",
    "Generated",
    "LayerMethod",
    "LayerProblem",
    "LayerReceipt",
    "LayerSolution",
    "LayerStats",
    "LoraLayer",
    "LoraclrError",
    "MergeError",
    "MergeResult",
    "MergeWarning",
    "NumericalError",
    "Pack",
    "Pipeline",
    "PipelineError",
    "Preflight",
    "Recipe",
    "Region",
    "Subject",
    "Toybox",
    "TrainError",
    "UsageError",
    "Variant",
    "Verification",
    "__version__",
    "collect",
    "compare",
    "describe",
    "evaluate",
    "fuse",
    "generate",
    "load_adapter",
    "load_statistics",
    "make_method",
    "make_recipe",
    "merge",
    "open_judge",
    "open_toybox",
    "parse_region",
    "preflight",
    "save_adapter",
    "save_statistics",
    "shared_rows",
    "train",
    "verify",
]

# Public name -> the module it lives in, imported at first use (PEP 562).
_HOMES = {
    name: module
    for module, names in {
        "adapter": ("Adapter", "DenseLayer", "LoraLayer"),
        "collect": ("Collection", "Concept", "collect"),
        "compare": ("Comparison", "compare"),
        "errors": (
            "FormatError",
            "LoraclrError",
            "MergeError",
            "MergeWarning",
            "NumericalError",
            "PipelineError",
            "TrainError",
            "UsageError",
        ),
        "evaluate": ("Evaluation", "Subject", "Variant", "evaluate"),
        "formats": ("describe", "load_adapter", "save_adapter"),
        "fuse": ("fuse",),
        "generate": ("Generated", "Region", "generate", "parse_region"),
        "judges": ("open_judge",),
        "merge": ("LayerReceipt", "MergeResult", "merge"),
        "methods": ("METHODS", "LayerMethod", "LayerProblem", "LayerSolution", "make_method"),
        "pack": ("Pack",),
        "pipeline": ("Pipeline",),
        "preflight": ("Preflight", "preflight"),
        "statistics": ("LayerStats", "load_statistics", "save_statistics"),
        "toybox": ("Toybox", "open_toybox"),
        "train": ("RECIPES", "Recipe", "make_recipe", "shared_rows", "train"),
        "verify": ("Verification", "verify"),
    }.items()
    for name in names
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'loraclr' has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"loraclr.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The verbs live in modules of the same name. `loraclr.merge` is the function, whichever of the two was imported first."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            return  # the import system binding the submodule, which stays reachable by `from loraclr.merge import ...`
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
