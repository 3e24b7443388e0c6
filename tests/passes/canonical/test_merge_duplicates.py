"""The first steps of fuse-qdq by themselves: equal nodes, and tensors that are quantized already."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from passes.canonical.merge_duplicates import merge_duplicates, reuse_quantized
from passes.canonical.quantizer_part import Part
from passes.graph.edit import Edit
from tests.passes.graph_helpers import graph_of, made_by


def part_of(text: str) -> tuple[gs.Graph, Part]:
    values = {"s": np.float32(0.5), "same": np.float32(0.5), "other": np.float32(0.25), "z": np.int8(0)}
    used = {key: value for key, value in values.items() if f", {key}" in text}
    graph = graph_of(text, used)
    part = Part.of(graph, Edit(graph))
    assert part is not None
    return graph, part


@pytest.mark.parametrize(
    ("second", "gone"),
    [
        ("b = QuantizeLinear(x, s, z)", 1),
        ("b = QuantizeLinear(x, same, z)", 1),  # another constant with the same value
        ("b = QuantizeLinear(x, other, z)", 0),
        ("b = QuantizeLinear<axis = 0>(x, s, z)", 0),  # not known to be the same
        ("b = QuantizeLinear(w, s, z)", 0),
    ],
)
def test_equal_nodes_are_one(second: str, gone: int) -> None:
    text = f"""g (float[4] x, float[4] w) => (float[4] y, float[4] v) {{
        a = QuantizeLinear(x, s, z) {second}
        c = DequantizeLinear(a, s, z) d = DequantizeLinear(b, s, z) y = Neg(c) v = Abs(d)
    }}"""
    graph, part = part_of(text)
    assert merge_duplicates(part) == 2 * gone  # the dequantizers after them are equal then
    assert len([node for node in graph.nodes if node.op == "QuantizeLinear"]) == 2 - gone
    assert len(graph.nodes) == 6 - 2 * gone


def test_duplicates_that_a_caller_reads_stay() -> None:
    text = (
        "g (float[4] x) => (int8[4] a, int8[4] b) { a = QuantizeLinear(x, s, z) b = QuantizeLinear(x, s, z) }"
    )
    graph, part = part_of(text)
    assert merge_duplicates(part) == 0
    assert len(graph.nodes) == 2


@pytest.mark.parametrize(("scale", "removed"), [("s", 1), ("other", 0)])
def test_what_was_dequantized_is_not_quantized_again(scale: str, removed: int) -> None:
    text = f"""g (float[4,6] x) => (float[6,4] y) {{
        a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) t = Transpose(b)
        c = QuantizeLinear(t, {scale}, z) d = DequantizeLinear(c, {scale}, z) y = Neg(d)
    }}"""
    graph, part = part_of(text)
    assert reuse_quantized(part) == removed
    reasons = [refusal.reason for refusal in part.edit.refusals]
    if removed:
        move = made_by(graph, made_by(graph, "d").inputs[0].name)
        assert (move.op, move.inputs[0].name) == ("Transpose", "a")
        assert not reasons
    else:
        assert any("scales or zero points differ" in reason for reason in reasons)
