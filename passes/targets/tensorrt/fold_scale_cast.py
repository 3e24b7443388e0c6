"""fold-scale-cast: DequantizeLinear with float32 scales gives the 16-bit type itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import View, is_op, is_weight, producer, weight_recipe
from passes.weights.recipe import constant, dtype_of

_WIDE, _NARROW = TensorProto.FLOAT, (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_STORED = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)


@register
@dataclass(frozen=True)
class FoldScaleCast(Pass):
    """Let a DequantizeLinear of a stored weight have `output_dtype`, which TensorRT fuses into the product.

        before: Cast(DequantizeLinear(codes, s float32), to=bfloat16)
        after:  DequantizeLinear(codes, s float32, output_dtype=bfloat16)

    Scales stay float32, as the file has them. The compiler wants both factors of a product to have scales of one type
    ("type mismatch between matmul operand scales"), so the scales of inputs become float32 as well:

        before: DequantizeLinear(QuantizeLinear(x, t bfloat16), t bfloat16)
        after:  DequantizeLinear(QuantizeLinear(x, t float32), t float32, output_dtype=bfloat16)

    ONNX Runtime 1.31 does not take this form.

    Declines when: anything but the Cast reads the float32 weight; there are blocks, whose scales TensorRT wants in the
    type of the result. FP4 stays as it is: TensorRT has a form of its own for it.
    """

    name: ClassVar[str] = "fold-scale-cast"

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every Cast on a dequantized constant."""
        result = Edit(graph).rewrite_each(_wide, _fold, "casts folded into DequantizeLinear")
        if not result.changed:
            return result
        widened = _widen_inputs(Edit(graph))
        notes = (*result.notes, f"{widened} quantizers with float32 scales") if widened else result.notes
        return PassResult(result.changed + widened, notes, result.refusals)


def _wide(cast: gs.Node, view: View) -> gs.Node | str | None:
    """The DequantizeLinear of a stored weight that a Cast to 16 bits reads; a reason where the two must stay."""
    wide = producer(cast.inputs[0]) if is_op(cast, "Cast") else None
    if not is_op(wide, "DequantizeLinear") or not is_weight(wide.inputs[0]):
        return None
    if int(cast.attrs["to"]) not in _NARROW or dtype_of(wide.inputs[1]) != _WIDE:
        return None
    if dtype_of(wide.inputs[0]) not in _STORED:
        return None
    if wide.attrs.get("block_size"):
        return "its scales are of blocks"
    return wide if view.is_sole(wide.outputs[0]) else "its float32 result has another reader"


def _fold(wide: gs.Node, edit: Edit) -> None:
    (cast,) = wide.outputs[0].outputs
    wide.attrs["output_dtype"] = int(cast.attrs["to"])
    wide.outputs = edit.release(cast)


def _widen_inputs(edit: Edit) -> int:
    """Give the quantizers of computed tensors scales in float32, the same values; how many there are."""
    made: dict[int, gs.Constant] = {}
    count = 0
    for node in (node for part in edit.view.parts for node in part.nodes):
        if not (is_op(node, "QuantizeLinear") or is_op(node, "DequantizeLinear")) or is_weight(
            node.inputs[0]
        ):
            continue
        scale, dtype = node.inputs[1], dtype_of(node.inputs[1])
        if node.attrs.get("block_size") or dtype not in _NARROW or (recipe := weight_recipe(scale)) is None:
            continue
        if id(scale) not in made:
            made[id(scale)] = constant(edit.names.fresh(f"{scale.name}_float32"), recipe.cast(_WIDE))
        node.inputs[1] = made[id(scale)]
        if node.op == "DequantizeLinear":
            node.attrs["output_dtype"] = int(dtype)
        count += 1
    return count
