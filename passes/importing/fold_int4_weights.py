"""fold-int4-weights: a 16-bit weight that ModelOpt's INT4 export only marked is stored in INT4 blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.constants import Found, constant_feeding, relabelled
from passes.graph.edit import Edit
from passes.graph.match import View
from passes.graph.types import FLOATS
from passes.weights.recipe import Recipe, constant

BOUND = 7.0
"""ModelOpt's INT4 scale is amax / 7."""
SMALLEST = 16
"""The smallest block that TensorRT-RTX takes."""
_OPS = ("DequantizeLinear", "TRT_INT4DequantizeLinear")


@register
@dataclass(frozen=True)
class FoldInt4Weights(Pass):
    """Give a weight that is dequantized before it was ever quantized its INT4 values.

    ModelOpt exports an INT4 weight as `DequantizeLinear{axis=0, block_size=B}` of the 16-bit weight, flattened to
    rows of one block [N*K/B, B] with a scale a row [N*K/B, 1], then Reshape to [N, K]. A post-processor that the
    diffusion scripts do not run divides and packs. As it stands the node says neither what is meant (blocks lie
    along the last axis, not axis 0) nor what ONNX allows (data is not of a quantized type).

    1. float constant -> DequantizeLinear with a block size, in any domain -> Reshape or Slice becomes
       INT4 constant [N, K] -> DequantizeLinear{axis=1, block_size} with scales [N, K / block_size].
    2. K that zeros pad to whole blocks: the padding goes. One block a row is a block of K; otherwise blocks
       are halved until they divide K, and their scales repeated.
    3. Weights of another rank (convolutions), or whose blocks cross rows: the values that INT4 has, stored in the
       weight's own type; no compiler has INT4 kernels for them.

        before: Reshape(DequantizeLinear{axis=0, block_size=B}(w as rows of B, s), [N, K])
        after:  DequantizeLinear{axis=1, block_size=B}(w in INT4 [N, K], s [N, K / B])

    Declines when: the scale is computed or not one for each block; a padded weight is read with its padding. Does not
    fire when the data is computed, or there is no block size.
    """

    name: ClassVar[str] = "fold-int4-weights"

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every block dequantizer of a float constant."""
        stored, wide = list[str](), list[str]()

        def rewrite(found: _Found, edit: Edit) -> None:
            (wide if found.blocks.axis is None else stored).append(found.node.name)
            _rewrite(found, edit)

        result = Edit(graph).rewrite_each(self.match, rewrite, "weights of INT4")
        notes = [f"{len(stored)} weights stored as INT4"] if stored else []
        notes += [f"{len(wide)} weights of other ranks hold INT4 values in 16 bits"] if wide else []
        return replace(result, notes=tuple(notes))

    def match(self, node: gs.Node, view: View) -> _Found | str | None:
        """A block dequantizer of a float constant, and what reshapes its output."""
        if node.op not in _OPS or not node.attrs.get("block_size", 0):
            return None
        weight, scale = constant_feeding(node.inputs[0]), constant_feeding(node.inputs[1])
        if weight is None or weight.recipe.dtype not in FLOATS:
            return None
        size, columns = int(node.attrs["block_size"]), weight.padded or weight.recipe.shape[-1]
        rows, odd = divmod(math.prod(weight.recipe.shape[:-1]) * columns, size)
        if scale is None or odd or math.prod(scale.recipe.shape) != rows:
            shape = "computed" if scale is None else scale.recipe.shape
            return f"its scale is {shape}, and not one for each of {rows} blocks of {size}"
        output, reached, movers = relabelled(node.outputs[0], (rows, size), view)
        if weight.padded and reached != weight.recipe.shape:
            return f"the weight was padded to {weight.padded} columns and is read as {reached}"
        blocks = _layout(weight, scale.recipe, reached, size)
        return _Found(node, _module(node.name) or weight.name, output, movers, blocks)


@dataclass(frozen=True)
class _Found:
    """A dequantizer of the weight `name`, the nodes that reshape what it gives to `output`, and what to store."""

    node: gs.Node
    name: str
    output: gs.Tensor
    movers: list[gs.Node]
    blocks: _Blocks


def _rewrite(found: _Found, edit: Edit) -> None:
    """Let `output` be made by the node itself, of stored values; the nodes in between go."""
    node, name, blocks = found.node, found.name, found.blocks
    edit.remove(*found.movers)
    found.output.inputs.clear()
    node.domain, node.outputs = None, [found.output]
    if blocks.axis is None:
        # Reshape(DequantizeLinear(w, s))  ->  Identity(w rounded to INT4 values)
        held = constant(edit.names.fresh(f"{name}_int4"), blocks.rounded().cast(blocks.weight.dtype))
        node.op, node.attrs, node.inputs = "Identity", {}, [held]
        return
    # Reshape(DequantizeLinear(w, s))  ->  DequantizeLinear(w in INT4, s)
    values = constant(edit.names.fresh(f"{name}_q"), blocks.values())
    scales = constant(edit.names.fresh(f"{name}_scale"), blocks.scale)
    node.op, node.inputs = "DequantizeLinear", [values, scales]
    node.attrs = {"axis": blocks.axis, "block_size": blocks.size}


def _module(node: str) -> str:
    """The parameter's name in the torch model, from the path of its quantizer; empty when it has none."""
    path, found, _ = node.partition("/weight_quantizer/")
    return path.strip("/").replace("/", ".") + ".weight" if found else ""


@dataclass(frozen=True)
class _Blocks:
    """A float weight of blocks along its last axis, their scales, and the shape that readers see.

    `axis` is where DequantizeLinear finds the blocks; None when the values go back to float.
    """

    weight: Recipe
    scale: Recipe
    size: int
    axis: int | None
    shape: tuple[int, ...]

    def values(self) -> Recipe:
        """INT4 values by ModelOpt's own factor, 7 / amax, from the scale that the export holds, amax / 7."""
        scale = self.scale
        if scale.dtype == TensorProto.FLOAT:
            scale = scale.multiply(Recipe.of_array(np.array(BOUND, np.float32))).scale_of_amax(BOUND)
        return self.weight.quantize(scale, TensorProto.INT4, len(self.weight.shape) - 1, self.size)

    def rounded(self) -> Recipe:
        """What the INT4 values stand for."""
        return self.values().dequantize(self.scale, len(self.weight.shape) - 1, self.size).reshape(self.shape)


def _layout(weight: Found, scale: Recipe, shape: tuple[int, ...], size: int) -> _Blocks:
    """How to store a weight that is read with `shape` and has a scale for every `size` elements in order."""
    if not weight.padded and (len(shape) != 2 or shape[-1] % size):  # as rows of one block
        rows = (math.prod(shape) // size, size)
        return _Blocks(weight.recipe.reshape(rows), scale.reshape((rows[0], 1)), size, None, shape)
    columns, count = shape[-1], (weight.padded or shape[-1]) // size
    recipe, scale = weight.recipe.reshape(shape), scale.reshape((*shape[:-1], count))
    finer = columns if count == 1 else math.gcd(columns, size)
    if len(shape) != 2 or finer < SMALLEST:
        return _Blocks(recipe, scale, size, None, shape)
    if finer != size and count > 1:
        scale = scale.spread_blocks(size // finer, columns // finer)
    return _Blocks(recipe, scale, finer, 1, shape)
