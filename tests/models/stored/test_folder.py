"""Folders that ModelOpt writes itself, against its own dequantization, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.locate import locate
from diffc.tensors import tensor_of

SMALL = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "in_channels": 128,  # a multiple of INT4's block, as all widths are
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "axes_dims_rope": (8, 12, 12),
}
CONFIGS = {
    "FP8": "FP8_DEFAULT_CFG",
    "INT8": "INT8_DEFAULT_CFG",
    "SmoothQuant": "INT8_SMOOTHQUANT_CFG",
    "AWQ": "INT4_AWQ_CFG",
    "W4A8": "W4A8_AWQ_BETA_CFG",
    "INT4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "NVFP4": "NVFP4_DEFAULT_CFG",
    "MXFP8": "MXFP8_DEFAULT_CFG",
}
DIVIDED_IN = {"INT4": torch.bfloat16}  # ModelOpt divides by the 16-bit scale in that type
HELD = {"SmoothQuant": "int8", "AWQ": "int4", "W4A8": "int4"}


def forward(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    inputs = {"hidden_states": draw(1, 16, 128), "encoder_hidden_states": draw(1, 8, 128)}
    inputs |= {"pooled_projections": draw(1, 128), "timestep": torch.tensor([0.5])}
    with torch.no_grad():
        model(**inputs, img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3))


def written(kind: str, way: str, folder: Path) -> Path:
    """A small FLUX in bfloat16, quantized and written by ModelOpt."""
    import modelopt.torch.quantization as mtq
    from diffusers import FluxTransformer2DModel
    from modelopt.torch.export import export_hf_checkpoint

    torch.manual_seed(0)
    with quiet_libraries():
        model = FluxTransformer2DModel(**SMALL).to(torch.bfloat16)
        mtq.quantize(model, getattr(mtq, CONFIGS[kind]), forward)
        if way == "export":
            export_hf_checkpoint(model, export_dir=folder)
        else:
            if way == "compress":
                mtq.compress(model)
            model.save_pretrained(folder)
    return folder


def dequantized(kind: str, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight of a layer by ModelOpt's own classes, float32."""
    from modelopt.torch.quantization import qtensor

    codes, own = state[f"{name}.weight"], {k: v for k, v in state.items() if k.startswith(f"{name}.weight_")}
    scale = own.get(f"{name}.weight_scale", own.get(f"{name}.weight_quantizer._scale"))
    assert scale is not None
    classes = {"FP8": qtensor.FP8QTensor, "MXFP8": qtensor.MXFP8QTensor, "INT4": qtensor.INT4QTensor}
    if kind in ("NVFP4", "INT4"):
        tensor = own.get(f"{name}.weight_scale_2", own.get(f"{name}.weight_quantizer._double_scale"))
        shape = torch.Size((codes.shape[0], codes.shape[1] * 2))
        made = classes.get(kind, qtensor.NVFP4QTensor)(shape, torch.float32, codes)
        size = 16 if kind == "NVFP4" else 128
        return made.dequantize(torch.float32, scale=scale, double_scale=tensor, block_sizes={-1: size})
    scale = scale[:, None] if scale.ndim == 1 else scale
    made = classes.get(kind, qtensor.INT8QTensor)(codes.shape, torch.float32, codes)
    return made.dequantize(torch.float32, scale=scale)


def packed_again(state: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> bool:
    """Whether ModelOpt packs `weight` to the codes of the file: it has no way back from those of AWQ's exports."""
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8

    made = pack_int4_in_uint8(weight, state[f"{name}.weight_scale"].float(), 128)
    return torch.equal(made, state[f"{name}.weight"])


WAYS = (
    *("FP8 export", "INT8 export", "SmoothQuant export", "AWQ export", "W4A8 export", "NVFP4 export"),
    *("MXFP8 export", "FP8 compress", "INT8 compress", "INT4 compress", "NVFP4 compress", "MXFP8 compress"),
)


@pytest.mark.parametrize(("kind", "way"), [way.split() for way in WAYS])
def test_weights_are_those_that_modelopt_dequantizes(kind: str, way: str, tmp_path: Path) -> None:
    folder = written(kind, way, tmp_path / "model")
    source, state = locate(str(folder)), load_file(next(folder.glob("*.safetensors")))
    assert (source.family.name, source.dtype) == ("flux", "bfloat16")
    assert len(source.held) > 20
    assert "quantization_config" not in source.config
    for name, layer in source.held.items():
        weight = tensor_of(layer.weight, DIVIDED_IN.get(kind, torch.float32))
        if kind in ("AWQ", "W4A8"):
            assert packed_again(state, name, weight), name
        else:
            assert torch.equal(weight, dequantized(kind, state, name).to(weight.dtype)), name
        assert layer.kind == HELD.get(kind, kind.lower())
        assert (layer.input is None) == (kind in ("AWQ", "INT4"))
        assert (layer.pre_quant_scale is not None) <= (kind in ("AWQ", "W4A8", "SmoothQuant"))
    scaled = sum(layer.pre_quant_scale is not None for layer in source.held.values())
    assert (scaled > 10) == (kind in ("AWQ", "W4A8", "SmoothQuant"))


def test_ranges_alone_need_the_bits_of_the_quantizers(tmp_path: Path) -> None:
    folder = written("FP8", "plain", tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"in name only[\s\S]*mtq\.compress"):
        locate(str(folder))
    config = (folder / "config.json").read_text()
    said = '"quantization_config": {"quant_method": "modelopt", "quant_type": "FP8"},'
    (folder / "config.json").write_text(config.replace("{", "{" + said, 1))
    source, state = locate(str(folder)), load_file(next(folder.glob("*.safetensors")))
    name = "transformer_blocks.0.attn.to_q"
    amax = state[f"{name}.weight_quantizer._amax"].float()
    steps = (state[f"{name}.weight"].float() * (1 / amax * 448)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(tensor_of(source.held[name].weight), steps.float() * (amax / 448))


def test_a_state_that_could_run_code_is_not_loaded(tmp_path: Path) -> None:
    folder = written("FP8", "plain", tmp_path / "model")
    torch.save({"modelopt_state_dict": [Path]}, folder / "modelopt_state.pth")
    with pytest.raises(DiffcError, match="could run code"):
        locate(str(folder))
