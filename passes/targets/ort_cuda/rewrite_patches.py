"""rewrite-patches: a convolution that takes every value once becomes a matrix product over patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import View, dims, is_op, is_weight, recipe_of_constant, sole_reader
from passes.weights.recipe import constant, dtype_of

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)  # what ONNX Runtime's CUDA SpaceToDepth takes


@dataclass(frozen=True)
class Patches:
    """A Conv over patches of `size`, the Reshape and Transpose that make (batch, tokens, N) of it, its Shapes."""

    conv: gs.Node
    reshape: gs.Node
    transpose: gs.Node
    sizes: list[gs.Node]
    size: int


@register
@dataclass(frozen=True)
class RewritePatches(Pass):
    """Write the patch embedding of an image as a matrix product.

        before: Transpose(Reshape(Conv(x, W, b)))
        after:  Add(MatMul(Transpose(Reshape(SpaceToDepth(x))), W), b)

    On a Conv of two axes in float32 or float16 whose kernel and strides are the same [p, p], without padding, groups
    and dilation, with constant weights [N, C, p, p] and a bias, and of whose output (batch, N, h, w) are read the
    tokens (batch, h * w, N) and the Shape of h and w. Moving what is before the product, C * p * p values a token, is
    less than moving the N after it: 34 us for 117 in SD3.5-medium on an H200.

    Declines when: something else reads the output, or the Reshape of it does anything but join h and w.

    Exact but for the order of sums. Sizes that p does not divide, of which Conv leaves the rest out, are an error.
    """

    name: ClassVar[str] = "rewrite-patches"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace each patch embedding."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "convolutions")

    def match(self, node: gs.Node, view: View) -> Patches | str | None:
        """What starts at a Conv over patches, if only its tokens and their numbers are wanted."""
        size = _patch_size(node)
        if size is None:
            return None
        image = node.outputs[0]
        sizes = [reader for reader in image.outputs if _is_size(reader)]
        others = [reader for reader in image.outputs if not _is_size(reader)]
        if id(image) in view.outputs or len(others) != 1 or not is_op(others[0], "Reshape", rank=3):
            return "something else than its tokens and sizes is read"
        flat = others[0].outputs[0]
        transpose = sole_reader(flat, view)
        if not is_op(transpose, "Transpose") or list(transpose.attrs.get("perm", ())) != [0, 2, 1]:
            return "what it gives is not transposed to (batch, tokens, channels)"
        if len(dims(image)) != 4 or dims(flat)[:2] != dims(image)[:2]:
            return "the Reshape does not keep batch and channels"
        return Patches(node, others[0], transpose, sizes, size)

    def rewrite(self, found: Patches, edit: Edit) -> None:
        """Cut patches first, then multiply: the value is that of the Transpose's module, the Conv's goes."""
        conv, p = found.conv, found.size
        (x, weight, bias), (image,) = conv.inputs, conv.outputs
        dtype, (count, channels) = image.dtype, weight.shape[:2]
        new = edit.at(conv, named=found.transpose)
        # (batch, C, H, W) -> (batch, C * p * p, h, w) -> (batch, C * p * p, h * w) -> (batch, h * w, C * p * p)
        width = channels * p * p
        cut = new.emit("SpaceToDepth", [x], dtype, [image.shape[0], width, *image.shape[2:]], blocksize=p)
        tokens = new.emit("Transpose", [new.reshape(cut, [0, width, -1])], dtype, perm=[0, 2, 1])
        # SpaceToDepth puts the place in the patch before the channel.
        columns = recipe_of_constant(weight).transpose((2, 3, 1, 0)).reshape((width, count))
        matrix = constant(new.names.fresh(f"{weight.name}/patches"), columns)
        value = new.emit("MatMul", [tokens, matrix], dtype, dims(found.transpose.outputs[0]))
        new.emit_to("Add", [value, bias], edit.release(found.transpose))
        for node in found.sizes:  # h and w are the same after the cut
            node.inputs[0] = cut
        edit.remove(conv, found.reshape)


def _patch_size(node: gs.Node) -> int | None:
    """p of a Conv that takes patches of [p, p] as they come."""
    if not is_op(node, "Conv") or len(node.inputs) != 3:
        return None
    (x, weight, bias), attrs = node.inputs, node.attrs
    if not is_weight(weight) or not is_weight(bias) or dtype_of(x) not in _TYPES:
        return None
    kernel, *other = weight.shape[2:]
    same = [kernel] == other and list(attrs.get("strides", ())) == [kernel, kernel]
    padded = any(attrs.get("pads", ())) or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    plain = attrs.get("group", 1) == 1 and set(attrs.get("dilations", [1])) == {1}
    return int(kernel) if same and plain and not padded else None


def _is_size(node: gs.Node) -> bool:
    """Whether the node gives the height or width of an image (batch, channels, height, width), and nothing else."""
    return is_op(node, "Shape") and node.attrs.get("start", 0) in (2, 3, -2, -1)
