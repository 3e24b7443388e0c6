"""Questions about a graph that several passes ask. Each answer is a value or None; nothing is changed.

What a pass recognises in more than one file is recognised here: a bias, a projection, a norm over channels, a cut
along one axis, a sole reader. Patterns of several nodes are written with `passes.graph.pattern`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from passes.base import walk
from passes.weights.recipe import Array, Recipe, RecipeValues, recipe_of

STANDARD = (None, "", "ai.onnx")
"""How graphs spell the domain of ONNX's own operators."""
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators; part of every build of it."""
END = np.iinfo(np.int32).max
"""An end of a Slice from which on it means the end of the axis, whatever its length."""


class View:
    """What answers depend on beyond a node and its neighbours, computed once per graph.

    `outputs`: the `id()` of the outputs of the graph and its subgraphs. These must keep their values and names.
    `parts`: the graph and its subgraphs, outermost first. `opset`: the version of ONNX's own operators.
    """

    def __init__(self, graph: gs.Graph):
        self.parts = list(walk(graph))
        self.outputs = {id(tensor) for part in self.parts for tensor in part.outputs}
        self.opset = int(graph.opset)

    def is_sole(self, tensor: gs.Tensor) -> bool:
        """Whether one node alone reads the tensor, once, and no caller does."""
        return len(tensor.outputs) == 1 and id(tensor) not in self.outputs

    def is_later(self, node: gs.Node, other: gs.Node) -> bool:
        """Whether a node is `other` or comes after it in the same graph, as the graph was when the pass began."""
        (part, index), (other_part, other_index) = (self._places.get(id(n), (-1, -1)) for n in (node, other))
        return part == other_part and index >= other_index

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        parts = enumerate(self.parts)
        return {id(node): (number, i) for number, part in parts for i, node in enumerate(part.nodes)}


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor; None for constants, graph inputs and omitted inputs."""
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None


def sole_producer(tensor: gs.Tensor, view: View) -> gs.Node | None:
    """The node that computes a tensor which one node alone reads, and no caller."""
    return producer(tensor) if view.is_sole(tensor) else None


def sole_reader(tensor: gs.Tensor, view: View) -> gs.Node | None:
    """The node that alone reads a tensor; None when there are several, or a caller does."""
    return tensor.outputs[0] if view.is_sole(tensor) else None


def is_op(
    node: gs.Node | None, op: str, rank: int | None = None, domain: Container[str | None] = STANDARD
) -> TypeGuard[gs.Node]:
    """Whether a node is that operator of that domain and, if given, its output has `rank` axes."""
    if node is None or node.op != op or node.domain not in domain:
        return False
    return rank is None or len(dims(node.outputs[0])) == rank


def either(node: gs.Node) -> Iterator[tuple[gs.Tensor, gs.Tensor]]:
    """The two inputs of a commutative operator, in both orders."""
    left, right = node.inputs
    yield left, right
    yield right, left


def dims(tensor: gs.Tensor) -> list[Any]:
    """The dimensions of a tensor, each a number, a name or None; empty when its shape is not known."""
    return list(tensor.shape or ())


def static_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """The shape when every dimension is a known number, otherwise None."""
    shape = tensor.shape
    if shape is None or not all(isinstance(dim, (int, np.integer)) and dim >= 0 for dim in shape):
        return None
    return tuple(int(dim) for dim in shape)


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


