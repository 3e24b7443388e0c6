from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from passes import PassError, Pipeline
from passes.canonical.fold_weight_qdq import FoldWeightQdq
from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort.add_trt_functions import AddTrtFunctions
from passes.targets.ort.emulate_fp4 import EmulateFp4
from passes.targets.tensorrt.type_trt_ops import TypeTrtOps
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import (
    apply,
    check_same,
    error,
    materialize,
    model,
    recipes,
    run_ort,
    run_reference,
)
from tests.passes.trt_helpers import E2M1_GRID, mxfp8, nvfp4, trt_model

RNG = np.random.default_rng(11)
FP4 = ml_dtypes.float4_e2m1fn
N, K = 24, 64
EMULATION = (TypeTrtOps(), EmulateFp4(), AddTrtFunctions())


def nvfp4_network(weight: np.ndarray, amax_x: float, amax_w: float) -> onnx.ModelProto:
    """MatMul of NVFP4 activations and weights as it is traced: the weight has the dynamic quantizer, too."""
    attributes = "axis = -1, block_size = 16, scale_type = 17"
    return trt_model(
        f"""g (float16[b,t,{K}] x) => (float[b,t,{N}] y) {{
            xq, xb = trt.TRT_FP4DynamicQuantize<{attributes}>(x, xs)
            xw = DequantizeLinear(xb, xs)
            xd = DequantizeLinear<axis = -1, block_size = 16>(xq, xw)
            xh = Cast<to = 10>(xd)
            wq, wb = trt.TRT_FP4DynamicQuantize<{attributes}>(w, ws)
            ww = DequantizeLinear(wb, ws)
            wd = DequantizeLinear<axis = -1, block_size = 16>(wq, ww)
            wt = Transpose<perm = [1, 0]>(wd)
            wh = Cast<to = 10>(wt)
            xf = Cast<to = 1>(xh)
            wf = Cast<to = 1>(wh)
            y = MatMul(xf, wf)
        }}""",
        {
            "w": Recipe.of_array(weight),
            "xs": np.array(amax_x / 2688, np.float32),
            "ws": np.array(amax_w / 2688, np.float32),
        },
    )


def mxfp8_network(weight: np.ndarray) -> onnx.ModelProto:
    quantize = "trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>"
    dequantize = "trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = 10>"
    return trt_model(
        f"""g (float16[b,t,{K}] x) => (float[b,t,{N}] y) {{
            xq, xs = {quantize}(x)
            xd = {dequantize}(xq, xs)
            wq, ws = {quantize}(w)
            wd = {dequantize}(wq, ws)
            wt = Transpose<perm = [1, 0]>(wd)
            xf = Cast<to = 1>(xd)
            wf = Cast<to = 1>(wt)
            y = MatMul(xf, wf)
        }}""",
        {"w": Recipe.of_array(weight)},
    )


