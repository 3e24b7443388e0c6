"""fold-int4-weights: a 16-bit weight that ModelOpt's INT4 export only marked is stored in INT4 blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.constants import Found, constant_feeding, relabelled
from passes.graph.edit import Names, drop_nodes
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

    Not when data or scale is computed, or there is no block size.
    """

    name: ClassVar[str] = "fold-int4-weights"

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every block dequantizer of a float constant."""
        work = _Work(Names(graph))
        for part in walk(graph):
            for node in list(part.nodes):
                if node.op in _OPS and node.attrs.get("block_size", 0):
                    work.visit(node)
        drop_nodes(graph, work.dead)
        notes = [f"{work.stored} weights stored as INT4"] if work.stored else []
        notes += [f"{work.wide} weights of other ranks hold INT4 values in 16 bits"] if work.wide else []
        return PassResult(work.stored + work.wide, tuple(notes), tuple(work.refusals))


@dataclass
class _Work:
    """One sweep: fresh names, what to drop, counts and refusals."""

    names: Names
    dead: set[int] = field(default_factory=set)
    stored: int = 0
    wide: int = 0
    refusals: list[Refusal] = field(default_factory=list)

    def visit(self, node: gs.Node) -> None:
        """Replace one dequantizer and what reshapes its output."""
        weight, scale = constant_feeding(node.inputs[0]), constant_feeding(node.inputs[1])
        if weight is None or weight.recipe.dtype not in FLOATS:
            return
        size = int(node.attrs["block_size"])
        rows, odd = divmod(
            math.prod(weight.recipe.shape[:-1]) * (weight.padded or weight.recipe.shape[-1]), size
        )
        if scale is None or odd or math.prod(scale.recipe.shape) != rows:
            shape = "computed" if scale is None else scale.recipe.shape
            reason = f"its scale is {shape}, and not one for each of {rows} blocks of {size}"
            self.refusals.append(Refusal(node.name, reason))
            return
        output, shape = relabelled(node.outputs[0], (rows, size))
        if weight.padded and shape != weight.recipe.shape:
            reason = f"the weight was padded to {weight.padded} columns and is read as {shape}"
            self.refusals.append(Refusal(node.name, reason))
            return
        self._replace(node, output, _layout(weight, scale.recipe, shape, size), weight)

    def _replace(self, node: gs.Node, output: gs.Tensor, blocks: _Blocks, weight: Found) -> None:
        """Let `output` be made by the node itself, of stored values; drop the nodes in between."""
        name = _module(node.name) or weight.name
        tensor = node.outputs[0]
        while tensor is not output:
            mover = tensor.outputs[0]
            self.dead.add(id(mover))
            tensor = mover.outputs[0]
        output.inputs.clear()
        node.domain, node.outputs = None, [output]
        if blocks.axis is None:
            held = constant(self.names.fresh(f"{name}_int4"), blocks.rounded().cast(weight.recipe.dtype))
            node.op, node.attrs, node.inputs = "Identity", {}, [held]
            self.wide += 1
            return
        values = constant(self.names.fresh(f"{name}_q"), blocks.values())
        scales = constant(self.names.fresh(f"{name}_scale"), blocks.scale)
        node.op, node.inputs = "DequantizeLinear", [values, scales]
        node.attrs = {"axis": blocks.axis, "block_size": blocks.size}
        self.stored += 1


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
