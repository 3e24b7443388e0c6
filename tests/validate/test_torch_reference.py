"""The weights that a compile stores are those that the torch reference computes with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from diffc.models.sources.backbone import DTYPES, load_backbone
from diffc.quantize.convert import layer_of, role_of
from diffc.quantize.simulate import cpu_block_quant
from tests.conftest import Cells


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("tiny-sdxl", "fp8"),
        ("tiny-flux", "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("tiny-sd35", "fp8"), ("tiny-flux", "fp8"), ("tiny-sdxl", "int8"))
        ),
    ],
)
def test_stored_weights_are_those_of_modelopt_bit_for_bit(name: str, format: str, compiled: Cells) -> None:
    """Each stored code is the one that ModelOpt chose; code x scale is its fake-quantized weight to the last bits."""
    cell = compiled(name, format)
    assert cell.checkpoint is not None
    backbone = load_backbone(cell.plan.source, DTYPES[cell.plan.dtype])
    cell.checkpoint.apply(backbone, cell.plan.source.family.name)
    backbone.float()
    model = cell.model
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    dequantize = {n.input[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    users = {i: n for n in model.graph.node for i in n.input}
    layers = [n.removesuffix(".weight_quantizer") for n in cell.checkpoint.settings if "weight_q" in n]
    assert len(layers) > 30
    for path in layers:
        layer: Any = backbone.get_submodule(path)
        node = dequantize[f"{path}.weight_q"]
        with torch.no_grad():
            expected = layer.weight_quantizer(layer.weight).numpy()
        codes, scale = tensors[node.input[0]], tensors[node.input[1]].astype(np.float32)
        if users[node.output[0]].op_type == "MatMul":  # stored [in, out]
            expected = expected.T
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale.size > 1:
            scale = scale.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])
        values = codes.astype(np.float32) * scale
        # ModelOpt divides by its factor, which is 1 / scale rounded (FP8: rounded twice).
        np.testing.assert_array_max_ulp(values, expected, maxulp=1 if format == "int8" else 2)
        chosen = expected / scale
        step = 1.0 if format == "int8" else np.maximum(np.abs(chosen) * 2.0**-4, 2.0**-9)
        assert (np.abs(codes.astype(np.float32) - chosen) < 1e-3 * step).all(), path
        assert len(np.unique(codes)) > 100, path


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("tiny-sd3", "int4_awq"),
        ("tiny-sd3", "nvfp4"),
        pytest.param("tiny-sd3", "mxfp8", marks=pytest.mark.slow),
        pytest.param("tiny-flux", "nvfp4_svdquant", marks=pytest.mark.slow),
    ],
)
def test_stored_blocks_are_those_of_modelopt(name: str, format: str, compiled: Cells) -> None:
    """Values times scales of blocks are the weight that ModelOpt simulates, from the same scaled weight."""
    cell = compiled(name, format)
    assert cell.checkpoint is not None
    backbone = load_backbone(cell.plan.source, DTYPES[cell.plan.dtype])
    cell.checkpoint.apply(backbone, cell.plan.source.family.name)
    backbone.float()
    tensors = {t.name: numpy_helper.to_array(t) for t in cell.model.graph.initializer}
    nodes = {n.input[0]: n for n in cell.model.graph.node if "DequantizeLinear" in n.op_type}
    layers = {layer_of(n) for n in cell.checkpoint.settings if role_of(n) == "weight_quantizer"}
    assert len(layers) > 15
    for path in sorted(layers):
        layer: Any = backbone.get_submodule(path)
        with torch.no_grad(), cpu_block_quant():
            expected = layer.weight_quantizer(layer.weight).numpy()
        stored = tensors[f"{path}.weight_q"].astype(np.float32)
        if format == "int4_awq":
            node = nodes[f"{path}.weight_q"]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            scale = tensors[node.input[1]].astype(np.float32)
            values = stored * np.repeat(scale, 128, axis=axis)
            values = values if values.shape == expected.shape and axis == 1 else values.T
            np.testing.assert_array_max_ulp(values, expected, maxulp=2)
            continue
        scales = tensors[f"{path}.weight_scale"]
        if format == "mxfp8":
            steps = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        else:
            steps = scales.astype(np.float32) * tensors[nodes[f"{path}.weight_scale"].input[1]]
        values = stored * np.repeat(steps, expected.shape[-1] // steps.shape[-1], axis=-1)
        assert np.array_equal(values, expected), path
