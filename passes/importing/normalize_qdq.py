"""normalize-qdq: quantizers in any of the forms that ModelOpt writes become the canonical ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassError, PassResult, register
from passes.graph.constants import constant_feeding
from passes.graph.edit import Edit, inline
from passes.graph.match import STANDARD, array_of, is_weight, producer, recipe_of_constant, weight_recipe
from passes.graph.trt_ops import DOMAIN
from passes.graph.types import FLOATS, compute_type
from passes.weights.block_operations import E2M1_MAX, E4M3_MAX
from passes.weights.recipe import Recipe, bits_of, constant, dtype_of
from passes.weights.sources import keep, np_dtype, read

FLOAT, UINT8, INT4 = int(TensorProto.FLOAT), int(TensorProto.UINT8), int(TensorProto.INT4)
E4M3, E2M1 = int(TensorProto.FLOAT8E4M3FN), int(TensorProto.FLOAT4E2M1)
NVFP4_BOUND = E2M1_MAX * E4M3_MAX
"""ModelOpt's scale of an NVFP4 tensor is amax / (6 * 448): the largest E2M1 times the largest E4M3."""
_KINDS = ("", "TRT_FP8", "TRT_INT4")
_ATTRIBUTES = ("axis", "block_size", "saturate", "output_dtype", "precision")


