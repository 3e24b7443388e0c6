"""passes/weights/lora/file.py: files, folders of PEFT and of diffusers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from passes.base import PassError
from passes.weights.lora.file import read_adapter
from tests.passes.weights.lora.files import factors, written


def test_a_folder_of_peft_has_its_settings_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "adapter_model.safetensors", factors("base_model.model.a", 4, 4))
    settings = {"lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {"b": 1}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    file = read_adapter(tmp_path)
    assert file.scale("base_model.model.a", None, 16) == 2.0
    assert file.scale("base_model.model.x.b", None, 16) == 0.25
    assert file.scale("base_model.model.a", 4.0, 16) == 1.0


def test_without_settings_or_alpha_the_scale_is_one(tmp_path: Path) -> None:
    file = read_adapter(written(tmp_path / "a.safetensors", factors("a", 4, 4)))
    assert file.scale("a", None, 3) == 1.0


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="no LoRA file"):
        read_adapter(tmp_path / "none.safetensors")
    (tmp_path / "a.bin").write_bytes(b"\x80\x02")
    with pytest.raises(PassError, match="pickle"):
        read_adapter(tmp_path / "a.bin")
    (tmp_path / "b.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(PassError, match=r"b\.safetensors"):
        read_adapter(tmp_path / "b.safetensors")
    (tmp_path / "many").mkdir()
    for name in ("x", "y"):
        written(tmp_path / "many" / f"{name}.safetensors", {"a.diff": np.ones(3)})
    with pytest.raises(PassError, match=r"x\.safetensors, y\.safetensors"):
        read_adapter(tmp_path / "many")
