"""normalize-qdq: TensorRT's spellings of quantizers against the standard ones, marks against what they mean."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from passes import PassError, Pipeline
from passes.canonical.fold_weight_qdq import FoldWeightQdq
from passes.importing.normalize_qdq import NormalizeQdq
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from passes.weights.sources import keep
from tests.passes.graph_helpers import apply, check_same, error, materialize, ops, run_ort

RNG = np.random.default_rng(11)
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FP8 = """g (float16[b,32] x) => (float16[b,8] y) {
    q = trt.TRT_FP8QuantizeLinear(x, s)
    d = trt.TRT_FP8DequantizeLinear(q, s)
    wd = trt.TRT_FP8DequantizeLinear(w, ws)
    y = MatMul(d, wd)
}"""


def model(graph: str, values: dict[str, Any] | None = None) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23, "trt": 1]> {graph}')
    for name, value in (values or {}).items():
        tensor = (
            value.to_tensor(name) if isinstance(value, Recipe) else onnx.numpy_helper.from_array(value, name)
        )
        made.graph.initializer.append(tensor)
    return made


def emulated(made: onnx.ModelProto) -> onnx.ModelProto:
    return Pipeline.parse("emulate-fp4,add-trt-functions").run(made).model


def run(made: onnx.ModelProto, feeds: Any) -> list[Any]:
    return run_ort(emulated(made), feeds)


def fp8_values(dtype: Any = np.float16) -> dict[str, Any]:
    return {
        "s": np.array([0.011], dtype),
        "w": RNG.standard_normal((32, 8)).astype(E4M3),
        "ws": np.array(0.02, dtype),
    }


@pytest.mark.parametrize("stored_as", [E4M3, np.uint8])
@pytest.mark.parametrize("kept", ["inline", "memory"])
def test_fp8_operators_become_standard_ones(stored_as: Any, kept: str) -> None:
    values = fp8_values()
    x = RNG.standard_normal((5, 32)).astype(np.float16)
    want = run_by_hand(x, values)
    stored = values["w"].view(stored_as)
    before = model(FP8, values | {"w": keep(stored) if kept == "memory" else stored})
    result = apply(before, NormalizeQdq())
    assert ops(result.model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert {node.domain for node in result.model.graph.node} == {""}
    (got,) = run_ort(result.model, {"x": x})
    assert error(got.astype(np.float32), want) < 2e-3
    values["w"] = values["w"][::-1].copy()  # the check sees another weight
    assert error(run_by_hand(x, values), want) > 0.1


def run_by_hand(x: Any, values: dict[str, Any]) -> Any:
    scale = values["s"].astype(np.float32)
    quantized = np.clip(x.astype(np.float32) / scale, -448, 448).astype(E4M3).astype(np.float32) * scale
    return (quantized @ (values["w"].astype(np.float32) * np.float32(values["ws"]))).astype(np.float32)


def test_zero_points_are_of_the_quantized_type_and_scales_are_scalars() -> None:
    result = apply(model(FP8, fp8_values()), NormalizeQdq())
    initializers = {t.name: t for t in result.model.graph.initializer}
    for node in result.model.graph.node[:3]:
        assert list(initializers[node.input[1]].dims) == []
        assert initializers[node.input[2]].data_type == TensorProto.FLOAT8E4M3FN
    types = {v.name: v.type.tensor_type.elem_type for v in result.model.graph.value_info}
    assert types["q"] == TensorProto.FLOAT8E4M3FN


def test_a_declared_uint8_is_corrected() -> None:
    before = model(FP8, fp8_values())
    before.graph.value_info.append(onnx.helper.make_tensor_value_info("q", TensorProto.UINT8, ["b", 32]))
    result = Pipeline([NormalizeQdq()]).run(before, check=lambda *_: "").model
    types = {v.name: v.type.tensor_type.elem_type for v in result.graph.value_info}
    assert types["q"] == TensorProto.FLOAT8E4M3FN


def test_standard_operators_in_the_domain_of_tensorrt_leave_it() -> None:
    text = """g (float16[b,32] x) => (float16[b,32] y) {
        q = trt.QuantizeLinear<saturate = 1>(x, s, z)
        y = trt.DequantizeLinear(q, s, z)
    }"""
    values = {"s": np.array(0.02, np.float16), "z": np.zeros((1,), E4M3)}
    x = RNG.standard_normal((3, 32)).astype(np.float16)
    result = apply(model(text, values), NormalizeQdq())
    plain = model(text.replace("trt.", ""), values | {"z": np.zeros((), E4M3)})
    check_same(plain, result.model, {"x": x})
    assert {node.domain for node in result.model.graph.node} == {""}


def test_int4_blocks_get_their_type_from_an_attribute() -> None:
    text = """g (float16[b,8] x) => (float16[b,32] y) {
        q = trt.TRT_INT4QuantizeLinear<axis = 1, block_size = 16>(w, s)
        d = trt.TRT_INT4DequantizeLinear<axis = 1, block_size = 16>(q, s)
        y = MatMul(x, d)
    }"""
    weight = RNG.standard_normal((8, 32)).astype(np.float16)
    scale = (0.1 + RNG.random((8, 2))).astype(np.float16)
    result = apply(model(text, {"w": weight, "s": scale}), NormalizeQdq(), FoldWeightQdq())
    assert ops(result.model) == ["DequantizeLinear", "MatMul"]
    (stored,) = (t for t in result.model.graph.initializer if t.data_type == TensorProto.INT4)
    spread = np.repeat(scale.astype(np.float32), 16, axis=1)
    want = np.clip(np.rint(weight.astype(np.float32) / spread), -8, 7)
    assert np.array_equal(evaluate(Recipe.of_tensor(stored)).astype(np.float32), want)


NVFP4_MARK = """g (KIND[b,32] x) => (KIND[b,16] y) {
    d = trt.TRT_FP4QDQ<block_size = 16>(w)
    t = Transpose<perm = [1, 0]>(d)
    y = MatMul(x, t)
}"""


def nvfp4_by_hand(weight: Any) -> Any:
    """ModelOpt's definition: E4M3 block scales under one float32 scale, E2M1 values."""
    wide = weight.astype(np.float32)
    scale = np.float32(np.abs(wide).max()) / np.float32(6 * 448)
    blocks = wide.reshape(weight.shape[0], -1, 16)
    steps = np.abs(blocks).max(-1, keepdims=True) / (np.float32(6) * scale)
    steps = np.minimum(steps, 448).astype(E4M3).astype(np.float32) * scale
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    nearest = np.abs(np.abs(blocks / steps)[..., None] - grid).argmin(-1)
    return (np.sign(blocks) * grid[nearest] * steps).reshape(weight.shape)


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "float"), (np.float16, "float16")])
def test_a_mark_of_nvfp4_becomes_stored_blocks(dtype: Any, kind: str) -> None:
    weight = RNG.standard_normal((16, 32)).astype(dtype)
    text = NVFP4_MARK.replace("KIND", kind)
    result = apply(model(text, {"w": Recipe.of_array(weight)}), NormalizeQdq(), FoldWeightQdq())
    kinds = {t.data_type: tuple(t.dims) for t in result.model.graph.initializer}
    assert kinds[TensorProto.FLOAT4E2M1] == (16, 32)
    assert kinds[TensorProto.FLOAT8E4M3FN] == (16, 2)
    assert kinds[TensorProto.FLOAT] == ()
    x = RNG.standard_normal((4, 32)).astype(dtype)
    want = x.astype(np.float32) @ nvfp4_by_hand(weight).T
    (got,) = ReferenceEvaluator(materialize(result.model)).run(None, {"x": x})
    limit = 1e-6 if dtype == np.float32 else 2e-3
    assert error(got.astype(np.float32), want) < limit
    assert error(x.astype(np.float32) @ weight.astype(np.float32).T, want) > 10 * limit


