from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from passes import PassError, Pipeline
from passes.graph.trt_ops import TRT_OPS
from passes.targets.ort.add_trt_functions import AddTrtFunctions
from passes.targets.ort.emulate_fp4 import EmulateFp4
from passes.targets.ort.trt_functions import BODIES
from passes.targets.tensorrt.type_trt_ops import TypeTrtOps
from passes.weights.block_operations import mxfp8_scales, mxfp8_values, nvfp4_scales, nvfp4_values
from tests.passes.graph_helpers import apply, run_ort, run_reference
from tests.passes.trt_helpers import E4M3_GRID, hard_inputs, mxfp8, nvfp4, round_to, trt_model

NAMES = {np.float32: "float", np.float16: "float16", ml_dtypes.bfloat16: "bfloat16"}
RUNNERS = {"ort": run_ort, "reference": run_reference}
Runner = Callable[[onnx.ModelProto, Any], list[Any]]


def cast_in(dtype: Any) -> str:
    """ONNX text: `x` of `dtype` from the float32 input `wide` (ONNX Runtime's Python has no bfloat16 inputs)."""
    return f"x = Cast<to = {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}>(wide)"


def nvfp4_model(dtype: Any = np.float32) -> onnx.ModelProto:
    return trt_model(
        f"""g (float[n,k] wide, float s2) => (float[n,k] values, float[n,j] scales)
        <float4e2m1[n,k] q, float8e4m3fn[n,j] s> {{
            {cast_in(dtype)}
            q, s = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>(x, s2)
            values = Cast<to = 1>(q)
            scales = Cast<to = 1>(s)
        }}"""
    )


def mxfp8_model(dtype: Any = np.float32) -> onnx.ModelProto:
    onnx_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return trt_model(
        f"""g (float[n,k] wide) => (float[n,k] back, float[n,k] values, uint8[n,j] scales)
        <float8e4m3fn[n,k] q> {{
            {cast_in(dtype)}
            q, scales = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>(x)
            y = trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = {onnx_type}>(q, scales)
            values = Cast<to = 1>(q)
            back = Cast<to = 1>(y)
        }}"""
    )


def with_functions(made: onnx.ModelProto, runner: Runner) -> onnx.ModelProto:
    steps = (EmulateFp4(), AddTrtFunctions()) if runner is run_ort else (AddTrtFunctions(),)
    return apply(made, *steps).model


def same_bits(got: Any, want: Any) -> bool:
    """Equal as numbers and in the signs of zeros."""
    got, want = (np.asarray(value).astype(np.float64) for value in (got, want))
    return np.array_equal(got.view(np.int64), want.view(np.int64))


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_nvfp4_is_the_definition_bit_for_bit(dtype: Any, runner: Runner) -> None:
    made = with_functions(nvfp4_model(dtype), runner)
    for name, x in hard_inputs(1, dtype).items():
        amax = float(np.abs(x.astype(np.float32)).max())
        for part in (1.0, 0.37, 1e-3):  # below 1 the tensor's scale is too small and blocks saturate
            s2 = np.array(max(amax * part / 2688, 1e-30), np.float32)
            values, scales = runner(made, {"wide": x.astype(np.float32), "s2": s2})
            want_values, want_scales = nvfp4(x, float(s2))
            assert same_bits(scales, want_scales), (name, part)
            assert same_bits(values, want_values), (name, part)
            assert same_bits(scales, nvfp4_scales(x, s2, 16)), (name, part)
            assert same_bits(values, nvfp4_values(x, s2, 16)), (name, part)


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_mxfp8_is_the_definition_bit_for_bit(dtype: Any, runner: Runner) -> None:
    made = with_functions(mxfp8_model(dtype), runner)
    for name, x in hard_inputs(2, dtype).items():
        back, values, scales = runner(made, {"wide": x.astype(np.float32)})
        want_values, want_scales = mxfp8(x)
        assert np.array_equal(scales, want_scales), name
        assert same_bits(values, want_values), name
        assert np.array_equal(scales, mxfp8_scales(x, 32)), name
        assert same_bits(values, mxfp8_values(x, 32)), name
        factors = np.repeat(np.ldexp(np.float32(1), want_scales - 127), 32, -1).astype(np.float32)
        with np.errstate(over="ignore"):
            want = (want_values.astype(np.float32) * factors).astype(dtype)
        assert same_bits(back, want.astype(np.float32)), name


@pytest.mark.parametrize(("old", "new"), [("Round", "Floor"), ("Min", "Max"), ("GreaterOrEqual", "Less")])
def test_a_damaged_nvfp4_body_is_noticed(old: str, new: str) -> None:
    made = with_functions(nvfp4_model(), run_ort)
    x = hard_inputs(1)["spread"]
    s2 = np.array(np.abs(x).max() * 0.5 / 2688, np.float32)
    for body, right in ((made, True), (damaged(made, old, new), False)):
        got = run_ort(body, {"wide": x, "s2": s2})
        assert all(same_bits(a, b) for a, b in zip(got, nvfp4(x, float(s2)), strict=True)) == right


