"""The last step of fuse-qdq by itself: which of the two ways a dequantizer moves, and why it does not."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from passes.canonical.quantizer_part import Part
from passes.canonical.sink_dequantizers import sink_dequantizers
from passes.graph.edit import Edit
from tests.passes.graph_helpers import graph_of

VALUES = {
    "s": np.float32(0.5),
    "c": np.full(6, 0.5, np.float32),
    "z": np.int8(0),
    "zc": np.zeros(6, np.int8),
    "w": np.ones((4, 3), np.float32),
    "from": np.array([0]),
    "to": np.array([2]),
    "axes": np.array([0]),
    "shape": np.array([24]),
}


def sunk(text: str) -> tuple[gs.Graph, int, list[str]]:
    used = {key: value for key, value in VALUES.items() if f", {key}" in text}
    graph = graph_of(text, used)
    part = Part.of(graph, Edit(graph))
    assert part is not None
    moved = sink_dequantizers(part)
    return graph, moved, [refusal.reason for refusal in part.edit.refusals]


PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"


def test_a_pair_that_nothing_else_reads_moves_whole() -> None:
    graph, moved, _ = sunk(
        f"g (float[4,6] x) => (float[6,3] y) {{ {PAIR} t = Transpose(d) y = MatMul(t, w) }}"
    )
    assert moved == 1
    assert [node.op for node in graph.nodes] == ["Transpose", "QuantizeLinear", "DequantizeLinear", "MatMul"]


def test_a_quantizer_that_others_read_stays() -> None:
    text = f"""g (float[4,6] x) => (float[6,3] y, float[4,6] v) {{
        {PAIR} t = Transpose(d) y = MatMul(t, w) e = DequantizeLinear(q, s, z) v = Neg(e)
    }}"""
    graph, moved, _ = sunk(text)
    assert moved == 1
    assert [node.op for node in graph.nodes].index("Transpose") > [n.op for n in graph.nodes].index(
        "QuantizeLinear"
    )
    (move,) = (node for node in graph.nodes if node.op == "Transpose")
    assert move.inputs[0].name == "q"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        # two inputs of one move with different scales
        (
            "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) r = QuantizeLinear(x, c, zc) "
            "e = DequantizeLinear(r, c, zc) t = Concat<axis = 0>(d, e) u = Transpose(t) y = MatMul(u, m)",
            "dequantized with scales that differ",
        ),
        # channels that a Reshape joins with others
        (
            "q = QuantizeLinear<axis = 1>(x, c, zc) d = DequantizeLinear<axis = 1>(q, c, zc) "
            "t = Reshape(d, shape) y = MatMul(t, n)",
            "the scales would have to move along",
        ),
    ],
)
def test_grids_that_do_not_go_through(text: str, reason: str) -> None:
    head = "g (float[4,6] x, float[8,3] m, float[24] n) => (float y)"
    _, moved, reasons = sunk(f"{head} {{ {text} }}")
    assert moved == 0
    assert [found for found in reasons if reason in found]


def test_what_leads_to_no_product_stays() -> None:
    _, moved, reasons = sunk(f"g (float[4,6] x) => (float[6,4] y) {{ {PAIR} t = Transpose(d) y = Neg(t) }}")
    assert (moved, reasons) == (0, [])
