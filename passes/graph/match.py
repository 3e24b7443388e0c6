"""Questions about a graph that several passes ask. Each answer is a value or None; nothing is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from passes.base import walk
from passes.weights.recipe import Array, Recipe, RecipeValues, recipe_of

STANDARD = (None, "", "ai.onnx")
"""How graphs spell the domain of ONNX's own operators."""


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor; None for constants, graph inputs and omitted inputs."""
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None


def sole_producer(tensor: gs.Tensor, kept: set[int]) -> gs.Node | None:
    """What computes a tensor that one node reads and that is not among the outputs `kept`, by `id()`."""
    return producer(tensor) if len(tensor.outputs) == 1 and id(tensor) not in kept else None


def array_of(tensor: gs.Tensor) -> Array | None:
    """The values of a constant that are in memory; None for variables, recipes and external files.

    Unlike `gs.Constant.values` it leaves the constant as it is (4-bit types would be exported unpacked).
    """
    values: Any = getattr(tensor, "_values", None)
    if isinstance(values, np.ndarray):
        return values
    if type(values) is not LazyValues or values.tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    array: Array = onnx.numpy_helper.to_array(values.tensor)
    return array


def is_recipe(tensor: gs.Tensor) -> bool:
    """Whether the tensor is a constant whose values are a recipe."""
    return isinstance(getattr(tensor, "_values", None), RecipeValues)


def weight_recipe(tensor: gs.Tensor) -> Recipe | None:
    """The recipe of a constant, made from its values when they are in memory; None for anything else."""
    recipe = recipe_of(tensor)
    if recipe is not None:
        return recipe
    array = array_of(tensor)
    return None if array is None else Recipe.of_array(np.ascontiguousarray(array).reshape(array.shape))


def recipe_of_constant(tensor: gs.Tensor) -> Recipe:
    """The recipe of a constant that was asked for one before."""
    recipe = weight_recipe(tensor)
    assert recipe is not None
    return recipe


def is_bias(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    """Whether a tensor is a constant along the last axis of x."""
    if not isinstance(tensor, gs.Constant) or tensor.shape is None or not x.shape:
        return False
    return len(tensor.shape) == 1 and tensor.shape[0] == x.shape[-1] and len(x.shape) > 1


def uncast(tensor: gs.Tensor) -> gs.Tensor:
    """What the tensor is a Cast of; the tensor itself where it is none."""
    node = producer(tensor)
    return node.inputs[0] if node is not None and node.op == "Cast" else tensor


def static_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """The shape when every dimension is a known number, otherwise None."""
    shape = tensor.shape
    if shape is None or not all(isinstance(dim, (int, np.integer)) and dim >= 0 for dim in shape):
        return None
    return tuple(int(dim) for dim in shape)


def output_ids(graph: gs.Graph) -> set[int]:
    """`id()` of every tensor that is an output of the graph or of a subgraph; these must keep their name."""
    return {id(tensor) for part in walk(graph) for tensor in part.outputs}
