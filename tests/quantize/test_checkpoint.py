"""Checkpoints: what is saved comes back bit for bit, on real and fake weights; what is wrong is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffc.errors import DiffcError
from diffc.models.registry import FAMILIES
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import enabled_quantizers, insert_quantizers
from diffc.quantize.formats import FORMATS
from tests.backbones import backbone_of, forward, make_portable


def calibrated(family: str, format: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A backbone calibrated by ModelOpt on one random input."""
    backbone = backbone_of(family, dtype)
    insert_quantizers(backbone, FORMATS[format], FAMILIES[family].unquantized)
    mtq.calibrate(backbone, FORMATS[format].algorithm, lambda b: forward(b, family, seed=0))
    make_portable(backbone)
    return backbone


@pytest.mark.parametrize(
    ("family", "format", "dtype"),
    [
        ("sd3", "fp8", torch.float32),
        ("sd3", "int8", torch.bfloat16),
        ("flux", "int8", torch.float32),
        ("flux", "fp8", torch.bfloat16),
        ("sdxl", "int8", torch.float32),
    ],
)
def test_a_saved_checkpoint_gives_the_same_output_bit_for_bit(
    family: str, format: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    first = calibrated(family, format, dtype)
    Checkpoint.from_backbone(first, family=family, format=format).save(tmp_path / "c")
    second = backbone_of(family, dtype)
    plain = forward(second, family)
    Checkpoint.load(tmp_path / "c").apply(second, family)
    assert enabled_quantizers(second).keys() == enabled_quantizers(first).keys()
    output = forward(second, family)
    assert torch.equal(output, forward(first, family))
    error = (output - plain).float().norm() / plain.float().norm()
    assert 1e-4 < error < 0.2


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return calibrated("flux", "int8")


@pytest.fixture(scope="module")
def checkpoint(flux: nn.Module) -> Checkpoint:
    calibration = {"prompts": ("a fox", "é"), "steps": 4, "seed": 7}
    return Checkpoint.from_backbone(flux, family="flux", format="int8", source="abc", calibration=calibration)


@pytest.mark.parametrize("inside", [True, False])
def test_a_fake_backbone_takes_fake_amax_of_the_right_shape(
    flux: nn.Module, checkpoint: Checkpoint, inside: bool
) -> None:
    mode = FakeTensorMode()
    with mode:
        fake = backbone_of("flux")
        if inside:
            checkpoint.apply(fake, "flux")
    if not inside:
        checkpoint.apply(fake, "flux")
    amax = {name: q.amax for name, q in enabled_quantizers(fake).items()}
    assert all(isinstance(value, FakeTensor) and value.fake_mode is mode for value in amax.values())
    real = {name: q.amax.shape for name, q in enabled_quantizers(flux).items()}
    assert {name: value.shape for name, value in amax.items()} == real
    name = "transformer_blocks.0.ff.net.2.weight_quantizer"
    assert fake.get_submodule(name).axis == flux.get_submodule(name).axis == 0


def test_everything_is_read_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c")
    loaded = Checkpoint.load(tmp_path / "c")
    assert replace(loaded, amax={}) == replace(checkpoint, amax={})
    assert loaded.amax.keys() == checkpoint.amax.keys()
    assert all(np.array_equal(loaded.amax[name], value) for name, value in checkpoint.amax.items())
    assert loaded.calibration == {"prompts": ["a fox", "é"], "steps": 4, "seed": 7}
    assert loaded.versions.keys() == {"nvidia-modelopt", "torch", "diffusers"}
    key = "transformer_blocks.0.attn.to_q.input_quantizer"
    assert loaded.settings[key]["num_bits"] == 8
    assert loaded.amax[key].dtype == np.float32


def test_another_model_is_refused(checkpoint: Checkpoint) -> None:
    with FakeTensorMode():
        deeper, same, sd3 = backbone_of("flux", num_single_layers=3), backbone_of("flux"), backbone_of("sd3")
    with pytest.raises(DiffcError, match="num_single_layers is 2 in the checkpoint and 3 in the model"):
        checkpoint.apply(deeper, "flux")
    with pytest.raises(DiffcError, match="of family 'flux', the model is 'sd3'"):
        checkpoint.apply(sd3, "sd3")
    with pytest.raises(DiffcError, match="calibrated on other weights"):
        checkpoint.check(same, "flux", source="def")
    checkpoint.check(same, "flux", source="abc")
    checkpoint.check(same, "flux")
    checkpoint.apply(same, "flux")
    with pytest.raises(DiffcError, match="holds quantizers already"):
        checkpoint.apply(same, "flux")


def test_a_layer_that_the_backbone_lacks_is_named(checkpoint: Checkpoint) -> None:
    with FakeTensorMode():
        backbone = backbone_of("flux")
    settings = checkpoint.settings | {"gone.to_q.input_quantizer": {}}
    with pytest.raises(DiffcError, match=r"quantizes gone\.to_q, which this FluxTransformer2DModel"):
        replace(checkpoint, settings=settings).apply(backbone, "flux")


def test_an_uncalibrated_backbone_makes_no_checkpoint() -> None:
    backbone = backbone_of("flux")
    insert_quantizers(backbone, FORMATS["fp8"], FAMILIES["flux"].unquantized)
    with pytest.raises(DiffcError, match="input_quantizer was never run"):
        Checkpoint.from_backbone(backbone, family="flux", format="fp8")
