"""smooth-qdq: scales and saturates as the quantizers do, rounds nothing, leaves weights alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes import Pipeline
from passes.sources import np_dtype

RNG = np.random.default_rng(3)
BOUND = {TensorProto.INT8: (-128, 127), TensorProto.FLOAT8E4M3FN: (-448, 448)}


def model(to: int, dtype: int, *, zero: float = 0, per_channel: bool = False) -> onnx.ModelProto:
    """x -> Q -> Transpose -> DQ -> MatMul with a weight behind DQ."""
    kind = np_dtype(dtype)
    scale = np.asarray(RNG.uniform(0.01, 0.02, 8 if per_channel else ()), kind)
    tensors = [
        numpy_helper.from_array(scale, "s"),
        numpy_helper.from_array(np.full(scale.shape, zero).astype(np_dtype(to)), "z"),
        numpy_helper.from_array(RNG.integers(-100, 100, (6, 5)).astype(np.int8), "w"),
        numpy_helper.from_array(np.asarray(0.03, kind), "ws"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q", axis=1),
        helper.make_node("Transpose", ["q"], ["t"], "t", perm=[1, 0] if not per_channel else [0, 1]),
        helper.make_node("DequantizeLinear", ["t", "s", "z"], ["d"], "d", axis=1),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], "wd"),
        helper.make_node("Cast", ["d"], ["y"], "y", to=TensorProto.FLOAT),
        helper.make_node("Cast", ["wd"], ["v"], "v", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, [4, 8])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "v")],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def run(m: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(m.SerializeToString(), sess_options=options).run(None, {"x": x})


@pytest.mark.parametrize("to", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_values_saturate_and_are_not_rounded(to: int, dtype: int) -> None:
    before = model(to, dtype)
    result = Pipeline.parse("smooth-qdq").run(before)
    assert result.changed == 2
    x = (RNG.standard_normal((4, 8)) * 0.4).astype(np_dtype(dtype))
    x[0, 0], x[1, 1] = 50, -60
    y, weight = run(result.model, x)
    scale = numpy_helper.to_array(before.graph.initializer[0]).astype(np.float32)
    low, high = BOUND[to]
    expected = np.clip(x.astype(np.float32), low * scale, high * scale).T
    np.testing.assert_allclose(y, expected, rtol=1e-6 if dtype == TensorProto.FLOAT else 2e-3)
    assert len(np.unique(y)) > 25
    np.testing.assert_array_equal(weight, run(before, x)[1])
    rounded = run(before, x)[0]
    assert 1e-4 < np.linalg.norm(rounded - y) / np.linalg.norm(y) < 0.1


def test_twice_changes_nothing() -> None:
    once = Pipeline.parse("smooth-qdq").run(model(TensorProto.INT8, TensorProto.FLOAT))
    assert Pipeline.parse("smooth-qdq").run(once.model).changed == 0


def test_other_zero_points_and_channels_are_refused() -> None:
    shifted = Pipeline.parse("smooth-qdq").run(model(TensorProto.INT8, TensorProto.FLOAT, zero=3))
    assert [r.reason for r in shifted.records[0].refusals] == ["the zero point is not zero"] * 2
    channels = Pipeline.parse("smooth-qdq").run(model(TensorProto.INT8, TensorProto.FLOAT, per_channel=True))
    assert channels.changed == 0
    assert "only one number" in channels.records[0].refusals[0].reason
