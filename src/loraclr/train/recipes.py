"""All recipes, in the order in which they are listed everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from loraclr.errors import UsageError
from loraclr.methods.options import faults, nearest
from loraclr.train.custom_diffusion import CustomDiffusion
from loraclr.train.edlora import EdLora
from loraclr.train.lora import Lora
from loraclr.train.orthogonal import Orthogonal
from loraclr.train.pplus import PPlus
from loraclr.train.recipe import Recipe
from loraclr.train.style import Style
from loraclr.train.textual_inversion import TextualInversion

RECIPES: Mapping[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (Lora, EdLora, Orthogonal, TextualInversion, PPlus, CustomDiffusion, Style)
}


def make_recipe(name: str, **parameters: object) -> Recipe:
    """The recipe of that name, or `NAME:PRESET`, with these hyper-parameters over the preset's.

    Raises UsageError that names everything wrong at once: the name, unknown parameters and values out of range.
    """
    base, _, preset = name.partition(":")
    recipe = RECIPES.get(base)
    if recipe is None:
        raise UsageError(f"no recipe {base!r}.{nearest(base, RECIPES)} There are: {', '.join(RECIPES)}.")
    found = []
    if preset and preset not in recipe.presets:
        found.append(f"no preset {preset!r}.{nearest(preset, recipe.presets)} It has: {', '.join(recipe.presets) or 'none'}.")
    found += faults(recipe, parameters)
    if found:
        raise UsageError(f"recipe {base!r}: " + " ".join(found))
    made: Recipe = recipe(**{**recipe.presets.get(preset, {}), **parameters})  # type: ignore[arg-type]
    return made
