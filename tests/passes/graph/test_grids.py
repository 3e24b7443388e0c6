"""Grids: what two quantizers have in common, and which codes come back, against what ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from passes.graph.grids import Grid, grid_of, identity, quantized_type, small_values, survives_round_trip
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import graph_of, made_by, model, pick, run_ort, run_reference

PAIR = """g (float[2,3,4] x) => (float[2,3,4] y) {
    q = QuantizeLinear<ATTRS>(x, s, z)
    y = DequantizeLinear<ATTRS>(q, s, z)
}"""
F32 = int(TensorProto.FLOAT)


def pair(scale: Any, zero: Any, attrs: str = "axis = 1") -> tuple[gs.Node, gs.Node]:
    graph = graph_of(PAIR.replace("ATTRS", attrs), {"s": scale, "z": zero})
    return made_by(graph, "q"), made_by(graph, "y")


def test_a_quantizer_and_its_dequantizer_have_one_grid() -> None:
    q, dq = pair(np.float32(0.5), np.int8(0))
    assert grid_of(q) == grid_of(dq) == Grid(int(TensorProto.INT8), F32, grid_of(q).scale)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("stored", ["array", "recipe"])
def test_one_number_is_one_scale_however_it_is_stored(shape: tuple[int, ...], stored: str) -> None:
    scale = np.full(shape, 0.25, np.float32)
    given = Recipe.of_array(scale) if stored == "recipe" else scale
    zero = np.zeros(shape, np.int8)
    assert grid_of(pair(given, zero)[0]) == grid_of(pair(np.float32(0.25), np.int8(0))[0])
    assert grid_of(pair(given, zero)[0]) != grid_of(pair(np.float32(0.26), np.int8(0))[0])


def test_scales_of_channels_have_an_axis_from_the_front() -> None:
    scale, zero = np.array([0.1, 0.2, 0.3], np.float32), np.zeros(3, np.int8)
    q, dq = pair(scale, zero, "axis = -2")
    assert grid_of(q) == grid_of(dq)
    found = grid_of(q)
    assert found is not None
    assert found.axis == 1
    assert found.on(2).axis == 2
    assert found != grid_of(pair(scale[::-1].copy(), zero, "axis = 1")[0])


def test_without_an_axis_scales_are_of_the_second_one() -> None:
    """As ONNX says of QuantizeLinear and DequantizeLinear."""
    q, dq = pair(np.array([0.1, 0.2, 0.3], np.float32), np.zeros(3, np.int8), "saturate = 1")
    del dq.attrs["saturate"]
    found = grid_of(q)
    assert found is not None
    assert found.axis == 1
    assert found == grid_of(dq)


def test_zero_points_that_are_all_zero_are_none() -> None:
    with_zero, shifted = pair(np.float32(0.5), np.int8(0))[0], pair(np.float32(0.5), np.int8(3))[0]
    graph = graph_of(
        "g (float[4] x) => (int8[4] q) { q = QuantizeLinear<output_dtype = 3>(x, s) }", {"s": np.float32(0.5)}
    )
    assert grid_of(with_zero) == grid_of(made_by(graph, "q"))
    assert grid_of(with_zero) != grid_of(shifted)


def test_what_does_not_fit_has_no_grid() -> None:
    float8 = np.zeros((), ml_dtypes.float8_e4m3fn)
    assert grid_of(pair(np.float32(0.5), float8)[0]) is not None
    assert grid_of(pair(np.float32(0.5), float8, "saturate = 0")[0]) is None
    q, dq = pair(np.float32(0.5), np.int8(0))
    q.outputs[0].dtype = None
    assert grid_of(q) is None
    assert grid_of(dq) is None
    wide = pair(np.float32(0.5), np.int8(0))[1]
    wide.outputs[0].dtype = np.float16  # another type than the scale's
    assert grid_of(wide) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("QuantizeLinear(x, s, z)", TensorProto.INT8),
        ("QuantizeLinear<output_dtype = 17>(x, s)", TensorProto.FLOAT8E4M3FN),
        ("QuantizeLinear(x, s)", TensorProto.UINT8),
    ],
)
def test_the_type_that_a_quantizer_makes(text: str, expected: int) -> None:
    values = {"s": np.float32(0.5)} | ({"z": np.int8(0)} if "z" in text else {})
    kind = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "float8e4m3fn"}.get(expected, "uint8")
    graph = graph_of(f"g (float[4] x) => ({kind}[4] q) {{ q = {text} }}", values)
    assert quantized_type(made_by(graph, "q")) == expected


def test_names_for_values() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    a, b = gs.Constant("a", array), gs.Constant("b", array.copy())
    assert identity(a) == identity(b)
    others = [
        gs.Constant("c", array.T.copy()),
        gs.Constant("d", array.astype(np.float64)),
        gs.Constant("e", array + 1),
    ]
    assert len({identity(t) for t in (a, *others)}) == 4
    x, y = gs.Variable("x"), gs.Variable("x")
    assert identity(x) == identity(x) != identity(y)
    assert small_values(x) is None
    held = small_values(a)
    assert held is not None
    assert np.array_equal(held, array)


CODES: dict[str, Any] = {
    "int8": np.arange(-128, 128).astype(np.int8),
    "uint8": np.arange(256).astype(np.uint8),
    "float8e4m3fn": np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("seed", range(12))
def test_codes_that_survive_come_back_from_the_runtime(kind: str, seed: int) -> None:
    """Scales from those that lose nothing to those near the ends of float32, where codes run into each other."""
    rng = np.random.default_rng(seed)
    codes = CODES[kind]
    codes = codes[np.isfinite(codes.astype(np.float32))]
    scale = np.float32(rng.uniform(1, 2) * 10.0 ** pick(rng, -44, -41, -38, -20, -3, 0, 20, 36, 37))
    zero = np.zeros((), codes.dtype) if kind != "uint8" else np.uint8(rng.integers(256))
    values_type = f"{kind}[{codes.size}]"
    nodes = "x = DequantizeLinear(c, s, z) q = QuantizeLinear(x, s, z)"
    text = f"g ({values_type} c) => ({values_type} q) {{ {nodes} }}"
    values = {"s": scale, "z": zero}
    run = run_reference if kind == "float8e4m3fn" else run_ort  # ONNX Runtime's Python takes no 8-bit floats
    (back,) = run(model(text, values), {"c": codes})
    same = np.array_equal(back.view(np.uint8), codes.view(np.uint8))
    claimed = survives_round_trip(made_by(graph_of(text, values), "x"))
    assert not claimed or same, (kind, scale, zero)
    if 1e-30 < scale < 1e30:
        assert claimed, (kind, scale, zero)


def test_codes_that_run_into_each_other_do_not_survive() -> None:
    tiny = np.float32(1e-45)  # the smallest number of float32: half of it is nothing
    text = "g (float8e4m3fn[8] c) => (float[8] x) { x = DequantizeLinear(c, s, z) }"
    graph = graph_of(text, {"s": tiny, "z": np.zeros((), CODES["float8e4m3fn"].dtype)})
    assert not survives_round_trip(made_by(graph, "x"))
    computed = graph_of("g (int8[8] c, float s) => (float[8] x) { x = DequantizeLinear(c, s) }")
    assert not survives_round_trip(made_by(computed, "x"))
