"""Sources: files that are mapped, numbers of four bits, and files that are not what they should be."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from safetensors.numpy import save_file

from passes.base import PassError
from passes.weights import sources
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe, Source
from passes.weights.sources import keep, np_dtype, onnx_dtype, read, safetensors_source, safetensors_tensors

RNG = np.random.default_rng(2)
TENSORS = {
    "a.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "a.bias": RNG.standard_normal(7).astype(np.float16),
    "n": np.array(3),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    return tmp_path / "w.safetensors"


def test_every_tensor_of_a_file(file: Path) -> None:
    found = safetensors_tensors(file)
    assert set(found) == set(TENSORS)
    for name, want in TENSORS.items():
        got = evaluate(found[name])
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert np.array_equal(got, want)
        assert safetensors_source(file, name) == found[name].source
    assert isinstance(read(found["a.weight"].source).base, np.memmap | np.ndarray)


def test_a_file_that_changed_is_read_again(file: Path) -> None:
    assert safetensors_source(file, "n").shape == ()
    save_file({"n": np.arange(4)}, file)
    assert safetensors_source(file, "n").shape == (4,)
    with pytest.raises(PassError, match=r"has no tensor 'a\.weight'"):
        safetensors_source(file, "a.weight")


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"abc", "is not a safetensors file, or is cut off"),
        (struct.pack("<Q", 1 << 40) + b"{}", "is not a safetensors file, or is cut off"),
        (struct.pack("<Q", 4) + b"{no}", "header is corrupt"),
        (struct.pack("<Q", 2) + b"[]", "it is not a JSON object"),
        (header(w={"dtype": "F32", "shape": [2]}), r"header is corrupt \(tensor 'w': it has no type"),
        (header(w={"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}), "unsupported type 'C64'"),
        (
            header(w={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + b"1234",
            "is cut off: tensor 'w' ends at",
        ),
    ],
)
def test_files_that_are_none(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(PassError, match=said):
        safetensors_source(path, "w")


def test_a_file_that_lost_bytes_after_its_header_was_read(file: Path) -> None:
    source = max((r.source for r in safetensors_tensors(file).values()), key=lambda s: s.offset + s.length)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PassError, match="is missing or cut off"):
        read(source)


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1])
@pytest.mark.parametrize("count", [6, 7])
def test_numbers_of_four_bits_lie_two_to_a_byte(kind: int, count: int, tmp_path: Path) -> None:
    """As ONNX packs them."""
    codes = RNG.integers(-8, 8, count) if kind == TensorProto.INT4 else RNG.integers(0, 16, count)
    if kind == TensorProto.FLOAT4E2M1:
        values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    else:
        values = codes.astype(np_dtype(kind))
    path = tmp_path / "w.bin"
    path.write_bytes(onnx.numpy_helper.from_array(values, "w").raw_data)
    got = read(Source("raw", str(path), kind, (count,), length=(count + 1) // 2))
    assert got.dtype == values.dtype
    assert np.array_equal(got.astype(np.float32), values.astype(np.float32))


def test_memory_and_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    array = RNG.standard_normal((2, 3)).astype(ml_dtypes.bfloat16)
    recipe = keep(array)
    assert read(recipe.source) is array
    assert keep(array.copy()).source == recipe.source  # by content
    inline = Recipe.of_array(array)
    assert np.array_equal(read(inline.source), array)
    monkeypatch.setattr(sources, "_MEMORY", {})
    with pytest.raises(PassError, match="the model was loaded in another process"):
        read(recipe.source)
    with pytest.raises(PassError, match=r"no reader for weights of kind 'tape'\. Known: raw, inline, memory"):
        read(Source("tape", "", 1, (1,)))


@pytest.mark.parametrize("dtype", [np.float32, np.int64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_types_of_onnx_and_numpy(dtype: Any) -> None:
    assert np_dtype(onnx_dtype(dtype)) == np.dtype(dtype)
