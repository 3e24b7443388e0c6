"""The layers of a torch model in a graph: the parameters by the names that they had in torch, whatever became of them.

An exporter keeps a layer's path in the name of its node (`a.b/MatMul`; the older one `/a/b/MatMul`) and often in that
of its weight (`a.b.weight`). The weight may be transposed, as MatMul wants it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from passes.base import walk
from passes.graph.constants import constant_feeding
from passes.graph.match import producer, static_shape, weight_recipe
from passes.weights.recipe import Recipe, dtype_of

_QUANTIZERS = re.compile(r".*(Quantize|DequantizeLinear|DynamicQuantize|MatMulNBits).*")
_PARAMETER = re.compile(r"(.+\.(?:weight|bias|scale_shift_table))(?:_\d+)?")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "FusedMatMul")


@dataclass(frozen=True)
class Parameter:
    """A parameter where a node reads it: input `index` of `node`.

    `recipe` gives it as the node reads it; None when it is quantized. `transposed`: torch has rows for its columns.
    """

    name: str
    node: gs.Node
    index: int
    recipe: Recipe | None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that torch has; empty when it is not known."""
        read = (
            self.recipe.shape if self.recipe is not None else static_shape(self.node.inputs[self.index]) or ()
        )
        return tuple(reversed(read)) if self.transposed else read

    @property
    def dtype(self) -> int:
        """The element type in which the node reads it."""
        known = dtype_of(self.node.inputs[self.index])
        return known or (self.recipe.dtype if self.recipe is not None else 0)


def parameters_of(graph: gs.Graph) -> Iterator[Parameter]:
    """Every parameter of a layer: weights of products and convolutions, biases, weights of norms."""
    for part in walk(graph):
        for node in part.nodes:
            if node.op in _PRODUCTS:
                yield from _of_product(node)
            elif node.op == "Add":
                yield from _of_sum(node)
            else:
                yield from _by_name(node, range(len(node.inputs)))


def path_of(node: gs.Node) -> str:
    """The path of the module that a node belongs to; empty when its name tells none."""
    path, slash, _ = node.name.rpartition("/")
    return path.strip("/").replace("/", ".") if slash else ""


def _of_product(node: gs.Node) -> Iterator[Parameter]:
    if len(node.inputs) < 2:
        return
    tensor = node.inputs[1]
    source, turned = _before_transpose(tensor)
    own = _parameter_name(source.name)
    path = own[: -len(".weight")] if own.endswith(".weight") else path_of(node)
    by_columns = node.op != "Conv" and not node.attrs.get("transB")
    if path and _is_quantized(source):
        yield Parameter(f"{path}.weight", node, 1, None, transposed=by_columns)
    elif path and (found := constant_feeding(source)) is not None:
        recipe = found.recipe.transpose((1, 0)) if turned else found.recipe
        if len(recipe.shape) >= 2 and not found.padded and (node.op == "Conv" or len(recipe.shape) == 2):
            yield Parameter(f"{path}.weight", node, 1, recipe, transposed=by_columns)
    bias = weight_recipe(node.inputs[2]) if path and len(node.inputs) > 2 else None
    if bias is not None:
        yield Parameter(f"{path}.bias", node, 2, bias)


def _before_transpose(tensor: gs.Tensor) -> tuple[gs.Tensor, bool]:
    node = producer(tensor)
    if node is not None and node.op == "Transpose" and node.attrs.get("perm") in (None, [1, 0]):
        return node.inputs[0], True
    return tensor, False


def _is_quantized(tensor: gs.Tensor) -> bool:
    """Whether a constant reaches `tensor` through quantizers."""
    node = producer(tensor)
    while node is not None and node.inputs:
        if _QUANTIZERS.fullmatch(node.op):
            return True
        if node.op not in ("Cast", "Identity", "Reshape", "Transpose"):
            return False
        node = producer(node.inputs[0])
    return False


def _of_sum(node: gs.Node) -> Iterator[Parameter]:
    """The bias that a module adds to its product."""
    named = list(_by_name(node, range(2)))
    yield from named
    path = path_of(node)
    for index in range(2) if path and not named and len(node.inputs) == 2 else ():
        recipe = weight_recipe(node.inputs[index])
        made = producer(node.inputs[1 - index])
        product = made is not None and made.op in _PRODUCTS and path_of(made) == path
        if recipe is not None and len(recipe.shape) == 1 and product:
            yield Parameter(f"{path}.bias", node, index, recipe)


def _by_name(node: gs.Node, places: range) -> Iterator[Parameter]:
    for index in places:
        name = _parameter_name(node.inputs[index].name)
        if name and (recipe := weight_recipe(node.inputs[index])) is not None:
            yield Parameter(name, node, index, recipe)


def _parameter_name(name: str) -> str:
    """The name without the number that a pass may have added; empty when it is not a parameter's."""
    match = _PARAMETER.fullmatch(name)
    return match[1] if match else ""
