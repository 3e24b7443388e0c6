"""rewrite-patches: a convolution that takes every value once becomes a matrix product over patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import onnx
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Emitter, Names, replace_found
from passes.graph.match import output_ids, recipe_of_constant, weight_recipe
from passes.weights.recipe import constant, dtype_of

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)  # what ONNX Runtime's CUDA SpaceToDepth takes


class Patches(NamedTuple):
    """A Conv over patches of `size`, the Reshape and Transpose that make (batch, tokens, N) of it, its Shapes."""

    conv: gs.Node
    reshape: gs.Node
    transpose: gs.Node
    sizes: list[gs.Node]
    size: int


@register
@dataclass(frozen=True)
class RewritePatches(Pass):
    """Write the patch embedding Conv -> Reshape -> Transpose as SpaceToDepth -> Reshape -> Transpose -> MatMul -> Add.

    Fires on a Conv of two axes in float32 or float16 whose kernel and strides are the same [p, p], without padding,
    groups and dilation, with constant weights [N, C, p, p] and a bias, and of whose output (batch, N, h, w) are read
    the tokens (batch, h * w, N) and the Shape of h and w. Moving what is in front of the product, C * p * p values a
    token, is less than moving the N behind it: 34 us for 117 in SD3.5-medium on an H200.

    Exact but for the order of sums. Sizes that p does not divide, of which Conv leaves the rest out, are an error.
    """

    name: ClassVar[str] = "rewrite-patches"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace each patch embedding."""
        names, kept = Names(graph), output_ids(graph)
        changed = replace_found(
            graph,
            lambda node: _patches(node, kept),
            lambda found, new, dead: _replace(found, names, new, dead),
        )
        return PassResult(changed, (f"{changed} convolutions",) if changed else ())


def _patches(node: gs.Node, kept: set[int]) -> Patches | None:
    """What starts at a Conv over patches, if only its tokens and their numbers are wanted."""
    size = _patch_size(node)
    if size is None or id(node.outputs[0]) in kept:
        return None
    image = node.outputs[0]
    sizes = [reader for reader in image.outputs if _is_size(reader)]
    others = [reader for reader in image.outputs if not _is_size(reader)]
    if len(others) != 1 or others[0].op != "Reshape" or others[0].inputs[0] is not image:
        return None
    flat = others[0].outputs[0]
    if len(flat.outputs) != 1 or id(flat) in kept or not _keeps_images(image, flat):
        return None
    transpose = flat.outputs[0]
    if transpose.op != "Transpose" or list(transpose.attrs.get("perm", ())) != [0, 2, 1]:
        return None
    return Patches(node, others[0], transpose, sizes, size)


def _patch_size(node: gs.Node) -> int | None:
    """p of a Conv that takes patches of [p, p] as they come."""
    if (
        node.op != "Conv"
        or len(node.inputs) != 3
        or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    ):
        return None
    x, weight, bias = node.inputs
    if weight_recipe(weight) is None or weight_recipe(bias) is None or dtype_of(x) not in _TYPES:
        return None
    (kernel, *other), attrs = weight.shape[2:], node.attrs
    same = [kernel] == other and list(attrs.get("strides", ())) == [kernel, kernel]
    plain = (
        not any(attrs.get("pads", ()))
        and attrs.get("group", 1) == 1
        and set(attrs.get("dilations", [1])) == {1}
    )
    return int(kernel) if same and plain else None


def _is_size(node: gs.Node) -> bool:
    """Whether the node gives the height or width of an image (batch, channels, height, width), and nothing else."""
    return node.op == "Shape" and node.attrs.get("start", 0) in (2, 3, -2, -1)


def _keeps_images(image: gs.Tensor, flat: gs.Tensor) -> bool:
    """Whether a Reshape of (batch, N, h, w) gave (batch, N, h * w)."""
    shape, before = list(flat.shape or ()), list(image.shape or ())
    return len(shape) == 3 and len(before) == 4 and shape[:2] == before[:2]


def _replace(found: Patches, names: Names, new: dict[int, list[gs.Node]], dead: set[int]) -> None:
    conv, p = found.conv, found.size
    x, weight, bias = conv.inputs
    dtype, (count, channels) = conv.outputs[0].dtype, weight.shape[:2]
    at = Emitter(found.transpose, names)  # whose module's value it stays; the Conv's is no more
    cut = at.emit("SpaceToDepth", [x], dtype, blocksize=p)
    before = conv.outputs[0].shape
    cut.shape = [before[0], channels * p * p, *before[2:]]
    tokens = at.emit("Transpose", [at.reshape(cut, [0, channels * p * p, -1])], dtype, perm=[0, 2, 1])
    # SpaceToDepth puts the place in the patch before the channel.
    columns = recipe_of_constant(weight).transpose((2, 3, 1, 0)).reshape((channels * p * p, count))
    value = at.emit("MatMul", [tokens, constant(names.fresh(f"{weight.name}/patches"), columns)], dtype)
    output = found.transpose.outputs[0]
    value.shape = list(output.shape or [])
    found.transpose.outputs.clear()
    at.emit_to("Add", [value, bias], [output])
    for node in found.sizes:
        node.inputs[0] = cut
    new[id(conv)] = at.nodes
    dead |= {id(node) for node in (conv, found.reshape, found.transpose)}
