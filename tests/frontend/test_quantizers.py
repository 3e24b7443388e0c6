"""Quantizers on their way to the graph: the operators are ModelOpt's, the nodes are those of the canonical form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from onnx import TensorProto, numpy_helper
from torch import nn

from diffc.frontend.quantizers import (
    TracedQuantizer,
    describe,
    quantize_dequantize,
    traceable,
)
from diffc.frontend.translations import translations
from diffc.quantize.convert import enabled_quantizers, insert_quantizers, role_of
from diffc.quantize.formats import FORMATS, FP8, INT4_BLOCK, INT8, INT8_CHANNEL, MXFP8, NVFP4
from diffc.quantize.kinds import kind_of
from diffc.quantize.simulate import cpu_block_quant
from diffc.quantize.state import settings_of, usable_amax
from diffc.validate.float32 import cpu_session
from passes.base import Pass
from passes.canonical.fold_constants import FoldConstants
from passes.canonical.fold_weight_qdq import FoldWeightQdq
from passes.canonical.remove_unused import RemoveUnused
from passes.graph.trt_ops import DOMAIN as TRT
from passes.pipeline import Pipeline
from passes.storage import materialize
from passes.weights.recipe import Recipe

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = [name for name in FORMATS if name not in ("none", "int8_smoothquant", "nvfp4_svdquant")]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator)).to(dtype)


@pytest.mark.parametrize(
    "attributes", [INT8, INT8_CHANNEL, FP8, INT4_BLOCK, NVFP4, MXFP8], ids=lambda a: str(a["num_bits"])
)
@dtypes
def test_the_operator_is_modelopts_quantizer(attributes: Any, dtype: torch.dtype) -> None:
    """To the last bits; but 16-bit values often lie half way between two steps, and either is as near."""
    x = random(48, 256, seed=6, dtype=dtype)
    quantizer: Any = TensorQuantizer(QuantizerAttributeConfig(**attributes))
    settings = settings_of(quantizer.get_modelopt_state())
    kind = kind_of(settings)
    amax = x.abs().amax(1, keepdim=True) if attributes is INT8_CHANNEL else x.abs().amax()
    if kind.blocks == "static":
        amax = x.abs().reshape(48, 2, 128).amax(-1).reshape(-1, 1)
    if kind.has_amax:
        amax = usable_amax("q", amax.float() * 0.7, kind)  # some values saturate
        quantizer.amax = amax
    traced = describe(settings, amax.numel() if kind.has_amax else 0, tuple(x.shape))
    scale = (amax / kind.bound).reshape(traced.shape or ()) if kind.has_amax else torch.ones(())
    if not kind.portable:
        scale = amax * (1.0 / kind.bound)  # as ModelOpt's kernel has it, and the recipe of the graph
    with cpu_block_quant():
        theirs = quantizer(x)
    ours = traced(x, scale)
    assert (ours.dtype, ours.shape) == (dtype, x.shape)
    if kind.dynamic:
        assert torch.equal(ours, theirs)
    else:
        assert_equal_but_for_ties(x, ours, theirs)
    assert 0.005 < float((ours - x).float().norm() / x.float().norm()) < 0.6
    assert len(ours.unique()) < 0.9 * ours.numel()


def assert_equal_but_for_ties(x: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """ModelOpt multiplies by a factor that was rounded, the operator divides: ties may fall to either side."""
    step = 1e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    wide, a, b = (t.double() for t in (x, ours, theirs))
    differ = (a - b).abs() > step * b.abs()
    assert float(differ.double().mean()) < (1e-3 if x.dtype == torch.float32 else 0.05)
    further = ((wide - a).abs() - (wide - b).abs()).abs()
    assert (further[differ] <= 2 * step * wide.abs()[differ]).all()


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_pass_through_the_operators(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, scale = torch.empty(3, 256, dtype=torch.float16), torch.empty(())
        out = quantize_dequantize(x, scale, "fp8", None, 0)
        blocks = quantize_dequantize(x, scale, "nvfp4", None, 16)
    assert out.shape == blocks.shape == (3, 256)
    assert out.dtype == blocks.dtype == torch.float16
    assert name in FORMATS


class Layer(nn.Module):
    """One quantized linear layer on a tensor of three axes, as in a transformer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 64)
        with torch.no_grad():
            self.linear.weight.copy_(random(64, 256, seed=3) / 16)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


@dataclass
class Made:
    """A quantized layer, its quantizers, and its graph as it was traced, real weights and scales in it."""

    layer: Any
    traced: dict[str, TracedQuantizer]
    model: onnx.ModelProto

    def nodes(self, model: onnx.ModelProto | None = None) -> list[onnx.NodeProto]:
        return [n for n in (model or self.model).graph.node if n.op_type != "Constant"]


