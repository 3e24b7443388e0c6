"""Checkpoints: what is saved comes back bit for bit, on real and fake weights; what is wrong is said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffc.errors import DiffcError
from diffc.models.registry import FAMILIES
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import enabled_quantizers, insert_quantizers
from diffc.quantize.formats import FORMATS
from tests.backbones import backbone_of, forward, make_portable

NAMES = {"checkpoint.json", "quantizers.safetensors"}


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


def test_saving_is_deterministic_and_leaves_nothing_else(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        checkpoint.save(tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == NAMES
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saving_replaces_checkpoints_only(checkpoint: Checkpoint, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(b"1")
    with pytest.raises(DiffcError, match="is no checkpoint"):
        checkpoint.save(photos)
    assert [p.name for p in photos.iterdir()] == ["one.jpg"]
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty")
    replace(checkpoint, source="new").save(tmp_path / "empty")
    assert Checkpoint.load(tmp_path / "empty").source == "new"
    with pytest.raises(DiffcError, match="cannot write the checkpoint"):
        checkpoint.save(photos / "one.jpg" / "c")


def change_record(folder: Path, **changed: Any) -> None:
    record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    record = {key: value for key, value in (record | changed).items() if value is not None}
    (folder / "checkpoint.json").write_text(json.dumps(record), encoding="utf-8")


def drop_setting(folder: Path) -> None:
    record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    name = next(name for name in record["settings"] if "to_q" in name)
    settings = {key: value for key, value in record["settings"].items() if key != name}
    change_record(folder, settings=settings)


def rename_tensor(folder: Path, old: str, new: str | None) -> None:
    """Rename the first tensor whose name has `old` in it, or drop it; the hash in the record fits again."""
    path = folder / "quantizers.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if old in name)
    array = tensors.pop(name)
    if new is not None:
        tensors[name.replace(old, new)] = array
    save_file(tensors, path)
    change_record(folder, tensors_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda c: (c / "checkpoint.json").unlink(), "no checkpoint at .* expected a folder with"),
        (
            lambda c: (c / "checkpoint.json").write_text('{"schema": 1', encoding="utf-8"),
            "damaged: .*cannot be read",
        ),
        (
            lambda c: (c / "checkpoint.json").write_text("[1]", encoding="utf-8"),
            "damaged: .*not a JSON object",
        ),
        (lambda c: change_record(c, schema=99), "has schema 99; this diffc reads schema 1"),
        (lambda c: change_record(c, family=None), "damaged: checkpoint.json lacks 'family'"),
        (lambda c: change_record(c, tensors_sha256=None), "damaged: checkpoint.json lacks 'tensors_sha256'"),
        (lambda c: change_record(c, settings={"x": {}}), "damaged: the settings of x are not those"),
        (lambda c: change_record(c, settings={"x": 1}), "damaged: the settings of x are not those"),
        (lambda c: change_record(c, settings={}), "damaged: checkpoint.json and .* disagree on"),
        (lambda c: drop_setting(c), "damaged: checkpoint.json and .* disagree on .*to_q"),
        (lambda c: rename_tensor(c, "to_q", "to_x"), "damaged: checkpoint.json and .* disagree on .*to_q"),
        (lambda c: rename_tensor(c, "to_q", None), "damaged: checkpoint.json and .* disagree on .*to_q"),
        (lambda c: (c / "quantizers.safetensors").unlink(), "damaged: quantizers.safetensors cannot be read"),
        (
            lambda c: flip_byte(c / "quantizers.safetensors"),
            "damaged: quantizers.safetensors is not the file",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(
    checkpoint: Checkpoint, tmp_path: Path, harm: Any, message: str
) -> None:
    checkpoint.save(tmp_path / "c")
    harm(tmp_path / "c")
    with pytest.raises(DiffcError, match=message):
        Checkpoint.load(tmp_path / "c")


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
