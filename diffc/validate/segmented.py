"""Running a graph that does not fit into memory: in consecutive pieces, one ONNX Runtime session after another.

The nodes are in topological order, so the graph can be cut anywhere: what a later piece reads of an earlier one is kept
as arrays. A piece ends where its weights have reached a number of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper

from diffc.errors import DiffcError
from diffc.progress import Update
from diffc.validate.cuts import tensors_read
from diffc.validate.float32 import cpu_session, emulated
from passes.storage import stored_bytes

Array = npt.NDArray[Any]
PIECE_BYTES = 1 << 30
"""Weights of one piece. A session takes about twice as much while it loads them."""


@dataclass(frozen=True)
class Piece:
    """Nodes that run together, the tensors that they read and give to other pieces, and their weights."""

    nodes: Sequence[onnx.NodeProto]
    inputs: Sequence[str]
    outputs: Sequence[str]
    weights: Sequence[str]


class SegmentedSession:
    """Runs a model whose weights are recipes on ONNX Runtime's CPU provider, and never holds more than one piece.

    Every run opens its sessions anew, which saves memory. Raises DiffcError where the type of a tensor at a cut is
    unknown, and as `OrtSession` does.
    """

    def __init__(self, model: onnx.ModelProto, limit: int = PIECE_BYTES):
        self._model = emulated(model)
        self._weights = {t.name: t for t in self._model.graph.initializer}
        self._types = _types(self._model)
        self.pieces = cut_to_size(self._model, limit)

    def run(self, feed: Mapping[str, Array], update: Update = lambda done, total: None) -> dict[str, Array]:
        """The outputs by name; `feed` has the arrays of the graph's inputs in their types."""
        values = dict(feed)
        for position, piece in enumerate(self.pieces):
            taken = {name: values[name] for name in piece.inputs}
            with cpu_session(self._model_of(piece, taken)) as session:
                values |= session.run(taken)
            needed = {name for later in self.pieces[position + 1 :] for name in later.inputs}
            needed |= {output.name for output in self._model.graph.output}
            values = {name: array for name, array in values.items() if name in needed}
            update(position + 1, len(self.pieces))
        return values

    def _model_of(self, piece: Piece, taken: Mapping[str, Array]) -> onnx.ModelProto:
        graph = helper.make_graph(
            piece.nodes,
            "piece",
            [self._value(name, array.shape) for name, array in taken.items()],
            [self._value(name, None) for name in piece.outputs],
            [self._weights[name] for name in piece.weights],
        )
        return helper.make_model(
            graph,
            opset_imports=self._model.opset_import,
            ir_version=self._model.ir_version,
            functions=self._model.functions,
        )

    def _value(self, name: str, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
        if name not in self._types:
            raise DiffcError(
                f"the type of tensor {name!r} is unknown, so the graph cannot be cut there",
                fix="compile again with --skip-validation, and report it",
            )
        return helper.make_tensor_value_info(name, self._types[name], shape)


def cut_to_size(model: onnx.ModelProto, limit: int) -> list[Piece]:
    """Consecutive pieces of the nodes; each ends when its weights have `limit` bytes or more."""
    sizes = {t.name: stored_bytes(t) for t in model.graph.initializer}
    groups: list[list[onnx.NodeProto]] = [[]]
    held: dict[str, int] = {}
    for node in model.graph.node:
        if sum(held.values()) >= limit:
            groups.append([])
            held = {}
        groups[-1].append(node)
        held |= {name: sizes[name] for name in tensors_read(node) if name in sizes}
    return _pieces(groups, sizes.keys(), [output.name for output in model.graph.output])


def _pieces(groups: Sequence[Sequence[onnx.NodeProto]], weights: Any, outputs: Sequence[str]) -> list[Piece]:
    """The groups with the tensors that they read and give, found from the last to the first."""
    wanted, found = set(outputs), []
    for nodes in reversed(groups):
        made = dict.fromkeys(name for node in nodes for name in node.output if name)
        read = dict.fromkeys(name for node in nodes for name in tensors_read(node))
        given = [name for name in made if name in wanted]
        taken = [name for name in read if name not in weights and name not in made]
        found.append(Piece(nodes, taken, given, [name for name in read if name in weights]))
        wanted = (wanted - made.keys()) | set(taken)
    return found[::-1]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by tensor; ONNX infers those that the graph does not note."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False)
    graph = inferred.graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in [*graph.input, *graph.value_info, *graph.output]
        if value.type.tensor_type.elem_type
    }
