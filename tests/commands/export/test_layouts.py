"""Calibrations in other layouts, read back: the codes are those that the compile stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffc.commands.export.layers import calibrated_layers
from diffc.commands.export.layouts import Calibrated
from diffc.commands.export.run import ExportRequest, export, find_calibrated
from diffc.commands.export.tensors import parts_of
from diffc.compile.calibration import calibrate_on_random_inputs, uncalibrated
from diffc.errors import DiffcError, UnsupportedError, UsageError
from diffc.models.inputs import random_inputs
from diffc.models.sources.backbone import FakeBackbone, build_backbone, load_backbone, quiet_libraries
from diffc.models.sources.locate import locate
from diffc.models.spec import Shape
from diffc.models.stored.held import Held
from diffc.progress_bar import default_reporter
from diffc.quantize.convert import enabled_quantizers
from diffc.quantize.formats import find_format
from diffc.quantize.options import QuantOptions
from diffc.quantize.simulate import cpu_block_quant, nvfp4_fake_quant
from diffc.tensors import tensor_of
from diffc.validate.torch_reference import reference_model
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


FORMATS = ("fp8", "int8_smoothquant", "int4_awq", "w4a8_awq", "nvfp4", "nvfp4+four-six", "mxfp8")


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a calibration of tiny-sd3 on random inputs, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("calibrations")

    def made(format: str) -> Path:
        name, _, scales = format.partition("+")
        place, source, fmt = folder / format, locate("tiny-sd3"), find_format(name)
        options = QuantOptions(weight_scales=scales or "max")
        if not place.exists():
            if fmt.algorithm is None:
                checkpoint = uncalibrated(fmt, options, FakeBackbone(source))
            else:
                sizes = {"batch_size": 1, "size": 64, "seed": 0}
                checkpoint = calibrate_on_random_inputs(source, fmt, options, default_reporter(), **sizes)
            checkpoint.save(place)
        return place

    return made


def own_layers(folder: Path) -> tuple[Calibrated, dict[str, Held]]:
    calibrated = find_calibrated(folder, "tiny-sd3")
    return calibrated, calibrated_layers(calibrated.source, calibrated.checkpoint, calibrated.dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_a_modelopt_folder_is_read_back_as_it_was(
    format: str, calibrations: Callable[[str], Path], tmp_path: Path
) -> None:
    written = export(ExportRequest(calibrations(format), "modelopt-hf", tmp_path / "out", "tiny-sd3"))
    _, own = own_layers(calibrations(format))
    linear = {name: layer for name, layer in own.items() if len(layer.weight.shape) == 2}
    read = locate(str(tmp_path / "out"))
    assert read.held.keys() == linear.keys()
    assert written.layers == len(linear) > 5
    for name, layer in linear.items():
        assert same(read.held[name], layer), name
        assert (read.held[name].pre_quant_scale is None) == (layer.pre_quant_scale is None)


def test_the_codes_are_those_that_a_compile_stores(compiled: Cells, tmp_path: Path) -> None:
    cell = compiled("tiny-sd3", "fp8")
    export(ExportRequest(cell.folder, "modelopt-hf", tmp_path / "out"))
    data = (cell.folder / "model.onnx_data").read_bytes()
    for name, layer in locate(str(tmp_path / "out")).held.items():
        codes = evaluate(parts_of(layer)[0])
        turned = (codes, np.ascontiguousarray(codes.T))
        assert any(bytes(to_bytes(array)) in data for array in turned), name


@pytest.mark.parametrize("format", ["fp8", "int8_smoothquant", "nvfp4", "mxfp8"])
def test_a_comfyui_file_joins_what_has_one_scale_and_names_the_rest(
    format: str, calibrations: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "out.safetensors"
    written = export(ExportRequest(calibrations(format), "comfyui", path, "tiny-sd3"))
    calibrated, own = own_layers(calibrations(format))
    read = locate(str(path))
    assert read.config["num_layers"] == calibrated.source.config["num_layers"]
    assert len(read.held) >= written.layers > 5
    assert all(same(layer, own[name]) for name, layer in read.held.items() if is_whole(layer, own[name]))
    for name, layer in own.items():  # what could not be joined has the values of its codes, rounded once
        if name not in read.held:
            expected = tensor_of(layer.effective, getattr(torch, calibrated.dtype))
            assert torch.equal(tensor_of(read.weights[f"{name}.weight"]).to(expected.dtype), expected), name
    missing = own.keys() - read.held.keys()
    assert bool(missing) == bool(written.left_out)


def is_whole(one: Held, other: Held) -> bool:
    """Whether a layer is the file's own tensor, or rows of one whose scales are those of its rows."""
    return one.weight.shape == other.weight.shape


