"""What the report reads of layers: formats of weights and inputs, shapes as torch has them, and ranges of scales."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.report.layers import Layer, Side, layers_of
from tests.report.made import PATH, quantized_model


def read(model: onnx.ModelProto, folder: Path) -> list[Layer]:
    onnx.save(model, folder / "model.onnx")
    return layers_of(folder / "model.onnx")


def test_an_fp8_layer_has_the_scales_of_both_sides(tmp_path: Path) -> None:
    (layer,) = read(quantized_model(scale=0.125), tmp_path)
    assert layer == Layer(PATH, "MatMul", (8, 4), Side("FP8", 0.125, 0.125), Side("FP8", 0.25, 0.25))
    assert layer.block == "blocks.0"
    assert layer.format == "FP8"


def test_scales_of_blocks_are_times_the_scale_that_they_have_themselves(tmp_path: Path) -> None:
    fp4 = TensorProto.FLOAT4E2M1
    scales = np.array([[0.5, 2.0], [1.0, 4.0]], ml_dtypes.float8_e4m3fn)
    constants = [
        helper.make_tensor("w.weight", fp4, [2, 32], bytes(32), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT8E4M3FN, [2, 2], scales.tobytes(), raw=True),
        numpy_helper.from_array(np.float32(0.25), "outer"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["s", "outer"], ["sf"], "w/DequantizeLinear"),
        helper.make_node(
            "DequantizeLinear", ["w.weight", "sf"], ["d"], "w/DequantizeLinear_1", axis=-1, block_size=16
        ),
        helper.make_node("Transpose", ["d"], ["t"], "w/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], "w/MatMul"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("x", 32), ("y", 2)))
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    (layer,) = read(model, tmp_path)
    assert layer.weight == Side("FP4, blocks of 16", 0.125, 1.0)
    assert layer.input == Side("float32")
    assert layer.format == "FP4, blocks of 16 x float32"


@pytest.mark.parametrize(
    ("path", "block"), [("a.0.b.1.c", "a.0"), ("proj_out", "proj_out"), ("mid.x", "mid")]
)
def test_a_block_ends_at_the_first_number(path: str, block: str) -> None:
    assert Layer(path, "MatMul", (), Side("float32"), Side("float32")).block == block
