"""A part of fuse-qdq: new nodes find their place, what nothing reads goes, outputs and other domains stay."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from passes.canonical.quantizer_part import Part, mergeable
from passes.graph.edit import Edit
from passes.graph.grids import grid_of
from tests.passes.graph_helpers import graph_of, made_by

CHAIN = """g (float[4,6] x) => (float[6,4] y, float[4,6] keep) {
    q = QuantizeLinear(x, s, z)
    keep = DequantizeLinear(q, s, z)
    t = Transpose(keep)
    y = Neg(t)
}"""
VALUES = {"s": np.float32(0.5), "z": np.int8(0)}


def part_of(text: str = CHAIN) -> tuple[gs.Graph, Part]:
    graph = graph_of(text, VALUES)
    part = Part.of(graph, Edit(graph))
    assert part is not None
    return graph, part


def test_a_graph_without_quantizers_is_no_part() -> None:
    graph = graph_of("g (float[4] x) => (float[4] y) { y = Neg(x) }")
    assert Part.of(graph, Edit(graph)) is None


def test_new_nodes_come_before_those_that_read_them() -> None:
    graph, part = part_of()
    q, t = made_by(graph, "q"), made_by(graph, "t")
    grid = grid_of(q)
    assert grid is not None
    (narrow,) = part.replay(t, [q.outputs[0]], grid)
    wide = gs.Variable("wide", np.float32, [6, 4])
    part.quantizer(made_by(graph, "keep"), grid, "new", narrow, wide)
    made_by(graph, "y").inputs[0] = wide
    part.settle()
    order = [node.op for node in graph.nodes]
    assert order == ["QuantizeLinear", "DequantizeLinear", "Transpose", "DequantizeLinear", "Neg"]
    assert made_by(graph, narrow.name).name.endswith("_quantized")
    assert "t" not in {
        tensor.name for node in graph.nodes for tensor in node.outputs
    }  # nothing read it any more
    assert made_by(graph, "keep").op == "DequantizeLinear"  # a caller reads it


def test_what_is_not_of_the_part_has_no_source() -> None:
    graph, part = part_of()
    assert part.source(made_by(graph, "q").outputs[0]) is made_by(graph, "q")
    assert part.source(graph.inputs[0]) is None
    part.members.discard(id(made_by(graph, "q")))
    assert part.source(made_by(graph, "q").outputs[0]) is None
    assert [node.op for node, _ in part.activations("QuantizeLinear")] == ["QuantizeLinear"]
    assert part.is_output(graph.outputs[1])
    assert not part.is_output(made_by(graph, "t").outputs[0])


@pytest.mark.parametrize(
    ("op", "domain", "expected"),
    [
        ("QuantizeLinear", None, True),
        ("Cast", "", True),
        ("Reshape", None, True),
        ("TRT_FP4DynamicQuantize", "trt", True),
        ("QuantizeLinear", "com.microsoft", False),
        ("Neg", None, False),
    ],
)
def test_what_may_be_one(op: str, domain: str | None, expected: bool) -> None:
    assert mergeable(gs.Node(op, domain=domain)) == expected
