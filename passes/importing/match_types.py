"""match-types: inputs of an operator that must agree in type are made to agree, in the graph's compute type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassError, PassResult, register
from passes.graph.edit import Edit, Names, inline, replace_output
from passes.graph.match import STANDARD, array_of, producer
from passes.graph.types import FLOATS, HALVES, compute_type, schema_of, set_output_types, slots
from passes.weights.recipe import constant, dtype_of, recipe_of

# Operators that compute in the 16-bit type wherever one of their inputs is in it: what makes up the run time, and
# normalizations, which accumulate in float32 whatever the type of their input.
_MATMULS = frozenset(["MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Attention", "RotaryEmbedding"])
_NORMS = frozenset(
    [
        "LayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "RMSNormalization",
        "BatchNormalization",
    ]
)
# Type variables that ONNX keeps apart and compilers do not.
_JOINED: Mapping[str, tuple[str, str]] = {
    "Pow": ("T", "T1"),
    "Attention": ("T1", "T2"),
    "RMSNormalization": ("T", "V"),
}
_BLOCK_QUANTIZERS = ("TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize")
_STORED = (TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4)


@register
@dataclass(frozen=True)
class MatchTypes(Pass):
    """Insert the Casts that a strongly typed compiler wants, and drop those that lose and gain nothing.

    The compute type is the 16-bit type of the inputs, else of the weights; in a float32 graph nothing fires.

    1. Operator inputs that must have one type and do not (LayerNormalization, Add, MatMul, Gemm, Concat ...):
       a Cast on a computed tensor, another stored type for a constant. To the compute type in front of matrix
       products, convolutions and normalizations, and where only constants are wider; to float32 where a
       computed float32 tensor meets a 16-bit one elsewhere (rotary positions, sinusoids), as torch promotes.
    2. Scale of QuantizeLinear and DequantizeLinear, a constant -> in the compute type, unless it would leave
       the type's normal range. Not the scales of block scales, nor those of FLOAT4E2M1 values (float32).
    3. 16-bit tensor -> Cast to float32 -> Cast back, matrix product or block quantizer: reads the tensor itself.
    4. A graph output whose computed type is another than it declares gets a Cast, so that callers see no change.

    Types of all tensors are found anew from the graph's inputs and constants: what exporters write is not trusted.
    Operators of other domains must have typed outputs.
    """

    name: ClassVar[str] = "match-types"
    tolerance: ClassVar[float] = 3e-2

    def run(self, graph: gs.Graph) -> PassResult:
        """One sweep in graph order; bodies of If, Loop and Scan where they stand."""
        declared = {id(tensor): dtype_of(tensor) for tensor in graph.outputs}
        work = _Work(Edit(graph), compute_type(graph), declared)
        work.sweep(graph)
        work.keep_outputs(graph)
        return work.edit.finish(work.counts)


@dataclass
class _Work:
    """The edit, the compute type, types that outputs declare, what was made by tensor and type, and counts."""

    edit: Edit
    hp: int
    declared: dict[int, int | None]
    counts: dict[str, int] = field(default_factory=dict)
    _made: dict[tuple[int, int], gs.Tensor] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def sweep(self, graph: gs.Graph) -> None:
        """Match and type every node of one graph."""
        for node in graph.nodes:
            for body in (value for value in node.attrs.values() if isinstance(value, gs.Graph)):
                outer, self._made = self._made, dict(self._made)  # a Cast made in a body is not seen outside
                self.sweep(body)
                self._made = outer
            self._skip_widening(node)
            self._scales(node)
            for index, to in self._wanted(node):
                self._convert(node, index, to)
            set_output_types(node)

    def _wanted(self, node: gs.Node) -> Iterator[tuple[int, int]]:
        """Inputs that must change, with the type that they must have."""
        schema = schema_of(node.op) if node.domain in STANDARD else None
        if schema is None or node.op in ("QuantizeLinear", "DequantizeLinear"):
            return
        one, other = _JOINED.get(node.op, ("", ""))
        found = [(one if s.type_str == other else s.type_str, s.index) for s in slots(node, schema)]
        for _, group in groupby(sorted(found), key=lambda pair: pair[0]):
            indices = [i for _, i in group if dtype_of(node.inputs[i]) in FLOATS]
            types = {dtype_of(node.inputs[i]) for i in indices}
            if len(types) < 2:
                continue
            to = self._target(node, indices)
            yield from ((i, to) for i in indices if dtype_of(node.inputs[i]) != to)

    def _target(self, node: gs.Node, indices: Iterable[int]) -> int:
        """The one type for inputs of several float types."""
        tensors = [node.inputs[i] for i in indices]
        computed = {dtype_of(t) for t in tensors if isinstance(t, gs.Variable)}
        halves = [t for t in tensors if dtype_of(t) in HALVES]
        wide = TensorProto.FLOAT in computed or TensorProto.DOUBLE in computed
        if not halves or (wide and node.op not in _MATMULS | _NORMS):
            return int(TensorProto.FLOAT)
        return self.hp

    def _convert(self, node: gs.Node, index: int, to: int) -> None:
        """Let input `index` have type `to`: another constant, or a Cast in front of the node."""
        tensor = node.inputs[index]
        key = (id(tensor), to)
        if key not in self._made:
            if isinstance(tensor, gs.Constant):
                self._made[key] = _cast_constant(tensor, to, self.edit.names)
                self.count("constants stored in the type of what they meet")
            else:
                self._made[key] = self._cast(tensor, to, node)
                self.count("casts added")
        node.inputs[index] = self._made[key]

    def _cast(self, tensor: gs.Tensor, to: int, reader: gs.Node) -> gs.Tensor:
        """Reader(x)  ->  Reader(Cast(x))"""
        name = self.edit.names.fresh(f"{tensor.name}/to_{TensorProto.DataType.Name(to).lower()}")
        out = gs.Variable(f"{name}_out", dtype=to, shape=tensor.shape)
        self.edit.at(reader).nodes.append(gs.Node("Cast", name, {"to": to}, [tensor], [out]))
        return out

    def _skip_widening(self, node: gs.Node) -> None:
        """Read the 16-bit tensor in front of a Cast to float32, where the node takes it."""
        first_only = node.op in _BLOCK_QUANTIZERS or (node.op == "Cast" and int(node.attrs["to"]) == self.hp)
        if not first_only and not (
            node.op in _MATMULS and self.hp in [dtype_of(tensor) for tensor in node.inputs]
        ):
            return
        for index in [0] if first_only else range(len(node.inputs)):
            narrow = self._narrow(node.inputs[index])
            if narrow is not None:
                node.inputs[index] = narrow
                self.count("casts that lose nothing skipped")

    def _narrow(self, tensor: gs.Tensor) -> gs.Tensor | None:
        """What a Cast from the 16-bit compute type to float32 reads; None for anything else."""
        node = producer(tensor)
        if node is None or node.op != "Cast" or int(node.attrs["to"]) != TensorProto.FLOAT:
            return None
        return node.inputs[0] if dtype_of(node.inputs[0]) == self.hp and self.hp in HALVES else None

    def _scales(self, node: gs.Node) -> None:
        """Give the constant scale of a standard quantizer the compute type."""
        if node.op not in ("QuantizeLinear", "DequantizeLinear"):
            return
        scale = node.inputs[1]
        is_float = isinstance(scale, gs.Constant) and dtype_of(scale) == TensorProto.FLOAT
        if not is_float or self.hp not in HALVES:
            return
        if self._stays_wide(node) or not _in_range(scale, self.hp):
            return
        key = (id(scale), self.hp)
        if key not in self._made:
            self._made[key] = _cast_constant(scale, self.hp, self.edit.names)
        self.count("scales in the compute type")
        node.inputs[1] = self._made[key]

    def _stays_wide(self, node: gs.Node) -> bool:
        """Whether a quantizer works in float32 by design."""
        data = node.inputs[0]
        if node.op == "QuantizeLinear":
            narrow = self._narrow(data)
            if narrow is not None:
                node.inputs[0] = narrow
                self.count("casts that lose nothing skipped")
            return dtype_of(node.inputs[0]) == TensorProto.FLOAT
        quantizer = producer(data)
        if quantizer is not None and quantizer.op == "QuantizeLinear":
            return dtype_of(quantizer.inputs[1]) == TensorProto.FLOAT
        return dtype_of(data) not in _STORED or any(
            user.op == "DequantizeLinear" and user.inputs[1] is node.outputs[0]
            for user in node.outputs[0].outputs
        )

    def keep_outputs(self, graph: gs.Graph) -> None:
        """Cast graph outputs back to the type that they declare."""
        for tensor in graph.outputs:
            declared, found, node = self.declared[id(tensor)], dtype_of(tensor), producer(tensor)
            if node is None or not declared or not found or declared == found:
                continue
            # y = Op(x), of another type  ->  y = Cast(Op(x)), at the end of the graph
            names = self.edit.names
            inner = gs.Variable(names.fresh(f"{tensor.name}/computed"), dtype=found, shape=tensor.shape)
            self.edit.replace_uses(tensor, inner)
            replace_output(node, tensor, inner)
            tensor.dtype = declared
            cast = gs.Node("Cast", names.fresh(f"{tensor.name}/Cast"), {"to": declared}, [inner], [tensor])
            self.edit.at(graph.nodes[-1], after=True).nodes.append(cast)
            self.count("outputs cast to the type that they declare")


def _cast_constant(tensor: gs.Constant, to: int, names: Names) -> gs.Constant:
    """The constant in another type, under a name of its own."""
    name = names.fresh(f"{tensor.name}_{TensorProto.DataType.Name(to).lower()}")
    recipe = recipe_of(tensor)
    if recipe is not None:
        return constant(name, recipe.cast(to))
    array = array_of(tensor)
    if array is None:
        raise PassError(
            f"weight {tensor.name!r} is in an external file. Fix: load the model with passes.storage.load"
        )
    return inline(name, array.astype(onnx.helper.tensor_dtype_to_np_dtype(to)))


def _in_range(scale: gs.Constant, to: int) -> bool:
    """Whether a scale stays a normal number: float16 has few exponents. Scales kept as recipes are taken to."""
    array = array_of(scale)
    if array is None or to != TensorProto.FLOAT16:
        return True
    limits = np.finfo(np.float16)
    wide = np.abs(array.astype(np.float64))
    return bool(np.all((wide >= limits.tiny) & (wide <= limits.max)))
