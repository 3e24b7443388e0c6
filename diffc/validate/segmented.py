"""Running a graph that does not fit into memory: in consecutive segments, one ONNX Runtime session after another.

Any cut of a topological order is a valid one: what a later segment needs of an earlier one is kept as arrays. So a
graph is cut wherever the weights of a segment have reached a number of bytes, and its own order is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper

from diffc.errors import DiffcError
from diffc.validate.cuts import reads
from diffc.validate.float32 import cpu_session, emulated
from passes.storage import stored_bytes

Array = npt.NDArray[Any]
SEGMENT_BYTES = 1 << 30
"""Weights of one segment. A session takes about twice as much while it loads them."""


@dataclass(frozen=True)
class Segment:
    """Nodes that run together; the tensors they take and give (inputs of the graph included), and their weights."""

    nodes: Sequence[onnx.NodeProto]
    inputs: Sequence[str]
    outputs: Sequence[str]
    weights: Sequence[str]


class SegmentedSession:
    """Runs a model whose weights are recipes on ONNX Runtime's CPU provider, never holding more than a segment.

    Sessions are made anew in every run: memory is what is scarce. Raises DiffcError where the type of a tensor at
    a cut is unknown, and as `OrtSession` does.
    """

    def __init__(self, model: onnx.ModelProto, limit: int = SEGMENT_BYTES):
        self._model = emulated(model)
        self._weights = {t.name: t for t in self._model.graph.initializer}
        self._types = _types(self._model)
        self.segments = cut(self._model, limit)

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name; `feed` has the arrays of the graph's inputs in their types."""
        values = dict(feed)
        for position, segment in enumerate(self.segments):
            taken = {name: values[name] for name in segment.inputs}
            with cpu_session(self._part(segment, taken)) as session:
                values |= session.run(taken)
            needed = {name for later in self.segments[position + 1 :] for name in later.inputs}
            needed |= {output.name for output in self._model.graph.output}
            values = {name: array for name, array in values.items() if name in needed}
        return values

    def _part(self, segment: Segment, taken: Mapping[str, Array]) -> onnx.ModelProto:
        graph = helper.make_graph(
            segment.nodes,
            "segment",
            [self._value(name, array.shape) for name, array in taken.items()],
            [self._value(name, None) for name in segment.outputs],
            [self._weights[name] for name in segment.weights],
        )
        return helper.make_model(
            graph,
            opset_imports=self._model.opset_import,
            ir_version=self._model.ir_version,
            functions=self._model.functions,
        )

    def _value(self, name: str, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
        if name not in self._types:
            raise DiffcError(f"the type of tensor {name!r} is unknown, so the graph cannot be cut there")
        return helper.make_tensor_value_info(name, self._types[name], shape)


def cut(model: onnx.ModelProto, limit: int) -> list[Segment]:
    """Consecutive segments of the nodes, each closed when its weights have `limit` bytes or more."""
    sizes = {t.name: stored_bytes(t) for t in model.graph.initializer}
    groups: list[list[onnx.NodeProto]] = [[]]
    held: dict[str, int] = {}
    for node in model.graph.node:
        if sum(held.values()) >= limit:
            groups.append([])
            held = {}
        groups[-1].append(node)
        held |= {name: sizes[name] for name in reads(node) if name in sizes}
    return _segments(groups, sizes.keys(), [output.name for output in model.graph.output])


def _segments(
    groups: Sequence[Sequence[onnx.NodeProto]], weights: Any, outputs: Sequence[str]
) -> list[Segment]:
    """The groups with what they take and give, found from the last to the first."""
    wanted, found = set(outputs), []
    for nodes in reversed(groups):
        made = dict.fromkeys(name for node in nodes for name in node.output if name)
        read = dict.fromkeys(name for node in nodes for name in reads(node))
        given = [name for name in made if name in wanted]
        taken = [name for name in read if name not in weights and name not in made]
        found.append(Segment(nodes, taken, given, [name for name in read if name in weights]))
        wanted = (wanted - made.keys()) | set(taken)
    return found[::-1]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by tensor, as ONNX infers them where the graph does not say."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False)
    graph = inferred.graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in [*graph.input, *graph.value_info, *graph.output]
        if value.type.tensor_type.elem_type
    }
