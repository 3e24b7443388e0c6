"""The ONNX Runtime session: real models, every element type of a feed or a result, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.errors import DiffcError

value = helper.make_tensor_value_info


def make(nodes, inputs, outputs, weights=()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def quantized(kind: int, layers: int = 3, size: int = 64, seed: int = 0) -> onnx.ModelProto:
    """Float32 layers with per-channel quantized weights and per-tensor quantized inputs: fp8 and int8."""
    rng = np.random.default_rng(seed)
    nodes, weights, x = [], [], "x"
    for i in range(layers):
        w = rng.standard_normal((size, size)).astype(np.float32) / 8
        top = 127 if kind == TensorProto.INT8 else 448
        scale = np.abs(w).max(0) / top
        q = np.rint(w / scale).astype(np.int8) if kind == TensorProto.INT8 else w / scale
        q = q.astype(helper.tensor_dtype_to_np_dtype(kind))
        act = np.float32(4 / top)
        arrays = {f"w{i}": q, f"ws{i}": scale.astype(np.float32), f"xs{i}": np.array(act)}
        weights += [numpy_helper.from_array(a, name) for name, a in arrays.items()]
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{i}", f"ws{i}"], [f"wd{i}"], axis=1),
            helper.make_node("QuantizeLinear", [x, f"xs{i}"], [f"q{i}"], output_dtype=kind),
            helper.make_node("DequantizeLinear", [f"q{i}", f"xs{i}"], [f"d{i}"]),
            helper.make_node("MatMul", [f"d{i}", f"wd{i}"], [f"m{i}"]),
            helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]),
        ]
        x = f"t{i}"
    ends = (value("x", TensorProto.FLOAT, ["b", size]), value(x, TensorProto.FLOAT, ["b", size]))
    return make(nodes, [ends[0]], [ends[1]], weights)


def emulate(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The same network in numpy, from the definitions of the operators."""
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for i in range(len(model.graph.node) // 5):
        scale = weights[f"xs{i}"]
        kind = weights[f"w{i}"].dtype
        ratio = x / scale
        q = np.rint(ratio).clip(-128, 127) if kind == np.int8 else ratio.clip(-448, 448).astype(kind)
        w = weights[f"w{i}"].astype(np.float32) * weights[f"ws{i}"]
        x = np.tanh((q.astype(np.float32) * scale) @ w)
    return x


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.INT8])
@pytest.mark.parametrize("seed", [1, 2])
def test_quantized_graphs_run_with_float32_scales(kind, seed):
    model = quantized(kind, seed=seed)
    for batch in (1, 5):
        x = np.random.default_rng(seed + batch).standard_normal((batch, 64)).astype(np.float32)
        with OrtSession(model.SerializeToString()) as session:
            (result,) = session.run({"x": x}).values()
        expected = emulate(model, x)
        assert result.shape == (batch, 64)
        assert np.linalg.norm(result - expected) / np.linalg.norm(expected) < 1e-4