def test_a_mark_of_a_computed_tensor_is_refused_with_its_name() -> None:
    text = "g (float16[b,32] x) => (float16[b,32] y) { r = Relu(x) y = trt.TRT_FP4QDQ<block_size = 16>(r) }"
    made = model(text)
    made.graph.node[1].name = "block/input_quantizer"
    with pytest.raises(PassError, match=r"'block/input_quantizer' .* amax is not in the file. Fix: export"):
        Pipeline([NormalizeQdq()]).run(made)


MXFP8 = """g (float16[b,64] x) => (float16[b,8] y) {
    xd = trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = TYPE>(x, one)
    wd = trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = TYPE>(w, one)
    t = Transpose<perm = [1, 0]>(wd)
    y = MatMul(xd, t)
}"""


def mxfp8_by_hand(x: Any) -> Any:
    blocks = x.astype(np.float32).reshape(x.shape[0], -1, 32)
    power = np.exp2(np.ceil(np.log2(np.abs(blocks).max(-1, keepdims=True).astype(np.float64) / 448)))
    return ((blocks / power).astype(E4M3).astype(np.float32) * power).astype(np.float32).reshape(x.shape)


@pytest.mark.parametrize("declared", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_marks_of_mxfp8_quantize_activations_and_weights(declared: int) -> None:
    weight = RNG.standard_normal((8, 64)).astype(np.float16)
    values = {"w": Recipe.of_array(weight), "one": np.array(1, np.float16)}
    before = model(MXFP8.replace("TYPE", str(declared)), values)
    before = Pipeline([NormalizeQdq(), FoldWeightQdq()]).run(before, check=lambda *_: "").model
    result = apply(before, NormalizeQdq(), FoldWeightQdq())
    assert ops(result.model).count("TRT_MXFP8DynamicQuantize") == 1
    kinds = {t.data_type: tuple(t.dims) for t in result.model.graph.initializer}
    assert kinds == {TensorProto.FLOAT8E4M3FN: (8, 64), TensorProto.UINT8: (8, 2)}
    x = RNG.standard_normal((4, 64)).astype(np.float16)
    want = mxfp8_by_hand(x) @ mxfp8_by_hand(weight).T
    (got,) = run(result.model, {"x": x})
    assert error(got.astype(np.float32), want) < 2e-3
    assert error(x.astype(np.float32) @ weight.astype(np.float32).T, want) > 1e-2


def test_scales_stored_as_float8e8m0_are_read_as_the_bytes_they_are() -> None:
    text = """g (float16[b,64] x) => (float16[b,8] y) {
        wd = trt.TRT_MXFP8DequantizeLinear<block_size = 32, output_dtype = 10>(w, s)
        t = Transpose<perm = [1, 0]>(wd)
        y = MatMul(x, t)
    }"""
    exponents = RNG.integers(120, 130, (8, 2)).astype(np.uint8)
    values = {"w": RNG.standard_normal((8, 64)).astype(E4M3), "s": exponents.view(ml_dtypes.float8_e8m0fnu)}
    result = apply(model(text, values), NormalizeQdq())
    x = RNG.standard_normal((4, 64)).astype(np.float16)
    scale = np.repeat(np.exp2(exponents.astype(np.float32) - 127), 32, axis=1)
    (got,) = run(result.model, {"x": x})
    want = x.astype(np.float32) @ (values["w"].astype(np.float32) * scale).T
    assert error(got.astype(np.float32), want) < 2e-3


def test_dynamic_quantizers_get_domain_attributes_and_types() -> None:
    text = """g (float16[b,32] x) => (float[b,32] y) {
        q, s = trt.TRT_FP4DynamicQuantize(x, s2)
        step = DequantizeLinear(s, s2)
        y = DequantizeLinear<axis = -1, block_size = 16>(q, step)
    }"""
    result = apply(model(text, {"s2": np.array([0.001], np.float32)}), NormalizeQdq())
    node = result.model.graph.node[0]
    assert {a.name: a.i for a in node.attribute} == {"axis": -1, "block_size": 16, "scale_type": 17}
    types = {v.name: v.type.tensor_type.elem_type for v in result.model.graph.value_info}
    assert (types["q"], types["s"]) == (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN)
    (scale,) = (t for t in result.model.graph.initializer if t.name == node.input[1])
    assert list(scale.dims) == []


def test_a_dequantizer_of_a_float_weight_is_left_with_the_reason() -> None:
    text = "g (float16[b,32] x) => (float16[b,32] y) { d = trt.DequantizeLinear(w, s) y = MatMul(x, d) }"
    values = {"w": RNG.standard_normal((32, 32)).astype(np.float16), "s": np.array(0.1, np.float16)}
    result = Pipeline([NormalizeQdq()]).run(model(text, values), check=lambda *_: "")
    assert result.changed == 0
    assert "never quantized" in result.records[0].refusals[0].reason


def test_canonical_graphs_stay_as_they_are() -> None:
    text = """g (float16[b,32] x) => (float16[b,32] y) {
        q = QuantizeLinear(x, s, z)
        y = DequantizeLinear(q, s, z)
    }"""
    values = {"s": np.array(0.02, np.float16), "z": np.zeros((), np.int8)}
    assert Pipeline([NormalizeQdq()]).run(model(text, values)).changed == 0
