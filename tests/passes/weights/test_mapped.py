"""Files that stay mapped, and values that are looked at once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from passes.base import PassError
from passes.weights import sources
from passes.weights.mapped import MappedFiles
from passes.weights.recipe import Array, Recipe
from passes.weights.sources import read, safetensors_tensors


def stored(folder: Path, **tensors: Array) -> dict[str, Recipe]:
    save_file(tensors, folder / "w.safetensors")
    return safetensors_tensors(folder / "w.safetensors")


def test_all_tensors_of_a_file_come_from_one_map(tmp_path: Path) -> None:
    expected = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.ones(5, np.float16),
        "c": np.zeros((0, 2), np.int8),
    }
    files = MappedFiles()
    found = {name: files.read(recipe.source) for name, recipe in stored(tmp_path, **expected).items()}
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    assert len(files._files) == 1
    assert files.read(Recipe.of_array(expected["a"]).source).tolist() == expected["a"].tolist()


def test_a_file_that_changed_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    check = sources.check_finite
    monkeypatch.setattr(sources, "check_finite", lambda a, s: (looked.append(s.key), check(a, s)))
    source = stored(tmp_path, w=np.ones(4))["w"].source
    for _ in range(2):
        read(source)
    MappedFiles().read(source)
    assert looked == ["w"]
    stored(tmp_path, w=np.array([1.0, 1.0, np.nan, 1.0]))
    stat = Path(source.path).stat()
    os.utime(source.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    for reads in (read, MappedFiles().read):
        with pytest.raises(PassError, match=r"'w' of .* holds NaN"):
            reads(source)


def test_a_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    source = stored(tmp_path, w=np.ones(4))["w"].source
    os.truncate(source.path, source.offset + 8)
    with pytest.raises(PassError, match="is missing or cut off: tensor 'w'"):
        MappedFiles().read(source)
