"""share-scales: the largest scale for what meets, nothing saturates, and what must not change does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from passes import PassError, Pipeline
from passes.canonical.fuse_qdq import FuseQdq
from passes.canonical.share_scales import ShareScales
from tests.passes.graph_helpers import apply, error, run_ort
from tests.passes.qdq_networks import FP8, INT8, TYPES, Net, counts


def two(net: Net) -> tuple[str, str]:
    """A large and a small tensor, each quantized with the scale that fits it."""
    small = net.add("Mul", ["x", net.constant("half", np.array(0.5, np.float32))])
    bound = 127 if net.kind == INT8 else 448
    return net.pair("x", "large", 6 / bound), net.pair(small, "small", 2.5 / bound)


def scales(made: ModelProto) -> list[float]:
    """The scale that each QuantizeLinear and DequantizeLinear reads."""
    values = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    return [float(values[n.input[1]]) for n in made.graph.node if n.op_type.endswith("eLinear")]


def run(made: ModelProto, net: Net) -> Any:
    return run_ort(made, net.feeds())[0]


def refusal(net: Net) -> str:
    result = Pipeline([ShareScales()]).run(net.model())
    assert result.changed == 0
    return result.records[0].refusals[0].reason


@TYPES
@pytest.mark.parametrize("op", ["Add", "Concat"])
def test_the_larger_scale_for_both(kind, op):
    net = Net(kind)
    joined = net.add(op, list(two(net)), **({} if op == "Add" else {"axis": 1}))
    net.matmul(joined, 8, "y")
    made = net.model()
    after = apply(made, ShareScales()).model
    bound = 127 if kind == INT8 else 448
    np.testing.assert_allclose(scales(made), [6 / bound] * 2 + [2.5 / bound] * 2, rtol=1e-6)
    np.testing.assert_allclose(scales(after), [6 / bound] * 4, rtol=1e-6)
    # What the shared scale costs lies between nothing and the tolerance that the pass names.
    assert 1e-5 < error(run(after, net), run(made, net)) < ShareScales.tolerance


def test_the_smaller_scale_would_break_the_tolerance():
    net = Net(INT8)
    net.matmul(net.add("Add", list(two(net))), 8, "y")
    made = net.model()
    wrong = apply(made, ShareScales()).model
    for node in wrong.graph.node:
        if node.op_type.endswith("eLinear"):
            node.input[1] = "small"
    held = {t.name: t for t in made.graph.initializer}["small"]
    wrong.graph.initializer.append(held)
    feeds = {"x": net.feeds()["x"] * 3}
    assert error(run_ort(wrong, feeds)[0], run_ort(made, feeds)[0]) > ShareScales.tolerance


@TYPES
def test_then_one_pair_behind_the_concat_is_enough(kind):
    net = Net(kind)
    net.matmul(net.add("Concat", list(two(net)), axis=1), 8, "y")
    shared = apply(net.model(), ShareScales()).model
    fused = apply(shared, FuseQdq()).model
    assert (counts(shared)["QuantizeLinear"], counts(fused)["QuantizeLinear"]) == (2, 1)
    np.testing.assert_array_equal(run(fused, net), run(shared, net))


def test_places_that_share_a_pair_get_one_scale():
    net = Net()
    a, b, c = net.pair("x", "a", 0.03), net.pair("x", "b", 0.05), net.pair("x", "c", 0.04)
    net.matmul(net.add("Add", [a, b]), 8, "y0")
    net.matmul(net.add("Concat", [b, net.add("Identity", [c])], axis=1), 8, "y1")
    net.matmul(net.add("Concat", [c, c], axis=2), 16, "y2")
    assert scales(apply(net.model(), ShareScales()).model) == [np.float32(0.05)] * 6


def test_equal_scales_that_meet_stay_equal():
    net = Net()
    a, b, c = net.pair("x", "a", 0.05), net.pair("x", "b", 0.03), net.pair("x", "c", 0.03)
    net.matmul(net.add("Concat", [b, c], axis=1), 8, "y0")
    net.matmul(net.add("Add", [a, b]), 8, "y1")
    assert scales(apply(net.model(), ShareScales()).model) == [np.float32(0.05)] * 6


def test_only_where_asked():
    net = Net()
    net.matmul(net.add("Add", list(two(net))), 8, "y")
    assert Pipeline.parse("share-scales{at=Concat}").run(net.model()).changed == 0
    assert Pipeline.parse("share-scales{at=Add}").run(net.model()).changed == 1
    with pytest.raises(PassError, match="Known: Add, Concat"):
        Pipeline.parse("share-scales{at=Mul}").run(net.model())


class TestRefused:
    def test_one_side_is_not_quantized(self):
        net = Net()
        net.matmul(net.add("Add", [two(net)[0], "x"]), 8, "y")
        result = Pipeline([ShareScales()]).run(net.model())
        assert (result.changed, result.records[0].refusals) == (0, ())

    def test_scales_per_channel(self):
        net = Net()
        channels = net.pair("x", "c", np.linspace(0.01, 0.05, 8), axis=2)
        net.matmul(net.add("Add", [two(net)[0], channels]), 8, "y")
        assert "not one known number" in refusal(net)

    def test_zero_point(self):
        net = Net()
        net.tensors |= {"z": np.int8(3), "zs": np.float32(0.02)}
        shifted = net.add("QuantizeLinear", ["x", "zs", "z"])
        net.matmul(net.add("Add", [two(net)[0], net.add("DequantizeLinear", [shifted, "zs", "z"])]), 8, "y")
        assert "zero point" in refusal(net)

    def test_weights(self):
        net = Net()
        net.tensors["w"] = np.random.default_rng(2).integers(-127, 127, (6, 8)).astype(np.int8)
        net.matmul(net.add("Add", [two(net)[0], net.dq("w", "ws", 0.01)]), 8, "y")
        assert "not quantized in the graph" in refusal(net)

    def test_the_quantized_tensor_is_an_output(self):
        net = Net()
        small = net.add("QuantizeLinear", ["x", *net.scale("small", 0.02)], "codes")
        net.outputs["codes"] = INT8
        net.matmul(net.add("Add", [two(net)[0], net.dq(small, "small", 0.02)]), 8, "y")
        assert "read with another scale" in refusal(net)

    def test_the_quantized_tensor_is_read_with_another_scale(self):
        net = Net()
        codes = net.q("x", "small", 0.02)
        net.matmul(net.dq(codes, "twice", 0.04), 8, "y0")
        net.matmul(net.add("Add", [two(net)[0], net.dq(codes, "small", 0.02)]), 8, "y1")
        assert "read with another scale" in refusal(net)

    def test_different_types(self):
        net = Net()
        large, _ = two(net)
        net.kind = FP8
        net.matmul(net.add("Add", [large, net.pair("x", "other", 0.01)]), 8, "y")
        assert "different types" in refusal(net)


def test_scales_of_16_bits_are_compared_as_numbers():
    net = Net(INT8, TensorProto.FLOAT16)
    net.matmul(net.add("Add", [net.pair("x", "a", 0.03), net.pair("x", "b", 0.05)]), 8, "y")
    after = apply(net.model(), ShareScales()).model
    assert set(scales(after)) == {float(np.float16(0.05))}
