"""fold-constants: what is known before run time becomes an inline constant; no-ops disappear."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, inline_values
from passes.graph.inference import fill_types
from passes.graph.match import STANDARD, array_of, constant_value, is_recipe, producer, static_shape
from passes.graph.to_onnx import export_model
from passes.weights.recipe import Array, dtype_of

# Deterministic operators that are cheap on small tensors. Quantization and anything with a body stay out.
_MATH = "Abs Add Ceil Cos Div Exp Floor Log Max Min Mod Mul Neg Pow Reciprocal Round Sin Sqrt Sub"
# numpy's float32 versions are off by a bit now and then, which an embedding multiplies by timesteps of 1000.
_WIDENED = frozenset({"Cos", "Exp", "Log", "Pow", "Sin"})
_LOGIC = "And Equal Greater GreaterOrEqual Less LessOrEqual Not Or Where"
_LAYOUT = "Concat Expand Flatten Gather Reshape Slice Split Squeeze Tile Transpose Unsqueeze"
_OTHER = "Cast CastLike ConstantOfShape Range ReduceMax ReduceMin ReduceProd ReduceSum Size"
FOLDABLE = frozenset(f"{_MATH} {_LOGIC} {_LAYOUT} {_OTHER}".split())
# Those whose output can be far larger than their inputs.
_GROWS = frozenset({"ConstantOfShape", "Expand", "Range", "Tile"})


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate what does not depend on the inputs, and remove nodes that do nothing.

    1. Constant node -> initializer.
    2. Node of a fixed list of operators whose inputs are all inline constants -> its value, when inputs
       and output have at most `max_elements` elements.
    3. Shape of a tensor whose asked dimensions are static, and Gather or Slice that pick only static
       dimensions of such a shape -> their value.
    4. Identity, Cast and CastLike to the type that it has, Reshape to the static shape that it has,
       Transpose that permutes nothing, Concat of one tensor -> a wire.
    5. CastLike to a tensor of known type -> Cast.

    before: Reshape(x, Concat(Gather(Shape(x), 0), [8]))      after: Reshape(x, [2, 8]) where x is [2, 4, 2]

    Folding makes more dimensions static, so types are inferred again until nothing folds.

    Declines when: an input is a recipe or is not known; the operator quantizes, or has a body; the node makes an
    output of the graph or of a body.
    """

    name: ClassVar[str] = "fold-constants"
    max_elements: int = 65536

    def run(self, graph: gs.Graph) -> PassResult:
        """Sweep front to back, so that a chain folds in one sweep, until a sweep folds nothing."""
        fold = _Fold(graph.opset, self.max_elements)
        while fold.sweep(Edit(graph)):
            fill_types(graph, export_model(graph))
        notes = (f"{fold.folded} folded, {fold.wired} no-ops removed",) if fold.changed else ()
        return PassResult(fold.changed, notes)


@dataclass
class _Fold:
    """The sweeps over a graph: what may fold, and counters."""

    opset: int
    limit: int
    folded: int = 0
    wired: int = 0
    cast_like: int = 0

    @property
    def changed(self) -> int:
        return self.folded + self.wired + self.cast_like

    def sweep(self, edit: Edit) -> bool:
        """Visit every node once; whether anything changed."""
        before = self.changed
        for part in edit.view.parts:
            for node in part.nodes:
                self.visit(node, edit)
        edit.apply()
        return self.changed > before

    def visit(self, node: gs.Node, edit: Edit) -> None:
        if node.domain not in STANDARD or any(id(t) in edit.view.outputs for t in node.outputs):
            return
        if node.op == "CastLike":
            self._to_cast(node)
        values = self._values(node)
        if values is not None:
            # Add(1, 2)  ->  3
            for tensor, value in zip(node.outputs, values, strict=True):
                _set_constant(tensor, value)
            self.folded += 1
        elif _is_noop(node):
            # Identity(x), Cast(x) to its own type ...  ->  x
            edit.replace_uses(node.outputs[0], node.inputs[0])
            self.wired += 1
        else:
            return
        edit.remove(node)

    def _to_cast(self, node: gs.Node) -> None:
        """CastLike(x, like)  ->  Cast(x)"""
        target = dtype_of(node.inputs[1])
        if target is None:
            return
        node.op = "Cast"
        node.attrs["to"] = target
        del node.inputs[1]
        self.cast_like += 1

    def _values(self, node: gs.Node) -> list[Array] | None:
        """The outputs of a node when they are known, else None."""
        if node.op == "Constant":
            value = constant_value(node)
            return None if value is None else [value]
        if node.op == "Shape":
            dims = _known_dims(node)
            return None if dims is None or None in dims else [np.array(dims, np.int64)]
        if node.op in ("Gather", "Slice") and (picked := _picked_dims(node, self.opset)) is not None:
            return [picked]
        return self._evaluate(node) if node.op in FOLDABLE else None

    def _evaluate(self, node: gs.Node) -> list[Array] | None:
        if not all(t.is_empty() or (isinstance(t, gs.Constant) and not is_recipe(t)) for t in node.inputs):
            return None
        if any(not t.is_empty() and np.prod(t.shape, dtype=np.int64) > self.limit for t in node.inputs):
            return None
        if node.op in _GROWS and not self._small(node.outputs[0]):
            return None
        arrays = [None if t.is_empty() else array_of(t) for t in node.inputs]
        if any(a is None and not t.is_empty() for a, t in zip(arrays, node.inputs, strict=True)):
            return None
        return evaluate_node(node, arrays, self.opset)

    def _small(self, tensor: gs.Tensor) -> bool:
        shape = static_shape(tensor)
        return shape is not None and int(np.prod(shape, dtype=np.int64)) <= self.limit


