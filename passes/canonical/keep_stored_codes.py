"""keep-stored-codes: a weight that its file holds quantized stays the codes of the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, Names
from passes.graph.trt_ops import DOMAIN
from passes.weights.moves import split_at_dequantize
from passes.weights.recipe import Op, Recipe, constant, dtype_of, recipe_of

_CODES = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)
_FLOAT = int(TensorProto.FLOAT)


@register
@dataclass(frozen=True)
class KeepStoredCodes(Pass):
    """Take the dequantization of a weight out of its recipe and into the graph.

    1. A constant whose recipe ends with a dequantization (and casts, transposes after it) -> its codes, and
       DequantizeLinear with the float32 scales of the file; Cast to the type that readers want. Codes with a scale for
       the tensor or for each row are stored in the layout that readers want.

        before: w = [codes, dequantize(s), cast, transpose]     after: Cast(DequantizeLinear(codes transposed, s))

    2. With scales that are dequantized themselves (NVFP4): two DequantizeLinear. With scales that are powers of two
       (MXFP8): trt::TRT_MXFP8DequantizeLinear. A Transpose follows, since blocks lie along the last axis.

    A weight that was rounded to 16 bits on the way is that no longer: hence the tolerance.

    Declines when: something else is computed after the dequantization (a LoRA, factors); the codes are of a type that
    DequantizeLinear does not take.
    """

    name: ClassVar[str] = "keep-stored-codes"
    tolerance: ClassVar[float] = 2e-2

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every constant that has a recipe."""
        edit, changed = Edit(graph), 0
        for part in edit.view.parts:
            for tensor in list(part.tensors().values()):
                recipe = recipe_of(tensor)
                if recipe is not None and tensor.outputs and id(tensor) not in edit.view.outputs:
                    changed += _visit(part, tensor, recipe, edit)
        return edit.finish({"weights kept as stored codes": changed})


def _visit(part: gs.Graph, weight: gs.Constant, recipe: Recipe, edit: Edit) -> bool:
    """Put the nodes that give `weight` in front of its first reader; whether it has codes."""
    found = split_at_dequantize(recipe)
    if found is None:
        return False
    codes, op, after = found
    if reason := _reason(codes, after):
        edit.decline(weight, reason)
        return False
    readers = {id(node) for node in weight.outputs}
    place = next(node for node in part.nodes if id(node) in readers)
    nodes = _Nodes(weight, edit.names, edit.at(place).nodes)
    edit.replace_uses(weight, nodes.dequantized(codes, op, after))
    return True


def _reason(codes: Recipe, after: tuple[Op, ...]) -> str:
    """Why a weight must stay as it is, or nothing."""
    if codes.dtype not in _CODES:
        return f"its codes are {TensorProto.DataType.Name(codes.dtype)}"
    other = next((op.name for op in after if op.name not in ("cast", "transpose")), None)
    return "" if other is None else f"its dequantized values are changed once more ({other})"


@dataclass
class _Nodes:
    """The nodes that give one weight."""

    weight: gs.Constant
    names: Names
    made: list[gs.Node]

    def dequantized(self, codes: Recipe, op: Op, after: tuple[Op, ...]) -> gs.Tensor:
        scale, blocks = Recipe.from_json(op.args["scale"]), int(op.args["block_size"])
        axis = None if op.args["axis"] is None else op.args["axis"] % len(codes.shape)
        perms = [tuple(item.args["perm"]) for item in after if item.name == "transpose"]
        if not self._is_dynamic(scale):
            for perm in perms:
                codes, scale, axis = _turned(codes, scale, axis, perm)
            attrs = {} if axis is None else {"axis": axis} | ({"block_size": blocks} if blocks else {})
            inputs = [constant(self._named("q"), codes), constant(self._named("scale"), scale)]
            out = self._emit("DequantizeLinear", inputs, _FLOAT, codes.shape, **attrs)
            return self._cast(out)
        out = self._blocks(codes, scale, blocks)
        for perm in perms:
            shape = tuple(out.shape[i] for i in perm)
            out = self._emit("Transpose", [out], dtype_of(out) or _FLOAT, shape, perm=list(perm))
        return out

    def _blocks(self, codes: Recipe, scale: Recipe, size: int) -> gs.Tensor:
        """NVFP4 or MXFP8: blocks along the last axis, in the form in which TensorRT has them."""
        values = constant(self._named("q"), codes)
        inner = Recipe(scale.source, scale.ops[:-1], scale.source.dtype, scale.shape)
        if scale.ops[-1].name == "exponent":
            scales = constant(self._named("scale"), _typed(inner, TensorProto.UINT8))
            return self._emit(
                "TRT_MXFP8DequantizeLinear",
                [values, scales],
                self.weight_type,
                codes.shape,
                domain=DOMAIN,
                axis=-1,
                block_size=size,
                output_dtype=self.weight_type,
            )
        tensor = constant(self._named("scale_2"), Recipe.from_json(scale.ops[-1].args["scale"]))
        scales = constant(self._named("scale"), _typed(inner, TensorProto.FLOAT8E4M3FN))
        wide = self._emit("DequantizeLinear", [scales, tensor], _FLOAT, scale.shape)
        out = self._emit("DequantizeLinear", [values, wide], _FLOAT, codes.shape, axis=-1, block_size=size)
        return self._cast(out)

    @staticmethod
    def _is_dynamic(scale: Recipe) -> bool:
        return bool(scale.ops) and scale.ops[-1].name in ("exponent", "dequantize")

    @property
    def weight_type(self) -> int:
        """The element type that readers want."""
        return dtype_of(self.weight) or _FLOAT

    def _named(self, suffix: str) -> str:
        return self.names.fresh(f"{self.weight.name}_{suffix}")

    def _cast(self, tensor: gs.Tensor) -> gs.Tensor:
        wanted = self.weight_type
        if wanted == _FLOAT:
            return tensor
        return self._emit("Cast", [tensor], wanted, tensor.shape, to=wanted)

    def _emit(
        self,
        op: str,
        inputs: list[gs.Tensor],
        dtype: int,
        shape: tuple[int, ...],
        domain: str | None = None,
        **attrs: object,
    ) -> gs.Tensor:
        name = self.names.fresh(f"{self.weight.name}/{op}")
        out = gs.Variable(self.names.fresh(f"{name}_out"), dtype=dtype, shape=list(shape))
        self.made.append(gs.Node(op, name, dict(attrs), inputs, [out], domain))
        return out


def _typed(recipe: Recipe, dtype: int) -> Recipe:
    """The recipe whose result is of type `dtype`, which its last operation has made."""
    return Recipe(recipe.source, recipe.ops, int(dtype), recipe.shape)


def _turned(
    codes: Recipe, scale: Recipe, axis: int | None, perm: tuple[int, ...]
) -> tuple[Recipe, Recipe, int | None]:
    """Codes, scale and axis after a transpose."""
    if axis is None:
        return codes.transpose(perm), scale, None
    if len(scale.shape) > 1:
        scale = scale.transpose(perm)
    return codes.transpose(perm), scale, perm.index(axis)
