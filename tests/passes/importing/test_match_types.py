"""match-types: clashes that exporters leave, each against torch's own types for the same expression."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from passes import Pipeline, PipelineResult
from passes.graph.check import check_structure
from passes.graph.from_onnx import import_graph
from passes.graph.types import compute_type
from passes.importing.match_types import MatchTypes
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import error, ops, run_ort, run_reference

RNG = np.random.default_rng(13)
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def model(graph: str, values: dict[str, Any] | None = None) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23, "trt": 1]> {graph}')
    for name, value in (values or {}).items():
        tensor = (
            value.to_tensor(name) if isinstance(value, Recipe) else onnx.numpy_helper.from_array(value, name)
        )
        made.graph.initializer.append(tensor)
    return made


def match(made: onnx.ModelProto) -> PipelineResult:
    """Run on an invalid graph; the result must be valid, and stay as it is when run again."""
    result = Pipeline([MatchTypes()]).run(made, check=lambda *_: "")
    check_structure(None, result.model, None)
    assert Pipeline([MatchTypes()]).run(result.model).changed == 0
    return result


def types(made: onnx.ModelProto) -> dict[str, int]:
    values = (*made.graph.value_info, *made.graph.output, *made.graph.input)
    known = {v.name: v.type.tensor_type.elem_type for v in values}
    return known | {t.name: t.data_type for t in made.graph.initializer}


def normal(*shape: int, dtype: Any = np.float32) -> Any:
    return RNG.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("as_recipe", [True, False])
def test_a_float32_bias_is_stored_in_the_compute_type(as_recipe: bool) -> None:
    text = "g (float16[b,8] x) => (float16[b,4] y) { m = MatMul(x, w) y = Add(m, bias) }"
    weight, bias = normal(8, 4, dtype=np.float16), normal(4)
    result = match(model(text, {"w": weight, "bias": Recipe.of_array(bias) if as_recipe else bias}))
    assert ops(result.model) == ["MatMul", "Add"]
    assert types(result.model)[result.model.graph.node[1].input[1]] == HALF
    x = normal(5, 8, dtype=np.float16)
    (got,) = run_ort(result.model, {"x": x})
    assert got.dtype == np.float16
    assert error(got.astype(np.float32), x.astype(np.float32) @ weight.astype(np.float32) + bias) < 2e-3


def test_layer_normalization_computes_in_the_type_of_its_scale() -> None:
    """What NVFP4's exporter leaves: a quantizer's float32 output in front of a 16-bit LayerNormalization."""
    text = """g (float16[b,8] x, float[b,8] wide) => (float16[b,8] y) {
        s = Add(x, x) y = LayerNormalization<axis = -1>(wide, scale, bias)
    }"""
    values = {"scale": 1 + normal(8, dtype=np.float16), "bias": normal(8, dtype=np.float16)}
    result = match(model(text, values))
    assert ops(result.model)[-2:] == ["Cast", "LayerNormalization"]
    wide = normal(4, 8)
    (got,) = run_ort(result.model, {"x": wide.astype(np.float16), "wide": wide})
    centred = wide - wide.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    want = want * values["scale"].astype(np.float32) + values["bias"].astype(np.float32)
    assert error(got.astype(np.float32), want) < 2e-3


def test_a_computed_float32_tensor_widens_what_it_meets_and_matmul_narrows_it() -> None:
    """Rotary positions: cos stays float32, as torch promotes; the product goes to attention in 16 bits."""
    text = """g (float16[b,8] q, float[b,8] angle, float16[8,8] k) => (float16[b,8] y) {
        c = Cos(angle) r = Mul(q, c) y = MatMul(r, k)
    }"""
    result = match(model(text))
    assert ops(result.model) == ["Cos", "Cast", "Mul", "Cast", "MatMul"]
    known = types(result.model)
    assert (known["r"], known["y"]) == (FLOAT, HALF)
    feeds = {"q": normal(3, 8, dtype=np.float16), "angle": normal(3, 8), "k": normal(8, 8, dtype=np.float16)}
    (got,) = run_ort(result.model, feeds)
    want = (feeds["q"].astype(np.float32) * np.cos(feeds["angle"])) @ feeds["k"].astype(np.float32)
    assert error(got.astype(np.float32), want) < 2e-3


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("c = Cast<to = 1>(x) y = MatMul(c, w)", ["MatMul"]),
        ("c = Cast<to = 1>(x) d = Cast<to = 10>(c) y = MatMul(d, w)", ["Cast", "MatMul"]),  # to what it is
    ],
)
def test_a_cast_that_loses_nothing_is_skipped(body: str, kept: list[str]) -> None:
    made = model(
        f"g (float16[b,8] x) => (float16[b,4] y) {{ {body} }}", {"w": normal(8, 4, dtype=np.float16)}
    )
    result = match(made)
    used = Pipeline.parse("remove-unused").run(result.model).model
    assert ops(used) == kept
    x = normal(3, 8, dtype=np.float16)
    (got,) = run_ort(used, {"x": x})
    weight = onnx.numpy_helper.to_array(made.graph.initializer[0])
    assert error(got.astype(np.float32), x.astype(np.float32) @ weight.astype(np.float32)) < 2e-3


def test_a_deliberate_float32_matmul_stays() -> None:
    text = """g (float16[b,8] x, float16[8,8] k) => (float16[b,8] y) {
        a = Cast<to = 1>(x) b = Cast<to = 1>(k) m = MatMul(a, b) y = Cast<to = 10>(m)
    }"""
    assert Pipeline([MatchTypes()]).run(model(text)).changed == 0


def test_scales_come_into_the_compute_type_and_block_scales_do_not() -> None:
    text = """g (float16[b,32] x) => (float16[b,8] y) {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        step = DequantizeLinear(w8, s2) wide = DequantizeLinear<axis = -1, block_size = 16>(w4, step)
        t = Transpose<perm = [1, 0]>(wide) c = Cast<to = 10>(t)
        y = MatMul(d, c)
    }"""
    values = {
        "s": np.array(0.01, np.float32),
        "z": np.zeros((), E4M3),
        "s2": np.array(1e-3, np.float32),
        "w8": (1 + RNG.random((8, 2))).astype(E4M3),
        "w4": normal(8, 32, dtype=ml_dtypes.float4_e2m1fn),
    }
    result = match(model(text, values))
    known, nodes = types(result.model), {n.output[0]: n for n in result.model.graph.node}
    assert known[nodes["q"].input[1]] == known[nodes["d"].input[1]] == HALF
    assert known["s2"] == known["step"] == known["wide"] == FLOAT
    x = normal(4, 32, dtype=np.float16)
    (got,) = run_reference(result.model, {"x": x})
    scale = np.float32(np.float16(0.01))
    quantized = np.clip(x.astype(np.float32) / scale, -448, 448).astype(E4M3).astype(np.float32) * scale
    weight = values["w4"].astype(np.float32) * np.repeat(
        values["w8"].astype(np.float32) * np.float32(1e-3), 16, 1
    )
    assert error(got.astype(np.float32), quantized @ weight.T) < 5e-3


def test_a_scale_that_float16_cannot_hold_stays() -> None:
    text = """g (float16[b,8] x) => (float16[b,8] y) {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)
    }"""
    values = {
        "s": np.array(1e-6, np.float32),
        "z": np.zeros((), np.int8),
        "w": normal(8, 8, dtype=np.float16),
    }
    result = match(model(text, values))
    nodes = {n.output[0]: n for n in result.model.graph.node}
    assert nodes["q"].input[1] == nodes["d"].input[1] == "s"
    assert ops(result.model) == ["QuantizeLinear", "DequantizeLinear", "Cast", "MatMul"]


def test_outputs_keep_the_type_that_they_declare() -> None:
    text = "g (float16[b,8] x) => (float[b,4] y) { y = MatMul(x, w) }"
    made = model(text, {"w": normal(8, 4)})
    result = match(made)
    assert ops(result.model) == ["MatMul", "Cast"]
    assert types(result.model)["y"] == FLOAT
    assert "1 outputs cast to the type that they declare" in result.records[0].notes


def test_stale_types_are_not_trusted() -> None:
    text = "g (float16[b,8] x) => (float16[b,8] y) { r = Relu(x) y = Add(r, x) }"
    made = model(text)
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("r", FLOAT, ["b", 8]))
    result = Pipeline([MatchTypes()]).run(made, check=lambda *_: "")
    assert result.changed == 0


def test_pow_and_concat() -> None:
    text = """g (float16[b,8] x, float[b,4] t) => (float[b,12] y) {
        p = Pow(x, two) y = Concat<axis = 1>(p, t)
    }"""
    result = match(model(text, {"two": np.array(2, np.float32)}))
    x, t = normal(3, 8, dtype=np.float16), normal(3, 4)
    (got,) = run_ort(result.model, {"x": x, "t": t})
    assert error(got, np.concatenate([x.astype(np.float32) ** 2, t], 1)) < 1e-3


def test_bodies_are_matched_and_casts_in_them_are_their_own() -> None:
    text = """g (bool c, float16[4] x, float[4] w) => (float[4] y, float[4] z) {
        y = If (c) <
            then_branch = a () => (float[4] t) { t = Add(x, w) },
            else_branch = e () => (float[4] u) { u = Mul(x, w) }
        >
        z = Sub(x, w)
    }"""
    result = match(model(text))
    feeds = {"x": normal(4, dtype=np.float16), "w": normal(4)}
    wide = feeds["x"].astype(np.float32)
    for condition, want in ((True, wide + feeds["w"]), (False, wide * feeds["w"])):
        got, rest = run_ort(result.model, feeds | {"c": np.array(condition)})
        assert error(got, want) < 1e-6
        assert error(rest, wide - feeds["w"]) < 1e-6


@pytest.mark.parametrize(
    ("graph", "want"),
    [
        ("g (bfloat16[b] x) => (bfloat16[b] y) { y = Relu(x) }", TensorProto.BFLOAT16),
        ("g (float[b] x) => (float[b] y) { y = Add(x, h) }", HALF),
        ("g (float[b] x) => (float[b] y) { y = Relu(x) }", FLOAT),
    ],
)
def test_the_compute_type(graph: str, want: int) -> None:
    values = {"h": normal(1, dtype=np.float16)} if "h)" in graph else {}
    assert compute_type(import_graph(model(graph, values))) == want


def test_float32_graphs_stay_as_they_are() -> None:
    text = "g (float[b,8] x) => (float[b,8] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    values = {"s": np.array(0.1, np.float32), "z": np.zeros((), np.int8)}
    assert Pipeline([MatchTypes()]).run(model(text, values)).changed == 0
