import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from passes import PassError
from passes.targets.ort.widen_types import WidenTypes
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, error, model, ops, recipes, run_ort, run_reference

RNG = np.random.default_rng(7)
BF16 = ml_dtypes.bfloat16


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(BF16)


def quantized_graph() -> onnx.ModelProto:
    weight = Recipe.of_array(random(8, 16)).quantize(Recipe.of_array(np.array(0.02, BF16)), 17)
    return model(
        """g (bfloat16[b,16] x, float[b,8] f) => (bfloat16[b,8] y, int64[2] n) {
            q = QuantizeLinear(x, xs, zero)
            d = DequantizeLinear<output_dtype = 16>(q, xs, zero)
            wd = DequantizeLinear(w, ws, zero)
            h = Gemm<transB = 1>(d, wd, bias)
            g = Cast<to = 16>(f)
            half = Constant<value = bfloat16 {16128}>()
            i = Mul(g, half)
            y = Add(h, i)
            n = Shape(y)
        }""",
        {
            "w": weight,
            "ws": np.array(0.02, BF16),
            "xs": np.array(0.01, BF16),
            "zero": np.array(0, ml_dtypes.float8_e4m3fn),
            "bias": Recipe.of_array(random(8)),
        },
    )


def bfloat16_left(made: onnx.ModelProto) -> list[str]:
    values = [*made.graph.input, *made.graph.output, *made.graph.value_info]
    left = [v.name for v in values if v.type.tensor_type.elem_type == TensorProto.BFLOAT16]
    left += [t.name for t in made.graph.initializer if t.data_type == TensorProto.BFLOAT16]
    return left + [n.name for n in made.graph.node for a in n.attribute if a.i == TensorProto.BFLOAT16]


def test_nothing_of_the_source_type_is_left_and_quantized_types_stay() -> None:
    before = quantized_graph()
    assert bfloat16_left(before)
    result = apply(before, WidenTypes())
    assert ops(result.model) == ops(before)
    assert bfloat16_left(result.model) == []
    assert recipes(result.model)["w"] == recipes(before)["w"]
    assert recipes(result.model)["bias"].dtype == TensorProto.FLOAT
    types = {t.name: t.data_type for t in result.model.graph.initializer}
    assert (types["w"], types["zero"]) == (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FN)


@pytest.mark.parametrize("batch", [1, 5])
def test_twin_runs_in_onnx_runtime_within_bfloat16_rounding(batch: int) -> None:
    before = quantized_graph()
    twin = apply(before, WidenTypes()).model
    x, f = random(batch, 16), RNG.standard_normal((batch, 8)).astype(np.float32)
    want, shape = run_reference(before, {"x": x, "f": f})
    got, got_shape = run_ort(twin, {"x": x.astype(np.float32), "f": f})
    assert got.dtype == np.float32
    assert 0 < error(got, want.astype(np.float32)) < WidenTypes.tolerance
    assert np.array_equal(shape, got_shape)


def test_other_types_can_be_named() -> None:
    before = model(
        "g (float16[n] x) => (float16[n] y) { a = Cast<to = 1>(x)  b = Cast<to = 10>(a)  y = Mul(b, w) }",
        {"w": np.float16([1.25])},
    )
    result = apply(before, WidenTypes(source="float16"))
    x = RNG.standard_normal(5).astype(np.float16)
    want = run_ort(before, {"x": x})[0].astype(np.float32)
    assert error(run_ort(result.model, {"x": x.astype(np.float32)})[0], want) < 1e-3


def test_a_model_without_the_type_stays() -> None:
    before = model("g (float[n] x) => (float[n] y) { y = Mul(x, w) }", {"w": np.float32([1.25])})
    result = apply(before, WidenTypes())
    assert result.changed == 0
    check_same(before, result.model, {"x": RNG.standard_normal(3).astype(np.float32)})


def test_subgraphs_widen_too() -> None:
    before = model(
        """g (bool c, bfloat16[n] x) => (bfloat16[n] y) {
            y = If<then_branch = then () => (bfloat16[n] a) { a = Mul(x, w) },
                   else_branch = other () => (bfloat16[n] b) { b = Add(x, w) }>(c)
        }""",
        {"w": np.array([1.25], BF16)},
    )
    twin = apply(before, WidenTypes()).model
    x = random(4)
    for choice in (True, False):
        values = {"c": np.array(choice), "x": x}
        want = run_reference(before, values)[0].astype(np.float32)
        assert error(run_ort(twin, values | {"x": x.astype(np.float32)})[0], want) < WidenTypes.tolerance


def test_unknown_type_is_refused() -> None:
    with pytest.raises(PassError, match=r"unknown type 'int8'\. Known: float32, float16, bfloat16"):
        apply(quantized_graph(), WidenTypes(source="int8"))
