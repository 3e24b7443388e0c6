"""Pieces of a graph read and give what crosses their ends."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.errors import DiffcError
from diffc.validate.segmented import SegmentedSession, cut_to_size


def _chain(with_type: bool) -> onnx.ModelProto:
    """x -> Add -> Unknown-typed function-free operator of another domain -> Add, a weight of 400 bytes each."""
    weights = [numpy_helper.from_array(np.full(100, i + 1, np.float32), f"w{i}") for i in range(2)]
    nodes = [
        helper.make_node("Add", ["x", "w0"], ["a"]),
        helper.make_node("Strange", ["a"], ["b"], domain="elsewhere"),
        helper.make_node("Add", ["b", "w1"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [100]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    if with_type:
        graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [100]))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("elsewhere", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def test_cuts_take_and_give_what_crosses_them() -> None:
    pieces = cut_to_size(_chain(True), 400)
    assert [list(s.inputs) for s in pieces] == [["x"], ["a"]]
    assert [list(s.outputs) for s in pieces] == [["a"], ["y"]]
    assert [list(s.weights) for s in pieces] == [["w0"], ["w1"]]


def test_a_cut_at_a_tensor_without_type_is_refused() -> None:
    model = _chain(False)
    session = SegmentedSession(model, 400)
    session.pieces[0] = session.pieces[0].__class__(model.graph.node[:2], ["x"], ["b"], ["w0"])
    with pytest.raises(DiffcError, match="type of tensor 'b' is unknown"):
        session.run({"x": np.ones(100, np.float32)})