@register
@dataclass(frozen=True)
class NormalizeQdq(Pass):
    """Rewrite quantizers to standard QuantizeLinear and DequantizeLinear, or TensorRT's where ONNX has none.

    1. TRT_FP8QuantizeLinear, TRT_FP8DequantizeLinear, TRT_INT4QuantizeLinear, TRT_INT4DequantizeLinear, and
       QuantizeLinear and DequantizeLinear left in a domain of TensorRT -> the standard operators, with the zero
       point of the quantized type where there are no blocks.
    2. FP8 data that is declared or stored as UINT8, block scales stored as FLOAT8E8M0 -> the type that the bytes are.
    3. A scale or zero point of shape [1] -> a scalar.
    4. TRT_FP4QDQ of a weight, the mark that an exporter should have replaced -> TRT_FP4DynamicQuantize, with
       scale amax / (6 * 448) of the weight, two DequantizeLinear, and a Cast to the weight's type.
    5. TRT_MXFP8DequantizeLinear of a float tensor, the mark of a static quantizer -> the same after
       TRT_MXFP8DynamicQuantize; its scale, always 1, goes. `output_dtype` becomes the compute type.
    6. TRT_FP4DynamicQuantize and TRT_MXFP8DynamicQuantize get their domain, default attributes and output types.

        before: TRT_FP8DequantizeLinear(q, s [1])      after: DequantizeLinear(q, s [], zero point of FLOAT8E4M3FN)

    Declines when: the data of a DequantizeLinear is a float tensor (see fold-int4-weights). PassError for
    TRT_FP4QDQ of a computed tensor: the export dropped its amax, so what it rounded to is not known.
    Constant nodes must be folded before.
    """

    name: ClassVar[str] = "normalize-qdq"

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every quantizer once."""
        work = _Work(Edit(graph), compute_type(graph))
        for part in work.edit.view.parts:
            for node in part.nodes:
                rewrite = _REWRITES.get(node.op)
                if rewrite is not None and node.domain in (*STANDARD, DOMAIN):
                    rewrite(work, node)
        return work.edit.finish(work.counts)


@dataclass
class _Work:
    """One sweep: the edit, the compute type, constants made by the `id()` of the old one and a type, and counts."""

    edit: Edit
    hp: int
    made: dict[tuple[int, int], gs.Constant] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def quantizer(self, node: gs.Node) -> None:
        """QuantizeLinear and DequantizeLinear under any name but those of dynamic blocks."""
        if node.op.endswith("DequantizeLinear") and dtype_of(node.inputs[0]) in FLOATS:
            self.edit.decline(node, "its data is a float tensor: it marks a weight that was never quantized")
            return
        # TRT_FP8QuantizeLinear(x, s)  ->  QuantizeLinear(x, s, zero point)
        kind = node.op.partition("_")[2][:4].rstrip("QD")
        node.op = node.op.removeprefix(f"TRT_{kind}")
        if kind:
            self._carry_type(node, E4M3 if kind == "FP8" else INT4)
        if kind or node.domain == DOMAIN:
            node.domain = None
            self.count("operators of TensorRT that ONNX has")
        if not node.attrs.get("block_size"):
            for index in range(1, len(node.inputs)):
                self._scalar(node, index)

    def _carry_type(self, node: gs.Node, quantized: int) -> None:
        """Say by a zero point, or an attribute, what the operator's name said."""
        node.attrs = {key: value for key, value in node.attrs.items() if key in _ATTRIBUTES}
        if node.op == "QuantizeLinear":
            node.outputs[0].dtype = quantized
        else:
            self._bytes_as(node, 0, quantized)
        if not node.attrs.get("block_size") and len(node.inputs) < 3:
            node.inputs.append(self._zero_point(quantized))
        elif node.op == "QuantizeLinear" and len(node.inputs) < 3:
            node.attrs["output_dtype"] = quantized

    def _zero_point(self, dtype: int) -> gs.Constant:
        """The scalar zero of a quantized type, one for the graph."""
        if (0, dtype) not in self.made:
            name = self.edit.names.fresh(f"zero_point_{TensorProto.DataType.Name(dtype).lower()}")
            self.made[0, dtype] = inline(name, np.zeros((), np_dtype(dtype)))
        return self.made[0, dtype]

    def _bytes_as(self, node: gs.Node, index: int, dtype: int) -> None:
        """Call the bytes of an input what they are."""
        tensor = node.inputs[index]
        if isinstance(tensor, gs.Variable):
            tensor.dtype = dtype
            return
        recipe = weight_recipe(tensor)
        if recipe is None or recipe.dtype == dtype:
            return
        key = (id(tensor), dtype)
        if key not in self.made:
            name = self.edit.names.fresh(f"{tensor.name}_{TensorProto.DataType.Name(dtype).lower()}")
            self.made[key] = constant(name, _bytes_as(recipe, dtype, node))
            self.count("weights whose bytes were declared as another type")
        node.inputs[index] = self.made[key]

    def _scalar(self, node: gs.Node, index: int) -> None:
        """Make a constant of shape [1] that serves the whole tensor a scalar."""
        tensor = node.inputs[index]
        if not isinstance(tensor, gs.Constant) or tuple(tensor.shape) != (1,):
            return
        key = (id(tensor), -1)
        if key not in self.made:
            if not is_weight(tensor):
                return
            name, array = self.edit.names.fresh(f"{tensor.name}_scalar"), array_of(tensor)
            recipe = recipe_of_constant(tensor).reshape(())
            self.made[key] = constant(name, recipe) if array is None else inline(name, array.reshape(()))
            self.count("scales of shape [1] that are scalars")
        node.inputs[index] = self.made[key]
        node.attrs.pop("axis", None)

    def nvfp4(self, node: gs.Node) -> None:
        """TRT_FP4DynamicQuantize."""
        self._scalar(node, 1)
        self._dynamic(node, (E2M1, E4M3), block_size=16, scale_type=E4M3)

    def mxfp8(self, node: gs.Node) -> None:
        """TRT_MXFP8DynamicQuantize."""
        self._dynamic(node, (E4M3, UINT8), block_size=32, output_dtype=E4M3)

    def _dynamic(self, node: gs.Node, types: tuple[int, ...], **defaults: int) -> None:
        """TensorRT's domain, attributes that may be left out, and the types that its outputs have."""
        wanted = {"axis": -1, **defaults, **node.attrs}
        stands = node.domain == DOMAIN and wanted == dict(node.attrs)
        if not stands or [dtype_of(t) for t in node.outputs] != list(types):
            self.count("dynamic quantizers typed")
        node.domain, node.attrs = DOMAIN, wanted
        for output, dtype in zip(node.outputs, types, strict=True):
            output.dtype = dtype

    def nvfp4_mark(self, node: gs.Node) -> None:
        """TRT_FP4QDQ of a weight."""
        found = constant_feeding(node.inputs[0])
        if found is None or found.padded:
            raise PassError(
                f"TRT_FP4QDQ node {node.name!r} quantizes a computed tensor, and its amax is not in the file."
                " Fix: export that quantizer as dynamic (ModelOpt's configure_linear_module_onnx_quantizers)"
            )
        # TRT_FP4QDQ(w)  ->  Cast(DQ(values, DQ(scales, s))) of values, scales = TRT_FP4DynamicQuantize(w, s)
        size, new = int(node.attrs.get("block_size", 16)), self.edit.at(node)
        amax = found.recipe.amax().scale_of_amax(NVFP4_BOUND)
        scale = constant(self.edit.names.fresh(f"{found.name}_scale_2"), amax)
        values, scales = self._outputs(node, (E2M1, E4M3))
        attrs: dict[str, Any] = {"axis": -1, "block_size": size}
        data, more = [node.inputs[0], scale], {**attrs, "scale_type": E4M3}
        new.emit_to("TRT_FP4DynamicQuantize", data, [values, scales], domain=DOMAIN, **more)
        step = new.emit("DequantizeLinear", [scales, scale], FLOAT)
        wide = new.emit("DequantizeLinear", [values, step], FLOAT, **attrs)
        node.op, node.domain, node.attrs, node.inputs = "Cast", None, {"to": found.recipe.dtype}, [wide]
        self.count("marks of NVFP4 weights expanded")

    def mxfp8_dequantizer(self, node: gs.Node) -> None:
        """TRT_MXFP8DequantizeLinear, of values and scales or as a mark."""
        attrs = {"axis": -1, "block_size": 32, **node.attrs}
        data, output = node.inputs[0], node.outputs[0]
        if dtype_of(data) in FLOATS or _computes_float(data):
            # TRT_MXFP8DequantizeLinear(x)  ->  TRT_MXFP8DequantizeLinear(TRT_MXFP8DynamicQuantize(x))
            made = self._outputs(node, (E4M3, UINT8))
            blocks = {"axis": attrs["axis"], "block_size": attrs["block_size"], "output_dtype": E4M3}
            self.edit.at(node).emit_to("TRT_MXFP8DynamicQuantize", [data], made, domain=DOMAIN, **blocks)
            node.inputs = made
            self.count("marks of MXFP8 tensors expanded")
        else:
            self._bytes_as(node, 0, E4M3)
            self._bytes_as(node, 1, UINT8)
        if attrs.get("output_dtype") != self.hp or dict(node.attrs) != attrs or node.domain != DOMAIN:
            self.count("MXFP8 dequantizers to the compute type")
        node.domain, node.attrs = DOMAIN, {**attrs, "output_dtype": self.hp}
        output.dtype = self.hp

    def _outputs(self, node: gs.Node, types: tuple[int, int]) -> list[gs.Variable]:
        pairs = zip(("values", "scales"), types, strict=True)
        return [
            gs.Variable(self.edit.names.fresh(f"{node.name}/{kind}"), dtype=dtype) for kind, dtype in pairs
        ]