def calibrated(name: str, dtype: torch.dtype) -> Any:
    """The layer with the quantizers of a format, calibrated by what `x()` sends through."""
    layer = Layer(dtype)
    insert_quantizers(layer, FORMATS[name], "$^")
    quantities = {"input_quantizer": x(dtype), "weight_quantizer": layer.linear.weight}
    for path, quantizer in enabled_quantizers(layer).items():
        kind, value = kind_of(settings_of(quantizer.get_modelopt_state())), quantities[role_of(path)].detach()
        amax = value.float().abs().amax()
        if quantizer.axis == 0:
            amax = value.float().abs().amax(1, keepdim=True)
        if kind.blocks == "static":
            amax = value.float().abs().reshape(64, 2, 128).amax(-1).reshape(-1, 1)
        if kind.has_amax:
            quantizer.amax = usable_amax(path, amax, kind)
    return layer


def x(dtype: torch.dtype) -> torch.Tensor:
    return random(2, 5, 256, seed=4, dtype=dtype)


def trace(name: str, dtype: torch.dtype) -> Made:
    """A layer with calibrated quantizers, and its graph, which the caller may change."""
    made = traced_once(name, dtype)
    return replace(made, model=onnx.ModelProto.FromString(made.model.SerializeToString()))


@cache
def traced_once(name: str, dtype: torch.dtype) -> Made:
    layer = calibrated(name, dtype)
    quantizers = enabled_quantizers(layer)
    amax = {path: getattr(q, "_amax", None) for path, q in quantizers.items()}
    traced = {}
    for path, q in quantizers.items():
        weight = tuple(layer.linear.weight.shape) if role_of(path) == "weight_quantizer" else None
        held = amax[path]
        traced[path] = describe(
            settings_of(q.get_modelopt_state()), 0 if held is None else held.numel(), weight
        )
    shapes = ({0: torch.export.Dim("b", min=1, max=9), 1: torch.export.Dim("n", min=1, max=99)},)
    with traceable(quantizers, traced), torch.no_grad():
        program = torch.onnx.export(
            torch.export.export(layer, (x(dtype),), dynamic_shapes=shapes, strict=False),
            dynamo=True,
            opset_version=23,
            optimize=False,
            verbose=False,
            custom_translation_table=translations(),
        )
    if any(q.kind.dynamic for q in traced.values()):
        program.model.opset_imports[TRT] = 1
    model = program.model_proto
    model.ir_version = 11
    for tensor in model.graph.initializer:
        path, _, leaf = tensor.name.rpartition(".")
        if leaf == "scale" and amax.get(path) is not None:
            scale = (amax[path].float() / traced[path].kind.bound).reshape(traced[path].shape or ()).numpy()
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(scale).astype(kind), tensor.name))
    return Made(layer, traced, model)


def canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    steps: tuple[Pass, ...] = (FoldConstants(), FoldWeightQdq(), RemoveUnused())
    return Pipeline(steps).run(model, check=lambda before, after, step: "").model