def test_diffusers_loads_the_values_of_the_codes(calibrations: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    export(ExportRequest(calibrations("fp8"), "diffusers", tmp_path / "out", "tiny-sd3"))
    calibrated, own = own_layers(calibrations("fp8"))
    dtype = getattr(torch, calibrated.dtype)
    model = SD3Transformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=dtype)
    for name, layer in own.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        assert torch.equal(weight, tensor_of(layer.effective, dtype).reshape(weight.shape)), name


def test_blocks_of_four_over_six_are_what_torch_simulates_and_no_quantizers_of_modelopt(
    calibrations: Callable[[str], Path], tmp_path: Path
) -> None:
    calibrated, own = own_layers(calibrations("nvfp4+four-six"))
    model = load_backbone(calibrated.source, torch.float32)
    calibrated.checkpoint.apply(model, calibrated.source.family.name)
    name = "transformer_blocks.0.attn.to_q"
    layer = model.get_submodule(name)
    with torch.no_grad(), cpu_block_quant():
        simulated = layer.weight_quantizer(layer.weight)
    assert own[name].kind == "nvfp4"  # whoever reads the codes needs to know no more
    assert torch.equal(simulated, tensor_of(own[name].effective, torch.float32).reshape(simulated.shape))
    plain = nvfp4_fake_quant(layer.weight, layer.weight_quantizer.amax)
    error, other = ((w - layer.weight).square().mean() for w in (simulated, plain))
    assert 0.7 < error / other < 0.95
    request = ExportRequest(calibrations("nvfp4+four-six"), "mto", tmp_path / "out.pt", "tiny-sd3")
    with pytest.raises(UnsupportedError, match="four-six"):
        export(request)
    assert list(tmp_path.iterdir()) == []


def test_modelopt_restores_its_own_file(calibrations: Callable[[str], Path], tmp_path: Path) -> None:
    import modelopt.torch.opt as mto

    export(ExportRequest(calibrations("fp8"), "mto", tmp_path / "out.pt", "tiny-sd3"))
    calibrated, _ = own_layers(calibrations("fp8"))
    dtype = getattr(torch, calibrated.dtype)
    with quiet_libraries():
        plain = build_backbone(calibrated.source.family, calibrated.source.config, dtype)
        restored = mto.restore(plain, tmp_path / "out.pt")
    quantizers = enabled_quantizers(restored)
    assert quantizers.keys() == calibrated.checkpoint.settings.keys()
    for name, amax in calibrated.checkpoint.amax.items():
        np.testing.assert_array_equal(quantizers[name].amax.float().numpy().reshape(-1), amax.reshape(-1))
    source = calibrated.source
    ours = reference_model(source, calibrated.dtype, calibrated.checkpoint)
    shape = Shape(2, 96, 64, 21)
    inputs = random_inputs(source.family, source.config, shape, dtype=torch.float32, seed=17)
    with torch.no_grad(), quiet_libraries():
        theirs, mine, plain = (
            model(**inputs).sample for model in (restored.float(), ours, load_backbone(source, dtype).float())
        )
    assert distance(theirs, mine) < 1e-6
    assert distance(theirs, plain) > 1e-3  # the quantizers do something


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2."""
    return float((one - other).norm() / other.norm())


class TestRefusals:
    def test_what_is_there_stays(self, calibrations: Callable[[str], Path], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        request = ExportRequest(calibrations("fp8"), "diffusers", tmp_path / "out", "tiny-sd3")
        with pytest.raises(UsageError, match="is there already"):
            export(request)

    def test_a_calibration_alone_does_not_say_its_model(
        self, calibrations: Callable[[str], Path], tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="does not say which model"):
            export(ExportRequest(calibrations("fp8"), "modelopt-hf", tmp_path / "out"))
        with pytest.raises(DiffcError, match="the model is 'flux'"):
            export(ExportRequest(calibrations("fp8"), "modelopt-hf", tmp_path / "out", "tiny-flux"))
        assert not list(tmp_path.iterdir())

    def test_a_file_layout_wants_its_ending(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"does not end in \.safetensors"):
            export(ExportRequest(tmp_path, "comfyui", tmp_path / "out"))

    def test_an_unknown_layout_lists_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="modelopt-hf, diffusers, mto, comfyui"):
            export(ExportRequest(tmp_path, "gguf", tmp_path / "out"))