def test_the_fp8_option_is_still_needed():
    """When ONNX Runtime's default optimizer takes float8, `session.disable_quant_qdq` can go."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    data = quantized(TensorProto.FLOAT8E4M3FN).SerializeToString()
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        ort.InferenceSession(data, sess_options=options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int64]
)
def test_types_go_in_and_come_out_unchanged(dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
    ]
    dims = ["a", 3, "c"]
    outputs = [value("same", kind, dims), value("wide", TensorProto.FLOAT, dims)]
    x = (np.random.default_rng(7).standard_normal((2, 3, 4)) * 9).astype(dtype)
    with OrtSession(make(nodes, [value("x", kind, dims)], outputs).SerializeToString()) as session:
        result = session.run({"x": x.transpose(2, 1, 0)})  # not contiguous
    assert result["same"].dtype == np.dtype(dtype)
    assert np.array_equal(
        result["same"].view(np.uint8), np.ascontiguousarray(x.transpose(2, 1, 0)).view(np.uint8)
    )
    assert np.array_equal(result["wide"], x.transpose(2, 1, 0).astype(np.float32))
    result["same"][:] = x[0, 0, 0]  # it is the caller's own memory


def test_a_model_file_with_its_weights_beside_it(tmp_path: Path):
    model = quantized(TensorProto.INT8)
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    expected = emulate(model, x)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.onnx_data", size_threshold=0)
    with OrtSession(path) as session:
        assert [(i.name, i.dims) for i in session.inputs] == [("x", (None, 64))]
        np.testing.assert_allclose(session.run({"x": x})["t2"], expected, atol=1e-4)
    with pytest.raises(DiffcError, match="is closed"):
        session.run({"x": x})
    data = tmp_path / "m.onnx_data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(DiffcError, match=r"m.onnx_data is cut off"):
        OrtSession(path)
    data.unlink()
    with pytest.raises(DiffcError, match=r"m.onnx_data is missing"):
        OrtSession(path)


@pytest.fixture(scope="module")
def session() -> OrtSession:
    nodes = [helper.make_node("Mul", ["x", "s"], ["y"])]
    inputs = [value("x", TensorProto.FLOAT16, ["b", 4]), value("s", TensorProto.FLOAT16, [])]
    return OrtSession(make(nodes, inputs, [value("y", TensorProto.FLOAT16, ["b", 4])]).SerializeToString())


X, S = np.ones((2, 4), np.float16) * np.float16(3), np.array(0.5, np.float16)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"x": X}, "no value for input s. Inputs: x, s"),
        ({"x": X, "s": S, "z": S}, "unknown input 'z'. Known: x, s"),
        ({"x": X.astype(np.float32), "s": S}, "input x: float32 was given, float16 is needed"),
        ({"x": X[0], "s": S}, r"input x: shape \[4\] was given, \['any', 4\] is needed"),
        ({"x": X[:, :3], "s": S}, r"input x: shape \[2, 3\] was given"),
        ({"x": X, "s": S.reshape(1)}, r"input s: shape \[1\] was given, \[\] is needed"),
    ],
)
def test_a_feed_that_does_not_fit_is_refused(session, feed, message):
    with pytest.raises(DiffcError, match=message):
        session.run(feed)


def test_a_scalar_stays_a_scalar(session):
    assert np.array_equal(session.run({"x": X, "s": S})["y"], X / 2)


def test_the_provider_that_is_asked_for_or_none():
    data = quantized(TensorProto.INT8).SerializeToString()
    with pytest.raises(DiffcError, match=r"unknown ONNX Runtime provider 'NoSuch'.*CPUExecutionProvider"):
        OrtSession(data, providers=["NoSuch"])


def test_a_model_that_onnx_runtime_rejects_and_one_that_fails_in_the_run():
    bad = make([helper.make_node("NoSuchOp", ["x"], ["y"])], *[[value(n, 1, [2])] for n in "xy"])
    with pytest.raises(DiffcError, match=r"rejects the model.*NoSuchOp"):
        OrtSession(bad.SerializeToString())
    dims = [[value("x", 1, ["a"])], [value("y", 1, [2, "c"])]]
    shape = numpy_helper.from_array(np.array([2, -1]), "shape")
    odd = make([helper.make_node("Reshape", ["x", "shape"], ["y"])], *dims, [shape])
    with OrtSession(odd.SerializeToString()) as session:
        assert session.run({"x": np.arange(6, dtype=np.float32)})["y"].shape == (2, 3)
        with pytest.raises(DiffcError, match="failed to run"):
            session.run({"x": np.arange(5, dtype=np.float32)})


def test_a_file_that_is_no_model(tmp_path: Path):
    path = tmp_path / "m.onnx"
    with pytest.raises(DiffcError, match="no such file"):
        OrtSession(path)
    path.write_bytes(quantized(TensorProto.INT8).SerializeToString()[:5000])
    with pytest.raises(DiffcError, match=r"not an ONNX model"):
        OrtSession(path)


@pytest.mark.parametrize("case", ["sizes that do not fit", "an operator that is not known"])
def test_what_onnx_runtime_says_of_an_error_is_in_ours_alone(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own lines on standard error would stand between ours, and say the same."""
    node = helper.make_node("Add" if case.startswith("sizes") else "Nope", ["x", "z"], ["y"], "sum")
    ends = [value(name, TensorProto.FLOAT, [name]) for name in "xz"]
    onnx.save(make([node], ends, [value("y", TensorProto.FLOAT, None)]), tmp_path / "m.onnx")
    feed = {"x": np.ones(3, np.float32), "z": np.ones(4, np.float32)}
    with pytest.raises(DiffcError, match="ONNX Runtime"), OrtSession(tmp_path / "m.onnx") as session:
        session.run(feed)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
