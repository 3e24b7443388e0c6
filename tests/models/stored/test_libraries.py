"""Layers and files that other libraries have made, against their own dequantization, bit for bit.

ModelOpt's folders: `test_folder.py`. What comfy_kitchen and gguf made is kept (tests/data/README.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from diffc.errors import UnsupportedError
from diffc.models.single.files import read_file
from diffc.models.sources.locate import locate
from diffc.models.stored.decode import Statement, decode
from diffc.tensors import tensor_of
from passes.weights.evaluate import evaluate
from passes.weights.gguf_blocks import BLOCKS
from passes.weights.recipe import Recipe
from tests import DATA
from tests.models.single.releases import State, released, save

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
COMFY = np.load(DATA / "comfy_kitchen.npz")
GGUF = np.load(DATA / "gguf" / "blocks.npz")
FORMATS = {
    "float8_e4m3fn": ("fp8", 48),
    "nvfp4": ("nvfp4", 200),
    "mxfp8": ("mxfp8", 136),
    "int8_tensorwise": ("int8", 40),
}

_SINGLE = "single_transformer_blocks.0"
PARTS = {
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj",),
    "double_blocks.1.txt_attn.proj": ("transformer_blocks.1.attn.to_add_out",),
    "single_blocks.0.linear1": (
        *(f"{_SINGLE}.attn.to_{name}" for name in "qkv"),
        f"{_SINGLE}.proj_mlp",
    ),
}
"""Layers of FLUX's release -> diffusers' layers that hold their rows."""


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_of_comfy_kitchen_has_its_values(format: str) -> None:
    kind, rows = FORMATS[format]
    tensors = {
        name.removeprefix(f"{format}."): COMFY[name] for name in COMFY.files if name.startswith(f"{format}.")
    }
    expected = tensors.pop("expected")
    note = np.frombuffer(json.dumps({"format": format}).encode(), np.uint8)
    own: dict[str, Any] = {f"a.{name}": array for name, array in tensors.items()} | {"a.comfy_quant": note}
    own["a.bias"] = np.zeros(rows, np.float32)  # the rows of the layer; the file has whole tiles
    if format != "int8_tensorwise" and tensors["weight"].shape[1] == expected.shape[1]:
        own["a.weight"] = own["a.weight"].view(E4M3)
    found = decode({name: Recipe.of_array(np.asarray(v)) for name, v in own.items()}, Statement(), "file")
    layer = found.held["a"]
    assert layer.kind == kind
    np.testing.assert_array_equal(evaluate(layer.weight), expected[:rows])
    np.testing.assert_array_equal(evaluate(found.weights["a.weight"]), expected[:rows])


def test_a_file_of_gguf_has_the_values_of_every_block_type() -> None:
    found = read_file(DATA / "gguf" / "library.gguf").tensors
    assert found.keys() == {f"{kind}.weight" for kind in BLOCKS} | {"plain.bias"}
    for kind in BLOCKS:
        expected = GGUF[f"{kind}_values"][:2]
        np.testing.assert_array_equal(evaluate(found[f"{kind}.weight"]), expected, kind)
    np.testing.assert_array_equal(evaluate(found["plain.bias"]), np.linspace(-1, 1, 6, dtype=np.float32))


def bfl_file(path: Path, kind: str, **metadata: str) -> tuple[Path, State]:
    """tiny-flux by the names of its release, block layers quantized by diffusers' own functions; their tensors."""
    from diffusers.quantizers.bfl.utils import quantize_fp8r, quantize_nvfp4

    made: State = {}
    for name, tensor in released("tiny-flux")[0].items():
        layer = name.removesuffix(".weight")
        if not name.endswith(("linear1.weight", "img_mlp.0.weight", "txt_attn.proj.weight")):
            made[name] = tensor
        elif kind == "fp8r":
            made[name], made[f"{layer}.weight_scale"] = quantize_fp8r(tensor)
        else:
            made[name], made[f"{layer}.weight_scale"], made[f"{layer}.weight_scale_2"] = quantize_nvfp4(
                tensor
            )
            made[f"{layer}.input_scale"] = torch.tensor(0.002)
    return save(made, path, prefix="", **metadata), made


@pytest.mark.parametrize(("kind", "held"), [("fp8r", "fp8"), ("nvfp4", "nvfp4")])
def test_layers_of_black_forest_labs_are_those_of_diffusers(kind: str, held: str, tmp_path: Path) -> None:
    from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4

    said = (
        {"quantization_config": '{"quant_method": "modelopt", "quant_algo": "NVFP4"}'}
        if kind == "nvfp4"
        else {}
    )
    path, made = bfl_file(tmp_path / "file.safetensors", kind, **said)
    source = locate(str(path))
    for theirs, ours in PARTS.items():
        layers = [source.held[name] for name in ours]
        weight = torch.cat([tensor_of(layer.weight, torch.float32) for layer in layers])
        scales = [
            made[f"{theirs}.{name}"]
            for name in ("weight_scale", "weight_scale_2")
            if f"{theirs}.{name}" in made
        ]
        dequantize = dequantize_fp8r if kind == "fp8r" else dequantize_nvfp4
        assert torch.equal(weight, dequantize(made[f"{theirs}.weight"], *scales)), theirs
        assert {layer.kind for layer in layers} == {held}
        assert all((layer.input is None) == (kind == "fp8r") for layer in layers)


def test_nvfp4_of_original_names_is_not_taken_for_comfyuis(tmp_path: Path) -> None:
    """diffusers reads such files (BFLQuantizationConfig) as ModelOpt packs, ComfyUI as it packs itself."""
    path, _ = bfl_file(tmp_path / "file.safetensors", "nvfp4")
    with pytest.raises(UnsupportedError, match="nothing says whether as ComfyUI or as ModelOpt"):
        locate(str(path))
