"""fold-scale-cast: a DequantizeLinear of a stored weight gives the 16-bit type itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from diffc.backends.tensorrt.build import EngineRequest, build_engine
from passes.storage import save
from passes.targets.tensorrt.fold_scale_cast import FoldScaleCast
from passes.weights.recipe import Recipe
from tests.networks import profile
from tests.passes.graph_helpers import apply, model, ops

RNG = np.random.default_rng(3)
SCALE = np.array(0.1, np.float32)


def weight(dtype: Any = ml_dtypes.float8_e4m3fn) -> Recipe:
    return Recipe.of_array(RNG.normal(size=(8, 4)).astype(dtype))


def graph(body: str, scale: Any = None, dtype: Any = ml_dtypes.float8_e4m3fn) -> onnx.ModelProto:
    return model(
        f"g (bfloat16[b,8] x) => (bfloat16[b,4] y) {{ {body} }}",
        {"w": weight(dtype), "s": SCALE if scale is None else scale},
    )


PLAIN = "d = DequantizeLinear(w, s)  c = Cast<to = 16>(d)  y = MatMul(x, c)"


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8])
def test_the_cast_goes_and_the_scale_stays(dtype: Any) -> None:
    result = apply(graph(PLAIN, dtype=dtype), FoldScaleCast())
    assert ops(result.model) == ["DequantizeLinear", "MatMul"]
    (attribute,) = result.model.graph.node[0].attribute
    assert (attribute.name, attribute.i) == ("output_dtype", TensorProto.BFLOAT16)
    assert {t.name: t.data_type for t in result.model.graph.initializer}["s"] == TensorProto.FLOAT


@pytest.mark.parametrize(
    ("body", "scale", "why"),
    [
        (
            f"{PLAIN.replace('y =', 'z =')}  e = Cast<to = 16>(d)  f = MatMul(x, e)  y = Add(z, f)",
            0.1,
            "another reader",
        ),
        (
            "d = DequantizeLinear<axis = 0, block_size = 4>(w, s)  c = Cast<to = 16>(d)  y = MatMul(x, c)",
            np.ones((2, 4)),
            "of blocks",
        ),
    ],
)
def test_it_declines_with_the_reason(body: str, scale: Any, why: str) -> None:
    before = graph(body, np.asarray(scale, np.float32))
    result = apply(before, FoldScaleCast())
    assert len(result.model.graph.node) == len(before.graph.node)
    assert why in result.records[0].refusals[0].reason


def test_other_casts_are_left_alone() -> None:
    before = graph(
        "c = Cast<to = 16>(s)  m = Mul(x, c)  d = DequantizeLinear(w, s)  e = Cast<to = 16>(d)  y = MatMul(m, e)"
    )
    result = apply(before, FoldScaleCast())
    assert ops(result.model) == ["Cast", "Mul", "DequantizeLinear", "MatMul"]


QUANTIZED = """q = QuantizeLinear<output_dtype = 17>(x, t)  e = DequantizeLinear(q, t)
    d = DequantizeLinear(w, s)  c = Cast<to = 16>(d)  y = MatMul(e, c)"""


def test_inputs_get_scales_of_the_same_type() -> None:
    values = {"w": weight(), "s": SCALE, "t": np.array(0.02, ml_dtypes.bfloat16)}
    result = apply(
        model(f"g (bfloat16[b,8] x) => (bfloat16[b,4] y) {{ {QUANTIZED} }}", values), FoldScaleCast()
    )
    assert ops(result.model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    types = {t.name: t.data_type for t in result.model.graph.initializer}
    scales = {types[node.input[1]] for node in result.model.graph.node if "Linear" in node.op_type}
    assert scales == {TensorProto.FLOAT}
    made = {a.name: a.i for a in result.model.graph.node[1].attribute}
    assert made["output_dtype"] == TensorProto.BFLOAT16


def test_the_builder_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    codes = (RNG.normal(size=(64, 64))).astype(ml_dtypes.float8_e4m3fn)
    values = {"w": Recipe.of_array(codes), "s": SCALE, "t": np.array(0.02, ml_dtypes.bfloat16)}
    made = apply(
        model(f"g (bfloat16[b,64] x) => (bfloat16[b,64] y) {{ {QUANTIZED} }}", values), FoldScaleCast()
    )
    save(made.model, tmp_path / "m.onnx")
    request = EngineRequest("trt-rtx", tmp_path / "m.onnx", tmp_path / "m.engine", (89,), (profile(64),))
    assert build_engine(request).nbytes > 64 * 64
