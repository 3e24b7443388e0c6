"""Small networks with seeded weights, and the requests that build them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffc.backends.profile import Profile
from diffc.backends.target import EngineOptions
from diffc.backends.tensorrt.build import EngineReport, EngineRequest, build_engine

value = helper.make_tensor_value_info
FP16, FP32, FP8, INT8 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN, TensorProto.INT8


def make(nodes, inputs, outputs, weights=()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def network(kind: int = FP16, size: int = 256, seed: int = 0, dtype: int = FP16) -> onnx.ModelProto:
    """Two linear layers of size x size. `kind` is the type of their weights, quantized when it is 8-bit."""
    rng = np.random.default_rng(seed)
    np_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    nodes, weights, x = [], [], "x"
    for i in range(2):
        w = rng.standard_normal((size, size))
        w_name = f"w{i}"
        if kind in (FP8, INT8):
            scale = np.abs(w).max() / (448 if kind == FP8 else 127)
            q = (
                (w / scale).astype(helper.tensor_dtype_to_np_dtype(kind))
                if kind == FP8
                else np.rint(w / scale)
            )
            w = q.astype(np.int8) if kind == INT8 else q
            weights += [numpy_helper.from_array(np.array(scale, np_dtype), f"s{i}")]
            pair = (f"linear{i}/input_quantizer", f"linear{i}/weight_quantizer")
            nodes += [
                helper.make_node("QuantizeLinear", [x, f"s{i}"], [f"q{i}"], pair[0], output_dtype=kind),
                helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}"], [f"d{i}"], pair[0] + "_dq"),
                helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"wd{i}"], pair[1]),
            ]
            x, w_name = f"d{i}", f"wd{i}"
        else:
            w = w.astype(np_dtype)
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [x, w_name], [f"m{i}"], f"linear{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}"], f"act{i}"))
        x = f"r{i}"
    return make(nodes, [value("x", dtype, ["b", size])], [value(x, dtype, ["b", size])], weights)


def profile(size: int = 256, name: str = "x", low: int = 1, high: int = 4) -> Profile:
    return Profile.of_shapes({name: (low, size)}, {name: (2, size)}, {name: (high, size)})


def request(folder: Path, model: onnx.ModelProto, sms=(89,), profiles=None, **options) -> EngineRequest:
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=1024)
    profiles = (profile(),) if profiles is None else profiles
    return EngineRequest("trt-rtx", path, folder / "m.engine", tuple(sms), profiles, EngineOptions(**options))


def build(folder: Path, model: onnx.ModelProto, sms=(89,), **options) -> EngineReport:
    folder.mkdir(exist_ok=True)
    return build_engine(request(folder, model, sms, **options))


def left_behind(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"model.onnx", "model.onnx_data"}


def mixed_types() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], "block.0/cast", to=FP32),
        helper.make_node("Add", ["x", "c"], ["y"], "block.0/add"),
    ]
    return make(nodes, [value("x", FP16, ["b", 64])], [value("y", FP32, ["b", 64])])


def attention(same: bool, dtype: int) -> onnx.ModelProto:
    names = ["x"] * 3 if same else ["x", "k", "v"]
    inputs = [value(n, dtype, [2, 2, 16, 64]) for n in dict.fromkeys(names)]
    return make(
        [helper.make_node("Attention", names, ["y"], "attn")], inputs, [value("y", dtype, [2, 2, 16, 64])]
    )


def rel_l2(got: Any, want: Any) -> float:
    """Norm of the difference, relative to that of `want`."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
