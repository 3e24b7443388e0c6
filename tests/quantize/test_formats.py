"""Formats as data: each is ModelOpt's own preset where there is one, and says what it stores and needs."""

from __future__ import annotations

from typing import Any

import diffusers
import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from modelopt.torch.opt.config_loader import load_config
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.conversion import set_quantizer_by_cfg
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.backends.sm import KNOWN_SMS, required_sm
from diffc.errors import DiffcError
from diffc.models.embedded import tiny
from diffc.models.registry import FAMILIES
from diffc.quantize.convert import convert_layers, enabled_quantizers, insert_quantizers
from diffc.quantize.formats import FORMATS, find_format
from diffc.quantize.options import QuantOptions
from diffc.quantize.state import Settings, attributes_of, settings_of

SHIPPED = "configs/ptq/presets/diffusers/"
PRESETS: list[tuple[str, Any]] = [
    ("int8", mtq.INT8_DEFAULT_CFG),
    ("int8", f"{SHIPPED}int8"),
    ("int8_smoothquant", mtq.INT8_SMOOTHQUANT_CFG),
    ("fp8", mtq.FP8_DEFAULT_CFG),
    ("fp8", f"{SHIPPED}fp8"),
    ("int4_awq", mtq.INT4_AWQ_CFG),
    ("w4a8_awq", mtq.W4A8_AWQ_BETA_CFG),
    ("nvfp4", mtq.NVFP4_DEFAULT_CFG),
    ("nvfp4", f"{SHIPPED}nvfp4"),
    ("nvfp4_svdquant", mtq.NVFP4_SVDQUANT_DEFAULT_CFG),
    ("nvfp4_svdquant", f"{SHIPPED}nvfp4_fp8_mha"),
    ("mxfp8", mtq.MXFP8_DEFAULT_CFG),
]


def config_of(preset: Any) -> dict[str, Any]:
    if not isinstance(preset, str):
        return dict(preset)
    return dict(load_config(preset, schema_type=QuantizeConfig).model_dump(exclude_unset=True))


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 128))


def settings(converted: nn.Module) -> dict[str, Settings]:
    return {name: settings_of(q.get_modelopt_state()) for name, q in enabled_quantizers(converted).items()}


def method(algorithm: Any) -> Any:
    return algorithm["method"] if isinstance(algorithm, dict) else algorithm


@pytest.mark.parametrize(
    ("name", "preset"), PRESETS, ids=[f"{n}-{p if isinstance(p, str) else 'mtq'}" for n, p in PRESETS]
)
def test_a_format_is_the_preset_of_modelopt(name: str, preset: Any) -> None:
    config = config_of(preset)
    theirs, ours = layer(), layer()
    convert_layers(theirs, ["0"])
    set_quantizer_by_cfg(theirs, config["quant_cfg"])
    insert_quantizers(ours, FORMATS[name], "$^")
    assert settings(ours) == settings(theirs)
    assert settings(ours)
    if preset != f"{SHIPPED}int8":
        assert FORMATS[name].algorithm == method(config["algorithm"])


def test_presets_differ() -> None:
    """The comparison above tells formats apart, all but those that differ in their algorithm only."""
    found: dict[str, list[str]] = {}
    for name in FORMATS:
        converted = layer()
        insert_quantizers(converted, FORMATS[name], "$^")
        found.setdefault(str(settings(converted)), []).append(name)
    assert sorted(found.values()) == [
        ["fp8"],
        ["int4_awq"],
        ["int8", "int8_smoothquant"],
        ["mxfp8"],
        ["none"],
        ["nvfp4", "nvfp4_svdquant"],
        ["w4a8_awq"],
    ]


def test_attention_is_that_of_modelopt() -> None:
    """q, k and v as ModelOpt's FLUX preset has them; its bmm2_output quantizer is no kernel's work."""
    preset = config_of(f"{SHIPPED}nvfp4_fp8_mha")["quant_cfg"]
    theirs, ours = (diffusers.SD3Transformer2DModel(**tiny.SD3) for _ in range(2))
    attention = "transformer_blocks.0.attn"
    convert_layers(theirs, [attention])
    set_quantizer_by_cfg(theirs, preset)
    insert_quantizers(ours, FORMATS["nvfp4"], FAMILIES["sd3"].unquantized, QuantOptions(mha=True))
    names = [f"{attention}.{role}_bmm_quantizer" for role in "qkv"]
    assert {n: settings(ours)[n] for n in names} == {n: settings(theirs)[n] for n in names}
    assert settings(ours)[names[0]]["num_bits"] == [4, 3]
    attentions = {n for n in settings(ours) if "bmm" in n or "softmax" in n}
    assert len(attentions) == 3 * tiny.SD3["num_layers"]


