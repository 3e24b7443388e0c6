"""Weights that do not fit config.json: what they are told to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.errors import DiffcError
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import locate
from diffc.models.sources.misfit import misfit
from tests.models.sources.folders import FLUX, backbone

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        (f"{LAYER}.base_layer.weight", r"LoRA.*[\s\S]*unload_lora_weights"),
        (f"{LAYER}.lora_A.default_0.weight", "LoRA"),
        (f"{LAYER}.weight.absmax", r"bitsandbytes[\s\S]*trained in"),
        (f"{LAYER}.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        (f"{LAYER}.SCB", "bitsandbytes"),
        (f"{LAYER}.input_scale", r"ModelOpt[\s\S]*--from-checkpoint"),
        (f"{LAYER}.weight_scale_2", "ModelOpt"),
        (f"{LAYER}.qweight", "quantized to integers"),
        (f"{LAYER}.weight._data", "quanto"),
        ("transformer_blocks.0.attn.to_qkv.weight", r"fused projections[\s\S]*unfuse_qkv_projections"),
        ("double_blocks.0.img_attn.qkv.weight", r"original release[\s\S]*from_single_file"),
        ("model.diffusion_model.input_blocks.0.0.weight", "original release"),
        (f"_orig_mod.{LAYER}.weight", r"begin with '_orig_mod\.', as torch\.compile"),
        (f"module.{LAYER}.weight", r"begin with 'module\.'"),
        (f"model.{LAYER}.weight", r"begin with 'model\.'"),
        ("something.else", "have no tensor"),
    ],
)
def test_names_tell_what_the_weights_are(strange: str, said: str) -> None:
    with pytest.raises(DiffcError, match=said):
        raise misfit("mine", [f"{LAYER}.weight"], {strange})


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-sdxl", "tiny-flux"])
def test_names_of_every_family_are_no_kind_of_misfit(name: str) -> None:
    names = set(FakeBackbone(locate(name)).module.state_dict())
    with pytest.raises(DiffcError, match="does not ask for"):
        raise misfit(name, [], names)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"},
            r"quantized by bitsandbytes \(nf4\)",
        ),
        ({"quant_method": "modelopt", "quant_type": "FP8"}, r"modelopt \(FP8\)[\s\S]*--from-checkpoint"),
        ({"load_in_8bit": True}, "a library that it does not name"),
    ],
)
def test_a_quantization_config_is_not_ignored(tmp_path: Path, config: dict[str, object], said: str) -> None:
    folder = backbone(tmp_path, FLUX | {"quantization_config": config})
    with pytest.raises(DiffcError, match=rf"config\.json has a quantization_config: .*{said}"):
        locate(str(folder))
