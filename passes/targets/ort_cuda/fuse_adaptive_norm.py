"""fuse-adaptive-norm: scale and shift behind a LayerNormalization become its own scale and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Names, replace_chains
from passes.graph.match import array_of, output_ids, producer


@register
@dataclass(frozen=True)
class FuseAdaptiveNorm(Pass):
    """Write LayerNormalization(x) * scale + shift as LayerNormalization(x, scale, shift).

    Fires on the adaptive norms of diffusion transformers: x is (batch, tokens, channels), the norm has a scale of
    ones and no bias, and scale and shift are computed, each (batch, 1, channels). ONNX lets them broadcast; ONNX
    Runtime has kernels for it, TensorRT has not. A norm that several pairs scale is computed for each: that reads x
    twice, where two more operators would read and write it.

    The result is not rounded between norm, product and sum: 16-bit outputs differ in their last bits.
    """

    name: ClassVar[str] = "fuse-adaptive-norm"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the sum; product and norm go when nothing else reads them."""
        names, kept = Names(graph), output_ids(graph)

        def rewrite(node: gs.Node) -> tuple[gs.Node, list[gs.Node]] | None:
            found = _match(node, kept)
            if found is None:
                return None
            norm, product, scale, shift = found
            attrs = {**norm.attrs, "axis": 2}  # ONNX Runtime's kernels broadcast for this axis, so written
            name = names.fresh(
                f"{node.name}/LayerNormalization"
            )  # its value is that of the module of the sum
            inputs = [norm.inputs[0], scale, shift]
            return gs.Node("LayerNormalization", name, attrs=attrs, inputs=inputs), [product]

        changed = replace_chains(graph, rewrite)
        return PassResult(changed, (f"{changed} norms",) if changed else ())


def _match(node: gs.Node, kept: set[int]) -> tuple[gs.Node, gs.Node, gs.Tensor, gs.Tensor] | None:
    """Norm, product, scale and shift of a sum that ends an adaptive norm."""
    if node.op != "Add" or len(node.inputs) != 2:
        return None
    for value, shift in (node.inputs, node.inputs[::-1]):
        product = producer(value)
        if product is None or product.op != "Mul" or len(value.outputs) != 1 or id(value) in kept:
            continue
        for normed, scale in (product.inputs, product.inputs[::-1]):
            norm = producer(normed)
            if norm is None or not _plain(norm):
                continue
            if _per_image(scale, norm.inputs[0]) and _per_image(shift, norm.inputs[0]):
                return norm, product, scale, shift
    return None


def _plain(node: gs.Node) -> bool:
    """Whether the node is a LayerNormalization over the last of three axes, of scale one and without a bias."""
    if node.op != "LayerNormalization" or len(node.outputs) != 1 or len(node.inputs[0].shape or ()) != 3:
        return False
    if node.attrs.get("axis", -1) not in (-1, 2) or (len(node.inputs) > 2 and not node.inputs[2].is_empty()):
        return False
    scale = array_of(node.inputs[1])
    return scale is not None and bool(np.all(scale == 1))


def _per_image(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    """Whether the tensor is (batch, 1, channels) of x, in its type."""
    shape = tensor.shape
    if shape is None or x.shape is None or len(shape) != 3 or tensor.dtype != x.dtype:
        return False
    return bool(shape[1] == 1 and shape[2] == x.shape[2] and shape[0] == x.shape[0])