@pytest.mark.parametrize("name", FORMATS)
def test_settings_survive_json_and_come_back(name: str) -> None:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    converted = layer()
    insert_quantizers(converted, FORMATS[name], "$^")
    for value in settings(converted).values():
        again = TensorQuantizer(QuantizerAttributeConfig(**attributes_of(value)))
        assert settings_of(again.get_modelopt_state()) == value


WIDTHS = {  # weight bits, input bits, block, bits with the share of block scales
    "none": (None, None, None, None),
    "int8": (8, 8, None, 8),
    "int8_smoothquant": (8, 8, None, 8),
    "fp8": (8, 8, None, 8),
    "int4_awq": (4, None, 128, 4.125),
    "w4a8_awq": (4, 8, 128, 4.125),
    "nvfp4": (4, 4, 16, 4.5),
    "nvfp4_svdquant": (4, 4, 16, 4.5),
    "mxfp8": (8, 8, 32, 8.25),
}


def test_widths() -> None:
    found = {f.name: (f.weight_bits, f.input_bits, f.block_size, f.stored_bits) for f in FORMATS.values()}
    assert found == WIDTHS
    assert [f.name for f in FORMATS.values() if not f.quantizes] == ["none"]
    assert all(f.summary and f.evidence and f.min_sm in KNOWN_SMS for f in FORMATS.values())


TYPES = {
    "int8": (onnx.TensorProto.INT8,),
    "int8_smoothquant": (onnx.TensorProto.INT8,),
    "fp8": (onnx.TensorProto.FLOAT8E4M3FN,),
    "int4_awq": (onnx.TensorProto.INT4,),
    "w4a8_awq": (onnx.TensorProto.INT4, onnx.TensorProto.FLOAT8E4M3FN),
    "nvfp4": (onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E4M3FN),
    "nvfp4_svdquant": (onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E4M3FN),
    "mxfp8": (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.UINT8),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_format_begins_where_its_types_do(name: str) -> None:
    """A format is refused before any work for what the graph's types would be refused for at its end."""
    assert FORMATS[name].min_sm == required_sm(TYPES[name])[0]


@pytest.mark.parametrize("name", FORMATS)
def test_which_layers_of_a_unet(name: str) -> None:
    """Convolutions have no block formats; and a linear layer stays when its weight is not whole blocks."""
    with FakeTensorMode():
        narrow_one = {"block_out_channels": (64, 96, 128), "attention_head_dim": (1, 4, 2)}
        unet = diffusers.UNet2DConditionModel(**(tiny.SDXL | narrow_one))
        plain = {path: module for path, module in unet.named_modules() if hasattr(module, "weight")}
        if FORMATS[name].quantizes:
            insert_quantizers(unet, FORMATS[name], FAMILIES["sdxl"].unquantized)
    quantized = {
        path.rpartition(".weight_quantizer")[0] for path in enabled_quantizers(unet) if "weight_q" in path
    }
    convolutions = {path for path in quantized if isinstance(plain[path], nn.Conv2d)}
    block = FORMATS[name].block_size
    assert bool(convolutions) == (name in ("int8", "int8_smoothquant", "fp8"))
    assert bool(quantized) == (name != "none")
    assert all(plain[path].in_features % (block or 1) == 0 for path in quantized - convolutions)
    narrow = {p for p, m in plain.items() if isinstance(m, nn.Linear) and m.in_features % 128}
    assert bool(narrow & quantized) == (name != "none" and block != 128)


def test_names_may_have_hyphens() -> None:
    assert find_format("nvfp4-svdquant") is FORMATS["nvfp4_svdquant"]
    assert find_format("w4a8_awq") is FORMATS["w4a8_awq"]
    with pytest.raises(DiffcError, match=rf"unknown format 'fp6'\. Known: {', '.join(FORMATS)}"):
        find_format("fp6")


def test_fp8_blocks_are_not_taken_for_mxfp8() -> None:
    """Static FP8 blocks, which ModelOpt has too, are another kind: no format compiles them."""
    from diffc.quantize.kinds import kind_of

    converted = layer()
    convert_layers(converted, ["0"])
    rules = [
        {"quantizer_name": "*", "enable": False},
        {
            "quantizer_name": "*weight_quantizer",
            "cfg": {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}},
        },
    ]
    set_quantizer_by_cfg(converted, rules)
    (found,) = settings(converted).values()
    with pytest.raises(DiffcError, match=r"quantizer of \[4, 3\] bits with blocks .* is not of a kind"):
        kind_of(found)
    assert torch.is_tensor(converted[0].weight)