def types_of(model: onnx.ModelProto) -> dict[str, tuple[int, list[Any]]]:
    """Element type and shape of every value that the graph says them of; `...` is a symbol."""
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    found = {v.name: v.type.tensor_type for v in values}
    known = {
        n: (t.elem_type, [... if d.dim_param else d.dim_value for d in t.shape.dim]) for n, t in found.items()
    }
    return known | {t.name: (t.data_type, list(t.dims)) for t in model.graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Without those of quantizers that have their default."""
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: value for name, value in found.items() if node.domain or DEFAULTS.get(name) != value}


DEFAULTS = {"axis": 1, "block_size": 0, "output_dtype": 0, "precision": 0, "saturate": 1}


@pytest.mark.parametrize("name", ["int8", "fp8"])
@dtypes
def test_standard_pairs(name: str, dtype: torch.dtype) -> None:
    """A zero point of the quantized type; scales in the compute type, of a weight per channel (INT8) or tensor."""
    made = trace(name, dtype)
    model = canonical(made.model)
    types = types_of(model)
    assert Counter(n.op_type for n in made.nodes(model))["QuantizeLinear"] == 1
    stored = TensorProto.INT8 if name == "int8" else TensorProto.FLOAT8E4M3FN
    for node in (n for n in made.nodes(model) if n.op_type.endswith("quantizeLinear")):
        assert node.domain == ""
        weight = "weight" in node.input[0]
        channels = [64] if weight and name == "int8" else []
        assert types[node.input[1]] == (DTYPES[dtype], channels)
        assert types[node.input[2]] == (stored, channels)
        assert attributes(node) == ({"axis": 0} if channels else {})
    (weights,) = (t for t in model.graph.initializer if t.name == "linear.weight_q")
    assert (weights.data_type, list(weights.dims)) == (stored, [64, 256])


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq"])
@dtypes
def test_blocks_of_int4(name: str, dtype: torch.dtype) -> None:
    """constant INT4 -> DequantizeLinear in blocks of 128 (-> FP8 pair for W4A8)."""
    made = trace(name, dtype)
    model = canonical(made.model)
    types = types_of(model)
    nodes = {n.name: n for n in made.nodes(model)}
    (blocks,) = (
        n for n in nodes.values() if n.op_type == "DequantizeLinear" and "block_size" in attributes(n)
    )
    assert attributes(blocks) == {"block_size": 128}  # along axis 1, the default
    assert types["linear.weight_q"] == (TensorProto.INT4, [64, 256])
    assert blocks.input[0] == "linear.weight_q"
    assert len(blocks.input) == 2
    assert types[blocks.input[1]] == (DTYPES[dtype], [64, 2])
    quantize = [n for n in nodes.values() if n.op_type == "QuantizeLinear"]
    assert len(quantize) == (2 if name == "w4a8_awq" else 0)
    if quantize:
        (second,) = (n for n in quantize if n.input[0] == blocks.output[0])
        assert types[second.input[1]] == (DTYPES[dtype], [])
        assert types[second.input[2]] == (TensorProto.FLOAT8E4M3FN, [])


@dtypes
def test_nvfp4(dtype: torch.dtype) -> None:
    """The dynamic quantizer, the block scale in float32, the values, and a cast where the type is another."""
    made = trace("nvfp4", dtype)
    model = canonical(made.model)
    types, nodes = types_of(model), made.nodes(model)
    (dynamic,) = (n for n in nodes if n.domain == "trt")
    assert dynamic.op_type == "TRT_FP4DynamicQuantize"
    assert attributes(dynamic) == {"axis": -1, "block_size": 16, "scale_type": 17}
    assert dynamic.input[0] == model.graph.input[0].name
    assert types[dynamic.input[1]] == (TensorProto.FLOAT, [])
    assert types[dynamic.output[0]] == (TensorProto.FLOAT4E2M1, [..., ..., 256])
    assert types[dynamic.output[1]] == (TensorProto.FLOAT8E4M3FN, [..., ..., 16])
    chains = {tuple(dynamic.output[:2]), ("linear.weight_q", "linear.weight_scale")}
    for values, scales in chains:
        (scale,) = (n for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] == scales)
        (value,) = (n for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] == values)
        assert types[scale.input[1]] == (TensorProto.FLOAT, [])
        assert value.input[1] == scale.output[0]
        assert attributes(value) == {"axis": -1, "block_size": 16}
        after = [n.op_type for n in nodes if value.output[0] in n.input]
        assert ("Cast" in after) == (dtype != torch.float32)
    assert types["linear.weight_q"] == (TensorProto.FLOAT4E2M1, [64, 256])
    assert types["linear.weight_scale"] == (TensorProto.FLOAT8E4M3FN, [64, 16])


@dtypes
def test_mxfp8(dtype: torch.dtype) -> None:
    made = trace("mxfp8", dtype)
    model = canonical(made.model)
    types, nodes = types_of(model), made.nodes(model)
    (dynamic,) = (n for n in nodes if n.op_type == "TRT_MXFP8DynamicQuantize")
    assert attributes(dynamic) == {"axis": -1, "block_size": 32, "output_dtype": 17}
    assert types[dynamic.output[0]] == (TensorProto.FLOAT8E4M3FN, [..., ..., 256])
    assert types[dynamic.output[1]] == (TensorProto.UINT8, [..., ..., 8])
    back = {tuple(n.input): n for n in nodes if n.op_type == "TRT_MXFP8DequantizeLinear"}
    assert back.keys() == {tuple(dynamic.output), ("linear.weight_q", "linear.weight_scale")}
    for node in back.values():
        assert node.domain == "trt"
        assert attributes(node) == {"axis": -1, "block_size": 32, "output_dtype": DTYPES[dtype]}
        assert types[node.output[0]][0] == DTYPES[dtype]
    assert types["linear.weight_q"] == (TensorProto.FLOAT8E4M3FN, [64, 256])
    assert types["linear.weight_scale"] == (TensorProto.UINT8, [64, 8])


@pytest.mark.parametrize("name", NAMES)
def test_the_folded_graph_computes_what_modelopt_does(name: str) -> None:
    """In ONNX Runtime, from stored weights; and a scale of another size would show."""
    made = trace(name, torch.float32)
    model = canonical(made.model)
    assert not [n for n in made.nodes(model) if n.op_type.endswith("Quantize") and "weight" in n.input[0]]
    with torch.no_grad(), cpu_block_quant():
        expected = made.layer(x(torch.float32)).numpy()
    error = run_error(model, expected)
    assert error < 1e-6
    for tensor in model.graph.initializer:
        if (
            tensor.name.endswith(("quantizer.scale", "quantizer.0.scale"))
            and tensor.data_type == TensorProto.FLOAT
        ):
            recipe = Recipe.of_tensor(tensor)
            assert recipe is None
            wrong = numpy_helper.to_array(tensor) * np.float32(1.5)
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(wrong), tensor.name))
    assert name == "mxfp8" or run_error(model, expected) > 1e-2


def run_error(model: onnx.ModelProto, expected: Any) -> float:
    with cpu_session(materialize(model)) as session:
        (result,) = session.run({model.graph.input[0].name: x(torch.float32).numpy()}).values()
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def test_trt_is_imported_where_it_is_used() -> None:
    assert {o.domain: o.version for o in trace("nvfp4", torch.float32).model.opset_import}["trt"] == 1
    assert "trt" not in {o.domain for o in trace("fp8", torch.float32).model.opset_import}
