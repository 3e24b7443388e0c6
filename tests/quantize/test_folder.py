"""The folder of a checkpoint: written whole, and every damage named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffc.errors import DiffcError
from diffc.models.registry import FAMILIES
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import insert_quantizers
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


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return calibrated("flux", "int8")


@pytest.fixture(scope="module")
def checkpoint(flux: nn.Module) -> Checkpoint:
    calibration = {"prompts": ("a fox", "é"), "steps": 4, "seed": 7}
    return Checkpoint.from_backbone(flux, family="flux", format="int8", source="abc", calibration=calibration)


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
    with pytest.raises(DiffcError, match="is not a checkpoint"):
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
            "checkpoint.json is not valid JSON",
        ),
        (
            lambda c: (c / "checkpoint.json").write_text("[1]", encoding="utf-8"),
            "checkpoint.json is not a JSON object",
        ),
        (lambda c: change_record(c, schema=99), "has schema 99; this diffc reads schemas 1 and 2"),
        (lambda c: change_record(c, family=None), "damaged: .* missing required field `family`"),
        (
            lambda c: change_record(c, tensors_sha256=None),
            "damaged: .* missing required field `tensors_sha256`",
        ),
        (lambda c: change_record(c, settings={"x": {}}), r"damaged: .* `num_bits` - at `\$.settings"),
        (
            lambda c: change_record(c, settings={"x": 1}),
            r"damaged: Expected `object`, got `int` - at `\$.settings",
        ),
        (lambda c: change_record(c, settings={}), "damaged: checkpoint.json and .* disagree on"),
        (lambda c: drop_setting(c), "damaged: checkpoint.json and .* disagree on .*to_q"),
        (lambda c: rename_tensor(c, "to_q", "to_x"), "damaged: checkpoint.json and .* disagree on .*to_q"),
        (lambda c: rename_tensor(c, "to_q", None), "damaged: checkpoint.json and .* disagree on .*to_q"),
        (lambda c: (c / "quantizers.safetensors").unlink(), "no such file: .*quantizers.safetensors"),
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