def sample() -> tuple[np.ndarray, np.ndarray]:
    """Activations [2, 5, K] and a weight [N, K] in float16, of rows with different scales."""
    x = RNG.standard_normal((2, 5, K)) * np.exp2(RNG.integers(-3, 4, (2, 5, 1)))
    w = RNG.standard_normal((N, K)) * np.exp2(RNG.integers(-6, 1, (N, 1)))
    return x.astype(np.float16), w.astype(np.float16)


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [..., K] times w [N, K] transposed; both are rounded to float16 first."""
    left, right = (value.astype(np.float32).astype(np.float16).astype(np.float64) for value in (x, w))
    return (left @ right.T).astype(np.float32)


def nvfp4_simulated(x: np.ndarray, s2: float) -> np.ndarray:
    values, scales = nvfp4(x, s2)
    return values * np.repeat((scales * np.float32(s2)).astype(np.float32), 16, -1)


def mxfp8_simulated(x: np.ndarray) -> np.ndarray:
    values, scales = mxfp8(x)
    return values * np.repeat(np.ldexp(1.0, scales - 127), 32, -1)


@pytest.mark.parametrize("folded", [False, True])
def test_an_nvfp4_network_runs_in_onnx_runtime(folded: bool) -> None:
    x, w = sample()
    amax_x, amax_w = float(np.abs(x).max()) * 0.8, float(np.abs(w).max())
    traced = nvfp4_network(w, amax_x, amax_w)
    if folded:
        traced = apply(traced, FoldWeightQdq(), RemoveUnused()).model
        assert {r.dtype for r in recipes(traced).values()} == {
            TensorProto.FLOAT4E2M1,
            TensorProto.FLOAT8E4M3FN,
        }
    emulated = apply(traced, *EMULATION).model
    want = product(
        nvfp4_simulated(x, np.float32(amax_x / 2688)), nvfp4_simulated(w, np.float32(amax_w / 2688))
    )
    got = run_ort(emulated, {"x": x})[0]
    assert error(got, want) < 1e-6  # sums in another order
    assert error(run_reference(apply(traced, AddTrtFunctions()).model, {"x": x})[0], want) < 1e-6
    unquantized = product(x, w)
    assert 2e-2 < error(unquantized, want) < 0.2
    wrong = run_ort(emulated, {"x": x[:, ::-1]})[0]
    assert error(wrong, want) > 0.5


@pytest.mark.parametrize("folded", [False, True])
def test_an_mxfp8_network_runs_in_onnx_runtime(folded: bool) -> None:
    x, w = sample()
    traced = mxfp8_network(w)
    if folded:
        traced = apply(traced, FoldWeightQdq(), RemoveUnused()).model
        assert {r.dtype for r in recipes(traced).values()} == {TensorProto.UINT8, TensorProto.FLOAT8E4M3FN}
    emulated = apply(traced, *EMULATION).model
    want = product(mxfp8_simulated(x), mxfp8_simulated(w))
    assert error(run_ort(emulated, {"x": x})[0], want) < 1e-6
    assert error(run_reference(emulated, {"x": x})[0], want) < 1e-6
    assert 5e-3 < error(product(x, w), want) < 0.1


def all_values() -> np.ndarray:
    """The 16 numbers of E2M1, in the order of their bits."""
    values = np.arange(16, dtype=np.uint8).view(FP4)
    assert np.array_equal(np.abs(values.astype(np.float64))[:8], E2M1_GRID)
    return values


def test_every_value_stays_inline_in_a_recipe_and_in_a_constant_node() -> None:
    values = all_values()
    made = model(
        """g (float s) => (float[16] a, float[16] b, float[16] c, float4e2m1[16] d) <float4e2m1[16] n> {
            a = DequantizeLinear(inline, s, zero)
            b = DequantizeLinear(recipe, s)
            n = Constant<value = float[16] {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}>()
            c = DequantizeLinear<output_dtype = 1>(n, s)
            d = Identity(inline)
        }""",
        {"inline": values, "recipe": Recipe.of_array(values), "zero": np.array(0, FP4)},
    )
    constant = next(node for node in made.graph.node if node.op_type == "Constant")
    constant.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(values))
    emulated = apply(made, EmulateFp4()).model
    assert fp4_left(made)
    assert not fp4_left(emulated)
    got = run_ort(emulated, {"s": np.array(0.5, np.float32)})
    for output in got[:3]:
        assert np.array_equal(
            output.view(np.uint32), (values.astype(np.float32) * np.float32(0.5)).view(np.uint32)
        )
    assert np.array_equal(got[3].view(ml_dtypes.float8_e4m3fn).astype(np.float32), values.astype(np.float32))
    check_same(
        made, emulated, {"s": np.array(0.3, np.float32)}, runner=first_three, reference=reference_three
    )


def first_three(made: onnx.ModelProto, feeds: Any) -> list[Any]:
    return run_ort(made, feeds)[:3]


def reference_three(made: onnx.ModelProto, feeds: Any) -> list[Any]:
    return run_reference(made, feeds)[:3]


def fp4_left(made: onnx.ModelProto) -> list[str]:
    """Where the model has FLOAT4E2M1."""
    values = [*made.graph.input, *made.graph.output, *made.graph.value_info]
    left = [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT4E2M1]
    left += [tensor.name for tensor in made.graph.initializer if tensor.data_type == TensorProto.FLOAT4E2M1]
    attributes = [(node.name, item) for node in made.graph.node for item in node.attribute]
    left += [name for name, item in attributes if TensorProto.FLOAT4E2M1 in (item.t.data_type,)]
    return left + [
        name
        for name, item in attributes
        if item.name in ("to", "output_dtype") and item.i == TensorProto.FLOAT4E2M1
    ]


def test_nothing_is_left_in_a_network_and_the_rest_stays() -> None:
    _x, w = sample()
    traced = apply(nvfp4_network(w, 3.0, 2.0), FoldWeightQdq(), RemoveUnused(), TypeTrtOps()).model
    emulated = apply(traced, EmulateFp4()).model
    assert len(fp4_left(traced)) == 2  # the activation's values, the weight
    assert fp4_left(emulated) == []
    assert [node.op_type for node in emulated.graph.node] == [node.op_type for node in traced.graph.node]
    for name, recipe in recipes(traced).items():
        was, now = (materialize(made).graph.initializer for made in (traced, emulated))
        arrays = [onnx.numpy_helper.to_array(t) for ts in (was, now) for t in ts if t.name == name]
        assert np.array_equal(*(array.astype(np.float32) for array in arrays))
        assert recipes(emulated)[name].dtype == TensorProto.FLOAT8E4M3FN
        assert (recipes(emulated)[name] == recipe) == (recipe.dtype == TensorProto.FLOAT8E4M3FN)


def test_typing_after_it_keeps_the_type() -> None:
    _, w = sample()
    emulated = apply(nvfp4_network(w, 3.0, 2.0), FoldWeightQdq(), EmulateFp4()).model
    typed = apply(emulated, TypeTrtOps()).model
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    assert types["xq"] == TensorProto.FLOAT8E4M3FN


def test_a_damaged_weight_is_noticed() -> None:
    x, w = sample()
    emulated = materialize(
        apply(nvfp4_network(w, 3.0, 2.0), FoldWeightQdq(), RemoveUnused(), *EMULATION).model
    )
    want = run_ort(emulated, {"x": x})[0]
    tensor = next(t for t in emulated.graph.initializer if list(t.dims) == [N, K])
    array = onnx.numpy_helper.to_array(tensor).copy()
    place = np.unravel_index(np.argmax(np.abs(array.astype(np.float32))), array.shape)
    array[place] = -array[place]
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    assert error(run_ort(emulated, {"x": x})[0], want) > 1e-3


@pytest.mark.parametrize(
    "node",
    ["q = Cast<to = 23>(x)", "q = QuantizeLinear<output_dtype = 23>(x, s)", "q = QuantizeLinear(x, s, zero)"],
)
def test_rounding_to_fp4_is_refused(node: str) -> None:
    made = model(
        f"g (float[n] x, float s) => (float[n] y) {{ {node}  y = DequantizeLinear(q, s) }}",
        {"zero": np.array(0, FP4)},
    )
    with pytest.raises(PassError, match="rounds to FLOAT4E2M1, which FLOAT8E4M3FN cannot stand for"):
        Pipeline((EmulateFp4(),)).run(made)


def test_subgraphs_too_and_a_model_without_fp4_stays() -> None:
    text = """g (bool c, float s) => (float[16] y) {
        y = If<then_branch = then () => (float[16] a) { a = DequantizeLinear(w, s) },
               else_branch = other () => (float[16] b) { i = Identity(w)  b = DequantizeLinear(i, s) }>(c)
    }"""
    made = model(text, {"w": all_values()})
    emulated = apply(made, EmulateFp4()).model
    for choice in (True, False):
        feeds = {"c": np.array(choice), "s": np.array(0.3, np.float32)}
        check_same(made, emulated, feeds, reference=run_reference)
    assert Pipeline((EmulateFp4(),)).run(emulated).changed == 0