def input_of(node: gs.Node, index: int) -> gs.Tensor | None:
    """An optional input, or None when it is left out."""
    return node.inputs[index] if index < len(node.inputs) and not node.inputs[index].is_empty() else None


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant or made by a Constant node, whatever is known of its values."""
    return isinstance(tensor, gs.Constant) or is_op(producer(tensor), "Constant")


def constant_value(node: gs.Node) -> Array | None:
    """The value of a Constant node; None for strings and sparse tensors."""
    for key, value in node.attrs.items():
        if key == "value":
            return array_of(value)
        if key in ("value_int", "value_ints"):
            return np.array(value, np.int64)
        if key in ("value_float", "value_floats"):
            return np.array(value, np.float32)
    return None


def held_values(tensor: gs.Tensor) -> Array | None:
    """The values of a constant in memory, or of a tensor that a Constant node makes; None for anything else."""
    node = producer(tensor)
    return constant_value(node) if is_op(node, "Constant") else array_of(tensor)


def permutation(node: gs.Node, rank: int) -> tuple[int, ...]:
    """Where a Transpose of `rank` axes takes each axis from; without `perm` it reverses them."""
    return tuple(node.attrs.get("perm", range(rank)[::-1]))


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


def is_weight(tensor: gs.Tensor) -> bool:
    """Whether the tensor is a constant of which `weight_recipe` gives the recipe."""
    return is_recipe(tensor) or array_of(tensor) is not None


def recipe_of_constant(tensor: gs.Tensor) -> Recipe:
    """The recipe of a constant that was asked for one before."""
    recipe = weight_recipe(tensor)
    assert recipe is not None
    return recipe


def number_of(tensor: gs.Tensor) -> float | None:
    """The value of a constant of one element that is in memory, of any rank; None for anything else."""
    array = array_of(tensor)
    return None if array is None or array.size != 1 else float(array.item())


def bias_add(node: gs.Node | None) -> tuple[gs.Tensor, gs.Tensor] | None:
    """(value, bias) of a node that adds a constant [channels] to a tensor (..., channels), in either order.

    A scalar or a constant of shape [1] is a bias of one channel only: to several it broadcasts.
    """
    for value, bias in either(node) if is_op(node, "Add") else ():
        shape = dims(value)
        if len(shape) > 1 and isinstance(bias, gs.Constant) and dims(bias) == shape[-1:]:
            return value, bias
    return None


def is_token_product(node: gs.Node | None) -> TypeGuard[gs.Node]:
    """Whether a node is MatMul(x, W) with x (batch, tokens, K) and one W [K, N] for all, computed or not."""
    if not is_op(node, "MatMul", rank=3):
        return False
    x, weight = node.inputs
    return len(dims(x)) == 3 and len(dims(weight)) == 2


@dataclass(frozen=True)
class Projection:
    """x W + b with constants W and b whose values are known: the nodes that compute it, and what they read.

    MatMul and Add: x (batch, tokens, K), W [K, N], b [N] or None; `total` is the Add, None without a bias.
    Gemm: x (rows, K), W [N, K], b [N]; it is `product`, and `total` is None.
    """

    product: gs.Node
    total: gs.Node | None
    x: gs.Tensor
    weight: gs.Tensor
    bias: gs.Tensor | None

    @property
    def nodes(self) -> tuple[gs.Node, ...]:
        """The nodes, the last one first."""
        return (self.product,) if self.total is None else (self.total, self.product)


def projection(node: gs.Node | None, view: View, op: str = "MatMul") -> Projection | None:
    """The projection whose last node is `node`; with `op` "Gemm", the one that such a node is by itself.

    A product and its sum with a bias are one projection when nothing else reads the product.
    """
    if op == "Gemm":
        return _gemm(node)
    found = bias_add(node)
    product = node if found is None else sole_producer(found[0], view)
    if not is_token_product(product) or not is_weight(product.inputs[1]):
        return None
    x, weight = product.inputs
    if found is None:
        return Projection(product, None, x, weight, None)
    return Projection(product, node, x, weight, found[1]) if is_weight(found[1]) else None


def _gemm(node: gs.Node | None) -> Projection | None:
    """A Gemm of x (rows, K), constant W [N, K] and a constant bias [N], neither scaled."""
    if not is_op(node, "Gemm", rank=2) or len(node.inputs) != 3:
        return None
    x, weight, bias = node.inputs
    plain = node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0
    turned = not node.attrs.get("transA", 0) and node.attrs.get("transB", 0)
    if not (plain and turned and is_weight(weight) and is_weight(bias)):
        return None
    return Projection(node, None, x, weight, bias) if list(bias.shape) == [weight.shape[0]] else None


def is_channel_norm(node: gs.Node | None) -> TypeGuard[gs.Node]:
    """Whether a node is a LayerNormalization of (batch, tokens, channels) over its channels, with one output."""
    if not is_op(node, "LayerNormalization") or len(node.outputs) != 1:
        return False
    return len(dims(node.inputs[0])) == 3 and node.attrs.get("axis", -1) in (-1, 2)


def is_per_image(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    """Whether a tensor is (batch, 1, channels) for an x of (batch, tokens, channels)."""
    shape = dims(x)
    return len(shape) == 3 and dims(tensor) == [shape[0], 1, shape[2]]


@dataclass(frozen=True)
class Cut:
    """A Slice of x along one axis, counted from the front, that takes every element from `start` to `end`."""

    x: gs.Tensor
    axis: int
    start: gs.Tensor
    end: gs.Tensor

    @property
    def takes_all(self) -> bool:
        """Whether it leaves x as it is."""
        end = number_of(self.end)
        return number_of(self.start) == 0 and end is not None and end >= END


def cut_of(node: gs.Node | None) -> Cut | None:
    """A Slice as the cut along its one constant axis, in steps of one; None for any other node."""
    if not is_op(node, "Slice") or not node.inputs[0].shape:
        return None
    x, start, end = node.inputs[:3]
    # Without axes, a Slice cuts the first ones, as many as it has starts.
    single = 0 if number_of(start) is not None else None
    axis = number_of(node.inputs[3]) if len(node.inputs) > 3 else single
    step = number_of(node.inputs[4]) if len(node.inputs) > 4 else 1
    if axis is None or step != 1:
        return None
    return Cut(x, int(axis) % len(x.shape), start, end)
