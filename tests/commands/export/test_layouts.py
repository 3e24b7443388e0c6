"""Calibrations in other layouts, read back: the codes are those that the compile stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffc.commands.export.layers import calibrated_layers
from diffc.commands.export.run import ExportRequest, export, find_calibrated
from diffc.commands.export.tensors import parts_of
from diffc.errors import DiffcError, UsageError
from diffc.models.sources.locate import locate
from diffc.models.stored.held import Held
from diffc.tensors import tensor_of
from passes.weights.evaluate import evaluate, to_bytes
from tests.conftest import Cells


def same(one: Held, other: Held) -> bool:
    """Whether two layers have the same codes, scales and input."""
    for a, b in zip(parts_of(one), parts_of(other), strict=True):
        if not np.array_equal(
            np.asarray(evaluate(a)).astype(np.float32), np.asarray(evaluate(b)).astype(np.float32)
        ):
            return False
    if one.input is None or other.input is None:
        return one.input is other.input
    if one.input.scale is None or other.input.scale is None:
        return one.input.kind == other.input.kind
    return bool(evaluate(one.input.scale) == evaluate(other.input.scale))


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_a_modelopt_folder_has_the_codes_of_the_compile(format: str, compiled: Cells, tmp_path: Path) -> None:
    cell = compiled("tiny-sd3", format)
    written = export(ExportRequest(cell.folder, "modelopt-hf", tmp_path / "out"))
    calibrated = find_calibrated(cell.folder, None)
    own = calibrated_layers(calibrated.source, calibrated.checkpoint, calibrated.dtype)
    read = locate(str(tmp_path / "out"))
    linear = {name: layer for name, layer in own.items() if len(layer.weight.shape) == 2}
    assert read.held.keys() == linear.keys()
    assert written.layers == len(linear) > 5
    assert all(same(read.held[name], layer) for name, layer in linear.items())
    # The compile's own file has the same bytes, in the layout that its readers want.
    data = (cell.folder / "model.onnx_data").read_bytes()
    for name, layer in linear.items():
        codes = evaluate(parts_of(layer)[0])
        assert any(bytes(to_bytes(turned)) in data for turned in (codes, np.ascontiguousarray(codes.T))), name


def test_a_comfyui_file_joins_what_has_one_scale_and_names_the_rest(compiled: Cells, tmp_path: Path) -> None:
    cell = compiled("tiny-sd3", "fp8")
    path = tmp_path / "out.safetensors"
    written = export(ExportRequest(cell.folder, "comfyui", path))
    calibrated = find_calibrated(cell.folder, None)
    own = calibrated_layers(calibrated.source, calibrated.checkpoint, calibrated.dtype)
    read = locate(str(path))
    assert read.config["num_layers"] == calibrated.source.config["num_layers"]
    assert len(read.held) == written.layers > 5
    assert all(same(layer, own[name]) for name, layer in read.held.items())
    (expanded,) = written.left_out.values()
    assert any("attn.qkv.weight" in name for name in expanded)
    for name, layer in own.items():  # what could not be joined has the values of its codes, rounded once
        if name not in read.held:
            expected = tensor_of(layer.effective, getattr(torch, calibrated.dtype))
            assert torch.equal(tensor_of(read.weights[f"{name}.weight"]), expected), name


def test_diffusers_loads_the_values_of_the_codes(compiled: Cells, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    cell = compiled("tiny-sd3", "fp8")
    export(ExportRequest(cell.folder, "diffusers", tmp_path / "out"))
    calibrated = find_calibrated(cell.folder, None)
    own = calibrated_layers(calibrated.source, calibrated.checkpoint, calibrated.dtype)
    dtype = getattr(torch, calibrated.dtype)
    model = SD3Transformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=dtype)
    for name, layer in own.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        assert torch.equal(weight, tensor_of(layer.effective, dtype).reshape(weight.shape)), name


def test_modelopt_restores_its_own_file(compiled: Cells, tmp_path: Path) -> None:
    import modelopt.torch.opt as mto

    from diffc.models.sources.backbone import build_backbone
    from diffc.quantize.convert import enabled_quantizers

    cell = compiled("tiny-sd3", "fp8")
    export(ExportRequest(cell.folder, "mto", tmp_path / "out.pt"))
    calibrated = find_calibrated(cell.folder, None)
    plain = build_backbone(
        calibrated.source.family, calibrated.source.config, getattr(torch, calibrated.dtype)
    )
    restored = mto.restore(plain, tmp_path / "out.pt")
    quantizers = enabled_quantizers(restored)
    assert quantizers.keys() == calibrated.checkpoint.settings.keys()
    for name, amax in calibrated.checkpoint.amax.items():
        np.testing.assert_array_equal(quantizers[name].amax.float().numpy().reshape(-1), amax.reshape(-1))


class TestRefusals:
    def test_what_is_there_stays(self, compiled: Cells, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        request = ExportRequest(compiled("tiny-sd3", "fp8").folder, "diffusers", tmp_path / "out")
        with pytest.raises(UsageError, match="is there already"):
            export(request)

    def test_an_artifact_without_a_calibration(self, compiled: Cells, tmp_path: Path) -> None:
        request = ExportRequest(compiled("tiny-sd3", "none").folder, "modelopt-hf", tmp_path / "out")
        with pytest.raises(DiffcError, match="has no calibration"):
            export(request)
        assert not (tmp_path / "out").exists()

    def test_a_file_layout_wants_its_ending(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"does not end in \.safetensors"):
            export(ExportRequest(tmp_path, "comfyui", tmp_path / "out"))

    def test_an_unknown_layout_lists_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="modelopt-hf, diffusers, mto, comfyui"):
            export(ExportRequest(tmp_path, "gguf", tmp_path / "out"))