@pytest.mark.parametrize(
    ("old", "new"), [("Greater", "GreaterOrEqual"), ("LessOrEqual", "Less"), ("Ceil", "Floor")]
)
def test_a_damaged_mxfp8_body_is_noticed(old: str, new: str) -> None:
    made = damaged(with_functions(mxfp8_model(), run_ort), old, new)
    x = hard_inputs(2)["powers of two"]
    wrong = not np.array_equal(run_ort(made, {"wide": x})[2], mxfp8(x)[1])
    # The correction by comparison makes good for a bad guess, and for one that is exact.
    assert wrong == (old == "Greater")


def damaged(made: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    """The model with operator `old` of its first function replaced."""
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    hit = [node for function in copy.functions for node in function.node if node.op_type == old]
    assert hit
    for node in hit:
        node.op_type = new
    return copy


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_fp8_pairs(dtype: Any, runner: Runner) -> None:
    """TRT_FP8* of ModelOpt's export, and the renamed operators with a zero point and without."""
    made = trt_model(
        f"""g (float[n,k] wide) => (float[n,k] a, float[n,k] b) {{
            {cast_in(dtype)}
            qa = trt.TRT_FP8QuantizeLinear(x, s)
            ya = trt.TRT_FP8DequantizeLinear(qa, s)
            a = Cast<to = 1>(ya)
            qb = trt.QuantizeLinear<saturate = 1>(x, s, zero)
            yb = trt.DequantizeLinear(qb, s)
            b = Cast<to = 1>(yb)
        }}""",
        {"s": np.array(0.037, dtype), "zero": np.zeros(1, ml_dtypes.float8_e4m3fn)},
    )
    made = apply(made, AddTrtFunctions()).model
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((16, 32)) * np.exp2(np.arange(-10, 6)[:, None])).astype(dtype).astype(np.float32)
    s = np.array(0.037, dtype).astype(np.float32)
    want = (round_to(E4M3_GRID, x / s).astype(np.float32) * s).astype(dtype)
    assert np.abs(x).max() > 448 * s  # something saturates
    for got in runner(made, {"wide": x}):
        assert same_bits(got, want)


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
def test_int4_blocks(runner: Runner) -> None:
    rng = np.random.default_rng(4)
    x = (rng.integers(-40, 41, (8, 64)) / 4).astype(np.float16)  # ties
    scale = (2.0 ** rng.integers(-1, 2, (8, 2))).astype(np.float16)
    made = trt_model(
        """g (float16[8,64] x) => (float16[8,64] y) {
            q = trt.TRT_INT4QuantizeLinear<axis = 1, block_size = 32>(x, s)
            y = trt.TRT_INT4DequantizeLinear<axis = 1, block_size = 32>(q, s)
        }""",
        {"s": scale},
    )
    wide = np.repeat(scale.astype(np.float32), 32, 1)
    want = (np.clip(np.round(x.astype(np.float32) / wide), -8, 7) * wide).astype(np.float16)
    got = runner(apply(made, AddTrtFunctions()).model, {"x": x})[0]
    assert np.array_equal(got, want)  # integers have no negative zero
    assert len(np.unique(want)) > 20


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
def test_fp4qdq_takes_the_scale_of_the_whole_tensor(runner: Runner) -> None:
    made = trt_model(
        "g (float[n,k] x) => (float[n,k] y) { y = trt.TRT_FP4QDQ<block_size = 16>(x) }",
    )
    made = apply(made, AddTrtFunctions()).model
    for name, x in hard_inputs(5).items():
        if name != "tiny":
            s2 = np.float32(np.abs(x).max()) / np.float32(2688)
            values, scales = nvfp4(x, s2)
            want = values.astype(np.float32) * np.repeat(scales.astype(np.float32) * s2, 16, -1)
            assert same_bits(runner(made, {"x": x})[0], want), name


def test_a_tensor_scale_of_zero_makes_zeros_of_zeros() -> None:
    made = with_functions(nvfp4_model(), run_ort)
    feeds = {"wide": np.zeros((2, 32), np.float32), "s2": np.array(0, np.float32)}
    assert all(np.array_equal(got, np.zeros_like(got)) for got in run_ort(made, feeds))


def test_a_last_axis_that_is_not_whole_blocks_does_not_run() -> None:
    made = with_functions(mxfp8_model(), run_ort)
    with pytest.raises(Exception, match="Reshape"):
        run_ort(made, {"wide": np.ones((4, 48), np.float32)})  # 4 * 48 is 6 blocks of 32


