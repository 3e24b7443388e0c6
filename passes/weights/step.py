"""What an operation of a recipe becomes once its arguments are at hand: a step that runs over rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from passes.weights.recipe import Array, Recipe

Shape = tuple[int, ...]
Evaluate = Callable[[Recipe], Array]


@dataclass(frozen=True)
class Step:
    """An operation with its arguments at hand: `run(x, rows)`, where `x` holds the rows `rows` of its input.

    `shape` is that of the whole result. `by_rows`: row i of the result needs row i of the input alone;
    otherwise `x` must be the whole input. `by_element`: an element needs that element alone.
    """

    run: Callable[[Array, slice], Array]
    shape: Shape
    by_rows: bool = True
    by_element: bool = False
