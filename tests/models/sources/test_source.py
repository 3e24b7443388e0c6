"""What a source says of its weights without reading them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffc.models.registry import FAMILIES
from diffc.models.sources.fingerprint import hash_weights
from diffc.models.sources.safetensors_files import file_weights
from diffc.models.sources.source import ModelSource
from passes.weights import sources


def source_of(path: Path, *types: type) -> ModelSource:
    generator = np.random.default_rng(2)
    tensors = {f"t{i}": generator.standard_normal((2, i + 1)).astype(kind) for i, kind in enumerate(types)}
    save_file(tensors, path)
    return ModelSource("x", path, None, {}, FAMILIES["flux"], file_weights(path))


def test_the_type_is_that_of_most_tensors(tmp_path: Path) -> None:
    half, single = np.float16, np.float32
    assert source_of(tmp_path / "a", half, single, half).dtype == "float16"
    assert source_of(tmp_path / "b", single, half, single).dtype == "float32"
    assert source_of(tmp_path / "c", np.int8, np.int8, half).dtype == "float32"


def test_it_is_described_without_reading_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "read", lambda _: pytest.fail("a weight was read"))
    source = source_of(tmp_path / "a", np.float32, np.float32, np.float32)
    assert source.parameters == 2 * (1 + 2 + 3)
    assert source.fingerprint == hash_weights(source.weights)
