from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from diffc.quantize.simulate import four_six_fake_quant, mxfp8_fake_quant, nvfp4_fake_quant
from passes.canonical.fold_weight_qdq import FoldWeightQdq
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, model, ops, recipes, run_ort, run_reference

RNG = np.random.default_rng(4)
GRAPH = """g (KIND[b,16] x) => (KIND[b,8] y) {
    q = QuantizeLinear<axis = AXIS, block_size = BLOCK>(w, scale, zero)
    d = DequantizeLinear<axis = AXIS, block_size = BLOCK>(q, scale, zero)
    y = MatMul(x, d)
}"""
QUANTIZE = "g () => (int8[16,8] q) { q = QuantizeLinear<axis = AXIS>(w, scale, zero) }"
NAMES = {
    np.dtype(np.float32): "float",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def positive(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (0.01 + 0.02 * RNG.random(shape)).astype(dtype)


def graph(dtype: Any, axis: int = 1, block: int = 0) -> str:
    return (
        GRAPH.replace("KIND", NAMES[np.dtype(dtype)]).replace("AXIS", str(axis)).replace("BLOCK", str(block))
    )


@pytest.mark.parametrize("as_recipe", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stored", [np.int8, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_weight_is_stored_in_one_byte(as_recipe: bool, dtype: Any, stored: Any, axis: int | None) -> None:
    weight = random(16, 8, dtype=dtype)
    shape = () if axis is None else (weight.shape[axis],)
    values = {
        "w": Recipe.of_array(weight) if as_recipe else weight,
        "scale": positive(*shape, dtype=dtype),
        "zero": np.zeros(shape, stored),
    }
    before = model(graph(dtype, 1 if axis is None else axis), values)
    result = apply(before, FoldWeightQdq())
    assert ops(result.model) == ["DequantizeLinear", "MatMul"]
    (recipe,) = (r for r in recipes(result.model).values() if r.dtype != TensorProto.FLOAT)
    assert recipe.nbytes == weight.size
    wide = {
        "w": weight.astype(np.float32),
        "scale": values["scale"].astype(np.float32),
        "zero": values["zero"],
    }
    exact = model(QUANTIZE.replace("AXIS", str(axis or 0)), wide)
    (expected,) = run_reference(exact, {})
    assert np.array_equal(evaluate(recipe).view(np.uint8), expected.view(np.uint8))
    # In 16 bits the operator divides in 16 bits and rounds twice, so some weights are one step off.
    runner = run_reference if np.dtype(dtype) == ml_dtypes.bfloat16 else run_ort  # ORT has no bf16 arithmetic
    tolerance = 0.0 if dtype == np.float32 else 4e-2
    check_same(before, result.model, {"x": random(3, 16, dtype=dtype)}, tolerance, runner)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks(axis: int) -> None:
    shape = (4, 8) if axis == 0 else (16, 2)
    values = {
        "w": Recipe.of_array(random(16, 8)),
        "scale": 0.1 + positive(*shape),
        "zero": np.zeros(shape, ml_dtypes.int4),
    }
    before = model(graph(np.float32, axis, 4), values)
    result = apply(before, FoldWeightQdq())
    assert ops(result.model) == ["DequantizeLinear", "MatMul"]
    assert recipes(result.model)["w_q"].nbytes == 16 * 8 // 2
    check_same(before, result.model, {"x": random(3, 16)}, 0.0, run_reference)


def test_through_cast_and_identity_and_without_zero_point() -> None:
    before = model(
        """g (float16[b,16] x) => (float16[b,8] y) {
            i = Identity(w)
            h = Cast<to = 10>(i)
            s = Cast<to = 10>(scale)
            q = QuantizeLinear<output_dtype = 17>(h, s)
            d = DequantizeLinear(q, s)
            y = MatMul(x, d)
        }""",
        {"w": Recipe.of_array(random(16, 8)), "scale": positive()},
    )
    result = apply(before, FoldWeightQdq())
    assert "QuantizeLinear" not in ops(result.model)
    assert recipes(result.model)["w_q"].dtype == TensorProto.FLOAT8E4M3FN
    check_same(before, result.model, {"x": random(3, 16, dtype=np.float16)}, 4e-2, run_reference)


def test_same_bytes_are_stored_once_and_others_apart() -> None:
    before = model(
        """g (float[b,16] x) => (float[b,8] y, float[b,8] z, float[b,8] v) {
            q1 = QuantizeLinear(w, s1, zero)   d1 = DequantizeLinear(q1, s1, zero)   y = MatMul(x, d1)
            q2 = QuantizeLinear(w, s1, zero)   d2 = DequantizeLinear(q2, s1, zero)   z = MatMul(x, d2)
            q3 = QuantizeLinear(w, s2, zero)   d3 = DequantizeLinear(q3, s2, zero)   v = MatMul(x, d3)
        }""",
        {"w": Recipe.of_array(random(16, 8)), "s1": positive(), "s2": positive(), "zero": np.int8(0)},
    )
    result = apply(before, FoldWeightQdq())
    assert set(recipes(result.model)) == {"w_q", "w_q_2"}
    check_same(before, result.model, {"x": random(3, 16)})


def test_activations_stay() -> None:
    before = model(
        """g (float[b,16] x) => (float[b,16] y) {
            q = QuantizeLinear(x, scale, zero)  d = DequantizeLinear(q, scale, zero)  y = Neg(d) }""",
        {"scale": positive(), "zero": np.int8(0)},
    )
    result = apply(before, FoldWeightQdq())
    assert result.changed == 0
    assert result.records[0].refusals == ()


@pytest.mark.parametrize(
    ("body", "zero", "reason"),
    [
        ("d = DequantizeLinear(q, scale, zero)", np.int8(3), "zero point is not zero"),
        ("d = DequantizeLinear(q, scale, zero)", np.uint8(0), "UINT8"),
        ("e = Cast<to = 1>(q)  d = Identity(e)", np.int8(0), "read by Cast"),
    ],
)
def test_refuses(body: str, zero: Any, reason: str) -> None:
    before = model(
        f"""g (float[b,16] x) => (float[b,8] y) {{
            q = QuantizeLinear(w, scale, zero)  {body}  y = MatMul(x, d) }}""",
        {"w": Recipe.of_array(random(16, 8)), "scale": positive(), "zero": zero},
    )
    result = apply(before, FoldWeightQdq())
    assert ops(result.model) == ops(before)
    (refusal,) = result.records[0].refusals
    assert reason in refusal.reason


def test_refuses_a_scale_that_is_computed_and_a_zero_point_that_is() -> None:
    before = model(
        """g (float[b,16] x, float scale, int8 zero) => (float[b,8] y, float[b,8] z) {
            q = QuantizeLinear(w, scale, none)  d = DequantizeLinear(q, scale, none)  y = MatMul(x, d)
            r = QuantizeLinear(w, fixed, zero)  e = DequantizeLinear(r, fixed, zero)  z = MatMul(x, e)
        }""",
        {"w": Recipe.of_array(random(16, 8)), "fixed": positive(), "none": np.int8(0)},
    )
    result = apply(before, FoldWeightQdq())
    assert result.changed == 0
    assert [r.reason for r in result.records[0].refusals] == [
        "the scale is not constant",
        "the zero point is not an inline constant",
    ]


NVFP4 = """g (KIND[b,64] x) => (KIND[b,8] y) {
    q, s = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>(w, scale)
    wide = DequantizeLinear(s, scale)
    d = DequantizeLinear<axis = -1, block_size = 16>(q, wide)
    h = CastLike(d, x)
    t = Transpose<perm = [1, 0]>(h)
    y = MatMul(x, t)
}"""
MXFP8 = """g (KIND[b,64] x) => (KIND[b,8] y) {
    q, s = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>(w)
    d = trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = TYPE>(q, s)
    t = Transpose<perm = [1, 0]>(d)
    y = MatMul(x, t)
}"""


def dynamic(text: str, dtype: Any, values: dict[str, Any]) -> Any:
    """A graph with TensorRT's operators, whose outputs the graph says the types of."""
    number = str(int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))
    made = model(text.replace("KIND", NAMES[np.dtype(dtype)]).replace("TYPE", number), values)
    made.opset_import.add(domain="trt", version=1)
    return made


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dynamic_blocks_of_nvfp4_are_stored(dtype: Any) -> None:
    weight = random(8, 64, dtype=dtype)
    scale = np.float32(np.abs(weight.astype(np.float32)).max()) * np.float32(1 / 2688)
    before = dynamic(NVFP4, dtype, {"w": Recipe.of_array(weight), "scale": np.asarray(scale)})
    result = apply(before, FoldWeightQdq())
    assert ops(result.model) == ["DequantizeLinear", "DequantizeLinear", "CastLike", "Transpose", "MatMul"]
    found = recipes(result.model)
    assert {n: r.dtype for n, r in found.items() if n != "w"} == {
        "w_q": TensorProto.FLOAT4E2M1,
        "w_scale": TensorProto.FLOAT8E4M3FN,
    }
    assert (found["w_q"].nbytes, found["w_scale"].nbytes) == (8 * 32, 8 * 4)
    steps = np.repeat(evaluate(found["w_scale"]).astype(np.float32) * scale, 16, axis=1)
    stored = evaluate(found["w_q"]).astype(np.float32) * steps
    expected = nvfp4_fake_quant(torch.from_numpy(weight.astype(np.float32)), torch.tensor(scale * 2688))
    np.testing.assert_allclose(stored, expected.numpy(), rtol=1e-6)
    (first, second) = (n for n in result.model.graph.node if n.op_type == "DequantizeLinear")
    assert list(first.input) == ["w_scale", "scale"]
    assert list(second.input) == ["w_q", first.output[0]]


def test_blocks_of_four_over_six_are_stored() -> None:
    """The attribute, which TensorRT does not have, goes with the node."""
    weight = random(8, 64)
    scale = np.abs(weight).max() * np.float32(1 / 1536)
    text = NVFP4.replace("scale_type = 17", "scale_type = 17, four_over_six = 1")
    before = dynamic(text, np.float32, {"w": Recipe.of_array(weight), "scale": np.asarray(scale)})
    result = apply(before, FoldWeightQdq())
    assert all(node.domain == "" for node in result.model.graph.node)
    found = recipes(result.model)
    steps = np.repeat(evaluate(found["w_scale"]).astype(np.float32) * scale, 16, axis=1)
    stored = evaluate(found["w_q"]).astype(np.float32) * steps
    expected = four_six_fake_quant(torch.from_numpy(weight), torch.tensor(scale * 1536))
    np.testing.assert_allclose(stored, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dynamic_blocks_of_mxfp8_are_stored(dtype: Any) -> None:
    weight = random(8, 64, dtype=dtype)
    before = dynamic(MXFP8, dtype, {"w": weight})
    result = apply(before, FoldWeightQdq())
    assert ops(result.model) == ["TRT_MXFP8DequantizeLinear", "Transpose", "MatMul"]
    assert list(result.model.graph.node[0].input) == ["w_q", "w_scale"]
    found = recipes(result.model)
    assert (found["w_q"].dtype, found["w_scale"].dtype) == (TensorProto.FLOAT8E4M3FN, TensorProto.UINT8)
    exponents = np.repeat(evaluate(found["w_scale"]).astype(np.int32) - 127, 32, axis=1)
    stored = np.ldexp(evaluate(found["w_q"]).astype(np.float32), exponents)
    assert np.array_equal(stored, mxfp8_fake_quant(torch.from_numpy(weight.astype(np.float32))).numpy())


def test_equal_dynamic_blocks_are_stored_once() -> None:
    text = """g () => (float8e4m3fn[8,64] a, float8e4m3fn[8,64] b) {
        q, s = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>(w)
        p, r = trt.TRT_MXFP8DynamicQuantize<axis = 1, block_size = 32, output_dtype = 17>(w)
        a = Identity(q)  b = Identity(p)
    }"""
    result = apply(dynamic(text, np.float32, {"w": Recipe.of_array(random(8, 64))}), FoldWeightQdq())
    assert {n for n in recipes(result.model) if n != "w"} >= {"w_q"}
    assert len({n for n in recipes(result.model) if n.startswith("w_q")}) == 1


@pytest.mark.parametrize(
    ("node", "outputs", "reason"),
    [
        ("q, s = trt.TRT_MXFP8DynamicQuantize<axis = 0, block_size = 8>(w)", "y", "blocks lie along axis 0"),
        ("q, s = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 48>(w)", "y", "not whole blocks of 48"),
        ("q, s = trt.TRT_MXFP8DynamicQuantize<axis = -1>(w)", "y", "not whole blocks of 0"),
        ("y, s = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32>(w)", "", "is a graph output"),
        ("q, s = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16>(w, x)", "y", "scale is not constant"),
    ],
)
def test_refuses_dynamic_blocks(node: str, outputs: str, reason: str) -> None:
    text = f"g (float x) => (float8e4m3fn[8,64] y) {{ {node}  {'y = Identity(q)' if outputs else ''} }}"
    result = apply(dynamic(text, np.float32, {"w": Recipe.of_array(random(8, 64))}), FoldWeightQdq())
    assert result.changed == 0
    (refusal,) = result.records[0].refusals
    assert reason in refusal.reason


def test_dynamic_quantizers_of_activations_stay() -> None:
    text = """g (float[b,64] x) => (float8e4m3fn[b,64] y) {
        q, s = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32>(x)  y = Identity(q) }"""
    result = apply(dynamic(text, np.float32, {}), FoldWeightQdq())
    assert (result.changed, result.records[0].refusals) == (0, ())


TWICE = """g (float[b,256] x) => (float[b,16] y) {
    q = QuantizeLinear<axis = 1, block_size = 128, output_dtype = 22>(w, blocks)
    d = DequantizeLinear<axis = 1, block_size = 128>(q, blocks)
    BETWEEN
    r = QuantizeLinear(m, scale, zero)
    e = DequantizeLinear(r, scale, zero)
    y = MatMul(x, LAST)
}"""


@pytest.mark.parametrize(
    ("between", "last"),
    [
        ("m = Identity(d)", "t"),
        ("m = Transpose<perm = [1, 0]>(d)", "e"),  # as fuse-qdq leaves it
        ("m = Transpose(d)", "e"),
    ],
)
def test_two_quantizations_become_one_when_deep(between: str, last: str) -> None:
    text = TWICE.replace("BETWEEN", between).replace("LAST", last)
    if last == "t":
        text = text.replace("    y = MatMul", "    t = Transpose<perm = [1, 0]>(e)\n    y = MatMul")
    weight = random(16, 256)
    values = {
        "w": Recipe.of_array(weight),
        "blocks": (np.abs(weight.reshape(16, 2, 128)).max(-1) / 7).astype(np.float32),
        "scale": np.float32(0.01),
        "zero": np.zeros((), ml_dtypes.float8_e4m3fn),
    }
    before = model(text, values)
    shallow = apply(before, FoldWeightQdq())
    assert ops(shallow.model).count("QuantizeLinear") == 1  # stored in four bits
    assert {r.dtype for n, r in recipes(shallow.model).items() if n.endswith("_q")} == {TensorProto.INT4}
    feeds = {"x": random(3, 256)}
    check_same(before, shallow.model, feeds, 1e-6, run_reference)
    deep = apply(shallow.model, FoldWeightQdq(deep=True))
    assert "QuantizeLinear" not in ops(deep.model)
    eight_bits = {n for n, r in recipes(deep.model).items() if r.dtype == TensorProto.FLOAT8E4M3FN}
    assert [n.output[0] for n in deep.model.graph.node if n.input[0] in eight_bits] == ["e"]
    check_same(before, deep.model, feeds, 1e-6, run_reference)
    rounded = evaluate(next(r for r in recipes(deep.model).values() if r.dtype == TensorProto.FLOAT8E4M3FN))
    assert 8 < len(np.unique(rounded.astype(np.float32))) <= 16 * 32  # 15 steps of each block, in FP8
