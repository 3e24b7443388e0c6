"""drop-rounding: scales and saturates as the quantizers do, rounds nothing, leaves weights alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes import Pipeline
from passes.weights.sources import np_dtype

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
    result = Pipeline.parse("drop-rounding").run(before)
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
    once = Pipeline.parse("drop-rounding").run(model(TensorProto.INT8, TensorProto.FLOAT))
    assert Pipeline.parse("drop-rounding").run(once.model).changed == 0


def test_other_zero_points_and_channels_are_refused() -> None:
    shifted = Pipeline.parse("drop-rounding").run(model(TensorProto.INT8, TensorProto.FLOAT, zero=3))
    assert [r.reason for r in shifted.records[0].refusals] == ["the zero point is not zero"] * 2
    channels = Pipeline.parse("drop-rounding").run(
        model(TensorProto.INT8, TensorProto.FLOAT, per_channel=True)
    )
    assert channels.changed == 0
    assert "only one number" in channels.records[0].refusals[0].reason


NVFP4 = """g (KIND[b,64] x, float s) => (float[b,64] y, float[b,64] z) {
    q, t = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>(x, s)
    wide = DequantizeLinear(t, s)
    d = DequantizeLinear<axis = -1, block_size = 16>(q, wide)
    y = Cast<to = 1>(d)
    e = DequantizeLinear<axis = -1, block_size = 16>(q, wide)
    z = Neg(e)
}"""
MXFP8 = """g (KIND[b,64] x) => (float[b,64] y) {
    q, t = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>(x)
    d = trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = TYPE>(q, t)
    y = Cast<to = 1>(d)
}"""


def dynamic(text: str, kind: str) -> onnx.ModelProto:
    number = {"float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[kind]
    head = '<ir_version: 11, opset_import: ["": 23, "trt": 1]>'
    parsed: onnx.ModelProto = onnx.parser.parse_model(
        f"{head} {text.replace('KIND', kind).replace('TYPE', str(int(number)))}"
    )
    types = [("d", number if "MXFP8" in text else TensorProto.FLOAT), ("e", TensorProto.FLOAT)]
    parsed.graph.value_info.extend(helper.make_tensor_value_info(n, t, ["b", 64]) for n, t in types)
    return parsed


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("text", [NVFP4, MXFP8], ids=["nvfp4", "mxfp8"])
def test_dynamic_blocks_pass_values_through(text: str, kind: str) -> None:
    """They scale to what is there, so nothing saturates; what is left is the change of type."""
    before = dynamic(text, kind)
    result = Pipeline.parse("drop-rounding").run(before)
    assert result.changed == 1  # the quantizer with all that dequantizes what it gives
    assert {n.op_type for n in result.model.graph.node} <= {"Cast", "Neg"}
    x = (RNG.standard_normal((3, 64)) * 100).astype(
        np_dtype(before.graph.input[0].type.tensor_type.elem_type)
    )
    session = ort.InferenceSession(result.model.SerializeToString())
    feeds = {"x": x} | ({"s": np.array(0.1, np.float32)} if len(before.graph.input) > 1 else {})
    found = session.run(None, feeds)
    assert np.array_equal(found[0], x.astype(np.float32))
    if len(found) > 1:
        assert np.array_equal(found[1], -x.astype(np.float32))
    assert Pipeline.parse("drop-rounding").run(result.model).changed == 0


@pytest.mark.parametrize(
    ("text", "read", "reader"),
    [
        (NVFP4, "z = Neg(e)", "z = Cast<to = 1>(q)"),  # the values
        (NVFP4, "z = Neg(e)", "f = Cast<to = 1>(t) z = Add(e, f)"),  # the scales as they are
        (NVFP4, "z = Neg(e)", "z = Add(e, wide)"),  # the scales after they are dequantized
        (MXFP8, "y = Cast<to = 1>(d)", "f = Cast<to = 1>(t) y = Add(f, d)"),
    ],
)
def test_dynamic_blocks_that_others_read_stay(text: str, read: str, reader: str) -> None:
    before = dynamic(text.replace(read, reader), "float")
    result = Pipeline.parse("drop-rounding").run(before)
    assert result.changed == 0
    assert [r.reason.partition(" node ")[2].partition("reads")[2] for r in result.records[0].refusals] == [
        " what it gives, not only its dequantizers"
    ]
    assert len(result.model.graph.node) == len(before.graph.node)


def test_dynamic_blocks_of_weights_stay() -> None:
    text = MXFP8.replace("(x)", "(w)").replace("KIND[b,64] x", "float unused")
    before = dynamic(text, "float")
    before.graph.initializer.append(
        numpy_helper.from_array(RNG.standard_normal((4, 64)).astype(np.float32), "w")
    )
    result = Pipeline.parse("drop-rounding").run(before)
    assert result.changed == 0
    assert [n.op_type for n in result.model.graph.node] == [n.op_type for n in before.graph.node]


def test_weights_that_the_graph_quantizes_stay() -> None:
    """As a trace has them, before fold-weight-qdq: moved or not."""
    made = model(TensorProto.INT8, TensorProto.FLOAT)
    made.graph.initializer.append(
        numpy_helper.from_array(RNG.standard_normal((6, 5)).astype(np.float32), "f")
    )
    made.graph.node[3].input[0] = "moved"
    nodes = [
        helper.make_node("QuantizeLinear", ["f", "ws"], ["fq"], "fq", output_dtype=TensorProto.INT8),
        helper.make_node("Transpose", ["fq"], ["moved"], "moved"),
    ]
    for node in nodes[::-1]:
        made.graph.node.insert(0, node)
    result = Pipeline.parse("drop-rounding").run(made)
    assert result.changed == 2
    left = [node.name for node in result.model.graph.node if "Linear" in node.op_type]
    assert left == ["fq", "wd"]
    x = RNG.standard_normal((4, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(result.model, x)[1], run(made, x)[1])
