"""The fingerprint of weights: what it sees, and what it does not depend on."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffc.models.sources import fingerprint
from diffc.models.sources.fingerprint import hash_weights
from diffc.models.sources.safetensors_files import file_weights
from passes.weights.recipe import Recipe


def arrays(seed: int = 4) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(3000).astype(np.float32) for name in ("a", "b", "c")}


def weights_in(folder: Path, values: dict[str, Any]) -> dict[str, Recipe]:
    """Weights in two files, the second always the same."""
    folder.mkdir(exist_ok=True)
    save_file(values, folder / "0.safetensors")
    save_file({"d": arrays(7)["a"]}, folder / "1.safetensors")
    return file_weights(folder / "0.safetensors") | file_weights(folder / "1.safetensors")


@pytest.fixture(params=[True, False], ids=["whole files", "blocks of large files"])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    return bool(request.param)


@pytest.mark.usefixtures("whole")
def test_every_tensor_counts_and_neither_order_nor_folder_does(tmp_path: Path) -> None:
    weights = weights_in(tmp_path / "x", arrays())
    before = hash_weights(weights)
    assert before == hash_weights(dict(reversed(weights.items())))
    assert before != hash_weights({"d": weights["d"]})
    for name, value in arrays().items():
        changed = arrays() | {name: value * np.float32(1.01)}  # as a fused LoRA changes one layer
        assert hash_weights(weights_in(tmp_path / "x", changed)) != before
    assert hash_weights(weights_in(tmp_path / "x", arrays())) == before
    shutil.move(tmp_path / "x", tmp_path / "y")
    assert hash_weights(weights_in(tmp_path / "y", arrays())) == before


@pytest.mark.usefixtures("whole")
def test_what_is_computed_from_the_files_counts(tmp_path: Path) -> None:
    weights = weights_in(tmp_path, arrays())
    before = hash_weights(weights)
    by = Recipe.of_array(np.float32([2.0]))
    other = Recipe.of_array(np.float32([3.0]))
    hashes = {hash_weights(weights | {"a": weights["a"].multiply(factor)}) for factor in (by, other)}
    assert len(hashes | {before}) == 3
    assert hash_weights(weights | {"a": weights["b"], "b": weights["a"]}) != before


def test_it_is_what_checkpoints_of_earlier_versions_hold(tmp_path: Path, whole: bool) -> None:
    """Their rule: of every file by name its size and, of small ones, all bytes; of others header and blocks."""
    weights = weights_in(tmp_path, arrays())
    digest = hashlib.sha256()
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        if whole:
            digest.update(content)
            continue
        start = 8 + int.from_bytes(content[:8], "little")
        digest.update(content[8:start])
        entries = json.loads(content[8:start])
        for begin, end in sorted(entry["data_offsets"] for entry in entries.values()):
            middle = start + max(begin, (begin + end - 4096) // 2)
            digest.update(content[middle : middle + min(4096, end - begin)])
    assert hash_weights(weights) == digest.hexdigest()