def evaluate_node(node: gs.Node, arrays: list[Array | None], opset: int) -> list[Array]:
    """The outputs of one node by the ONNX reference implementation. `arrays` has None for omitted inputs.

    Transcendental functions are computed in float64 and rounded once.
    """
    names = [f"i{index}" if array is not None else "" for index, array in enumerate(arrays)]
    outputs = [f"o{index}" for index in range(len(node.outputs))]
    proto = onnx.helper.make_node(node.op, names, outputs)
    proto.attribute.extend(gs.exporters.onnx_exporter.OnnxExporter.export_attributes(node.attrs))
    feeds = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
    if sum(array.nbytes for array in feeds.values()) > _SMALL:
        return _run_reference(proto, feeds, opset)
    # The same few small sums stand in every block of a backbone.
    content = tuple((a.dtype, a.shape, a.tobytes()) for a in feeds.values())
    return list(_remembered(proto.SerializeToString(), content, opset))


_SMALL = 1024
"""Bytes of inputs up to which the outputs of a node are remembered."""


@lru_cache(4096)
def _remembered(
    node: bytes, feeds: tuple[tuple[np.dtype[Any], tuple[int, ...], bytes], ...], opset: int
) -> list[Array]:
    proto = onnx.NodeProto.FromString(node)
    arrays = [np.frombuffer(content, dtype).reshape(shape) for dtype, shape, content in feeds]
    names = [name for name in proto.input if name]
    return _run_reference(proto, dict(zip(names, arrays, strict=True)), opset)


def _run_reference(node: onnx.NodeProto, feeds: dict[str, Array], opset: int) -> list[Array]:
    evaluator = ReferenceEvaluator(node, opsets={"": opset})
    kinds = {array.dtype for array in feeds.values()}
    if node.op_type in _WIDENED and len(kinds) == 1 and (kind := kinds.pop()).kind in "fV":
        results = evaluator.run(None, {name: array.astype(np.float64) for name, array in feeds.items()})
        return [np.asarray(result).astype(kind) for result in results]
    return [np.asarray(result) for result in evaluator.run(None, feeds)]


def _set_constant(tensor: gs.Tensor, value: Array) -> None:
    """Turn a variable into an inline constant where it stands: all consumers see it."""
    tensor.to_constant(inline_values(tensor.name, value))


def _known_dims(node: gs.Node) -> list[int | None] | None:
    """What a Shape node gives, None for a dynamic dimension; None when even the rank is unknown."""
    shape = node.inputs[0].shape
    if shape is None:
        return None
    dims = [int(d) if isinstance(d, (int, np.integer)) and d >= 0 else None for d in shape]
    return dims[slice(node.attrs.get("start", 0), node.attrs.get("end"))]


def _picked_dims(node: gs.Node, opset: int) -> Array | None:
    """The dimensions that a constant Gather or Slice picks from a Shape, when all are static."""
    source = producer(node.inputs[0])
    dims = _known_dims(source) if source is not None and source.op == "Shape" else None
    if dims is None:
        return None
    arguments = [array_of(t) for t in node.inputs[1:]]
    if any(array is None for array in arguments):
        return None
    indices = arguments[0] if node.op == "Gather" else None
    if indices is not None and np.any((indices < -len(dims)) | (indices >= len(dims))):
        return None  # no dimension of the shape: the graph is wrong, and it is not for this pass to say so
    # Positions take the place of the dimensions, so that the operator itself says which ones it picks.
    where = evaluate_node(node, [np.arange(len(dims)), *arguments], opset)[0]
    picked = [dims[index] for index in where.reshape(-1)]
    return None if None in picked else np.array(picked, np.int64).reshape(where.shape)


def _is_noop(node: gs.Node) -> bool:
    """Whether the only output is provably the first input."""
    if node.op == "Identity" or (node.op == "Concat" and len(node.inputs) == 1):
        return True
    if not node.inputs:
        return False
    data = node.inputs[0]
    if node.op == "Cast":
        return dtype_of(data) == int(node.attrs["to"])
    if node.op == "Transpose":
        return list(node.attrs.get("perm", ())) == list(range(len(data.shape or ()))) != []
    if node.op == "Reshape" and (target := array_of(node.inputs[1])) is not None:
        return static_shape(data) == tuple(target.tolist()) and 0 not in target
    return False
