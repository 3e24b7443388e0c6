"""Weights as recipes: what an initializer is made of, and the one writer that computes it."""

from passes.weights.recipe import Array, Op, Recipe, RecipeValues, Source, constant, dtype_of, recipe_of

__all__ = ["Array", "Op", "Recipe", "RecipeValues", "Source", "constant", "dtype_of", "recipe_of"]