def _computes_float(tensor: gs.Tensor) -> bool:
    """Whether a tensor of unknown type comes from an operator that does not quantize."""
    node = producer(tensor)
    return (
        node is not None and node.op != "TRT_MXFP8DynamicQuantize" and dtype_of(tensor) not in (E4M3, UINT8)
    )


def _bytes_as(recipe: Recipe, dtype: int, node: gs.Node) -> Recipe:
    """The same bytes as another one-byte type. Raises PassError for what is not a plain stored tensor."""
    if recipe.ops or bits_of(recipe.dtype) != bits_of(dtype):
        name = TensorProto.DataType.Name(recipe.dtype)
        raise PassError(
            f"{node.op} node {node.name!r} reads a constant of type {name}; expected stored bytes"
            ". Fix: export the model again with ModelOpt"
        )
    if recipe.source.kind == "memory":
        return keep(read(recipe.source).view(np_dtype(dtype)))
    return Recipe.of_source(replace(recipe.source, dtype=dtype))


_REWRITES: dict[str, Callable[[_Work, gs.Node], None]] = {
    **{f"{kind}{op}": _Work.quantizer for kind in _KINDS for op in ("QuantizeLinear", "DequantizeLinear")},
    "TRT_FP4DynamicQuantize": _Work.nvfp4,
    "TRT_FP4QDQ": _Work.nvfp4_mark,
    "TRT_MXFP8DynamicQuantize": _Work.mxfp8,
    "TRT_MXFP8DequantizeLinear": _Work.mxfp8_dequantizer,
}
