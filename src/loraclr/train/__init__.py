"""VERB. Pictures of one concept and a base -> an adapter. One file per recipe; the loop, the data and the checkpoints are shared."""

from __future__ import annotations

from loraclr.methods.options import parameters
from loraclr.train.orthogonal import SharedRowsWarning, shared_rows
from loraclr.train.recipe import Recipe
from loraclr.train.recipes import RECIPES, make_recipe
from loraclr.train.run import train

__all__ = ["RECIPES", "Recipe", "SharedRowsWarning", "make_recipe", "parameters", "shared_rows", "train"]