def test_runs_at_every_optimization_level() -> None:
    import onnxruntime as ort

    made = with_functions(nvfp4_model(), run_ort).SerializeToString()
    x = hard_inputs(6)["spread"]
    s2 = np.array(np.abs(x).max() / 2688, np.float32)
    for level in (ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        session = ort.InferenceSession(made, sess_options=options, providers=["CPUExecutionProvider"])
        got = session.run(None, {"wide": x, "s2": s2})
        assert all(same_bits(a, b) for a, b in zip(got, nvfp4(x, float(s2)), strict=True))


def test_remove_takes_them_out_again_and_leaves_other_functions() -> None:
    made = nvfp4_model()
    twice = onnx.parser.parse_function(
        '<domain: "own", opset_import: ["": 23]> Twice (a) => (b) { b = Add(a, a) }'
    )
    made.functions.append(twice)
    added = apply(made, AddTrtFunctions()).model
    assert [(f.domain, f.name) for f in added.functions] == [
        ("own", "Twice"),
        ("trt", "TRT_FP4DynamicQuantize"),
    ]
    bare = apply(added, AddTrtFunctions(remove=True)).model
    assert [f.name for f in bare.functions] == ["Twice"]
    assert bare.graph == Pipeline(()).run(made).model.graph
    assert Pipeline.parse("add-trt-functions{remove=true}").passes == (AddTrtFunctions(remove=True),)


def test_operators_in_subgraphs_and_different_attributes_of_one_operator() -> None:
    body = "trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = %d, output_dtype = %d>(%s, %s)"
    quantize = "trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = %d, output_dtype = 17>(x)"
    made = trt_model(
        f"""g (bool c, float[n,64] x) => (float[n,64] y) {{
            y = If<then_branch = then () => (float[n,64] a) {{
                    q, s = {quantize % 32}
                    a = {body % (32, 1, "q", "s")}
                }}, else_branch = other () => (float[n,64] b) {{
                    p, t = {quantize % 16}
                    h = {body % (16, 10, "p", "t")}
                    b = Cast<to = 1>(h)
                }}>(c)
        }}"""
    )
    made = apply(made, TypeTrtOps(), AddTrtFunctions()).model
    x = hard_inputs(7, columns=64)["spread"]
    for choice, block in ((True, 32), (False, 16)):
        values, scales = mxfp8(x, block)
        want = values * np.repeat(np.ldexp(1.0, scales - 127), block, -1)
        for runner in RUNNERS.values():
            got = runner(made, {"c": np.array(choice), "x": x})[0]
            assert same_bits(got, want.astype(np.float16 if block == 16 else np.float32))


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ("axis = 0, block_size = 16", "its blocks lie along axis 0"),
        ("axis = -1, block_size = 16, scale_type = 1", "its block scales are FLOAT;"),
    ],
)
def test_what_the_body_does_not_do_is_refused(attributes: str, why: str) -> None:
    made = trt_model(
        f"""g (float[32,32] x, float s2) => (float4e2m1[32,32] q, float8e4m3fn[32,2] s) {{
            q, s = trt.TRT_FP4DynamicQuantize<{attributes}>(x, s2)
        }}"""
    )
    result = Pipeline((AddTrtFunctions(),)).run(made)
    assert result.changed == 0
    assert not result.model.functions
    (refusal,) = result.records[0].refusals
    assert why in refusal.reason
    assert refusal.node
    accepted = trt_model(onnx.printer.to_text(made.graph).replace("axis: int = 0", "axis: int = 1"))
    if "axis = 0" in attributes:
        assert apply(accepted, AddTrtFunctions()).changed == 1


def test_an_old_opset_is_refused() -> None:
    made = trt_model(
        "g (float[n] x, float s) => (float8e4m3fn[n] y) { y = trt.TRT_FP8QuantizeLinear(x, s) }", opset=20
    )
    with pytest.raises(PassError, match="needs opset 21 or later, and the model has 20"):
        Pipeline((AddTrtFunctions(),)).run(made)


def test_every_operator_of_the_table_has_a_body_and_a_model_without_them_stays() -> None:
    assert BODIES.keys() == TRT_OPS.keys()
    made = trt_model("g (float[n] x) => (float[n] y) { y = Abs(x) }")
    assert Pipeline((AddTrtFunctions(),)).run(made).changed == 0


def test_zero_points_may_be_there_for_some_nodes_only() -> None:
    made = trt_model(
        """g (float[n] x) => (float[n] y, float[n] z) {
            q = trt.QuantizeLinear<output_dtype = 17>(x, s)
            y = trt.DequantizeLinear(q, s)
            p = trt.QuantizeLinear(x, s, zero)
            z = trt.DequantizeLinear(p, s, zero)
        }""",
        {"s": np.array(0.01, np.float32), "zero": np.array(3, np.int8)},
    )
    x = np.random.default_rng(8).standard_normal(64).astype(np.float32)
    y, z = run_ort(apply(made, AddTrtFunctions()).model, {"x": x})
    s = np.float32(0.01)
    assert same_bits(y, round_to(E4M3_GRID, x / s).astype(np.float32) * s)
    assert np.array_equal(z, (np.clip(np.round(x / s) + 3, -128, 127) - 3).astype(np.float32) * s)
