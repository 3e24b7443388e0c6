"""GGUF files to the published layout: what is in them, where it lies, and what damage says."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffc.errors import DiffcError
from diffc.models.single.files import read_file
from diffc.models.single.gguf import gguf_tensors
from diffc.models.sources.locate import locate
from diffc.tensors import tensor_of
from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.gguf_blocks import BLOCKS
from tests.models.single.releases import released

KINDS = {"F32": (0, np.dtype("<f4")), "F16": (1, np.dtype("<f2"))}
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def write(path: Path, tensors: Tensors, version: int = 3) -> Path:
    """A file with one key of each sort; `tensors` are kind, shape and bytes by name."""
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("flux")]
    pairs += [text("a.list") + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 7, 8)]
    pairs += [text("a.number") + struct.pack("<If", 6, 0.5)]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs)
    body = b""
    for name, (kind, shape, data) in tensors.items():
        body += b"\0" * (-len(body) % 32)
        number = KINDS[kind][0] if kind in KINDS else BLOCKS[kind].number
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", number, len(body))
        body += data
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def q4_0(values: Any) -> bytes:
    """ggml's quantize_row_q4_0: the value of the largest magnitude becomes -8."""
    blocks = np.asarray(values, np.float32).reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = (largest / -8).astype(np.float16)
    inverse = np.divide(1, scale, where=scale != 0, out=np.zeros_like(scale)).astype(np.float32)
    codes = np.clip(blocks * inverse + 8.5, 0, 15).astype(np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate((scale.view(np.uint8), packed), axis=1).tobytes()


RNG = np.random.default_rng(2)
MATRIX = RNG.normal(size=(6, 64)).astype(np.float32)


@pytest.fixture
def tensors() -> Tensors:
    return {
        "a.weight": ("Q4_0", MATRIX.shape, q4_0(MATRIX)),
        "a.bias": ("F32", (6,), MATRIX[:, 0].tobytes()),
        "b.weight": ("F16", (64, 6), MATRIX.T.astype(np.float16).tobytes()),
        "c.weight": ("Q8_0", (1, 32), RNG.integers(0, 60, 34, dtype=np.uint8).tobytes()),
    }


def test_tensors_have_their_shapes_and_values(tensors: Tensors, tmp_path: Path) -> None:
    found, pairs, kinds = gguf_tensors(write(tmp_path / "a.gguf", tensors))
    assert {name: recipe.shape for name, recipe in found.items()} == {
        n: s for n, (_, s, _) in tensors.items()
    }
    assert pairs == {"general.architecture": "flux", "a.list": "[7, 8]", "a.number": "0.5"}
    assert kinds == {"a.weight": "Q4_0", "c.weight": "Q8_0"}
    np.testing.assert_array_equal(evaluate(found["a.bias"]), MATRIX[:, 0])
    np.testing.assert_array_equal(evaluate(found["b.weight"]), MATRIX.T.astype(np.float16))
    scales = np.abs(MATRIX.reshape(-1, 32)).max(1) / 8
    error = np.abs(evaluate(found["a.weight"]) - MATRIX).reshape(-1, 32) / scales[:, None]
    assert error.max() <= 1.01  # a step at the far end, half of one elsewhere


@pytest.mark.parametrize("cut", [3, 20, 60, 200])
def test_a_file_that_is_cut_off_is_an_error(cut: int, tensors: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tensors)
    path.write_bytes(path.read_bytes()[:-cut] if cut < 40 else path.read_bytes()[:cut])
    with pytest.raises(DiffcError, match=r"cut off|damaged|not a GGUF"):
        read_file(path)


def test_an_older_version_and_a_block_type_of_tomorrow(tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="version 1"):
        gguf_tensors(write(tmp_path / "old.gguf", tensors, version=1))
    path = write(tmp_path / "a.gguf", {"x.weight": ("F32", (2, 2), bytes(16))})
    content = path.read_bytes()
    at = content.index(b"x.weight") + 8 + 4 + 16
    path.write_bytes(content[:at] + struct.pack("<I", 99) + content[at + 4 :])
    with pytest.raises(PassError, match="block type 99"):
        gguf_tensors(path)


def test_a_language_model_is_refused_by_its_name(tensors: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tensors)
    path.write_bytes(path.read_bytes().replace(text("flux"), text("bert")))
    with pytest.raises(DiffcError, match="calls its model 'bert', and its tensors are of no backbone"):
        locate(str(path))


def of_four_bits() -> Tensors:
    """tiny-flux with the matrices of its blocks in Q4_0."""
    made: Tensors = {}
    for name, tensor in released("tiny-flux")[0].items():
        values = tensor.float().numpy()
        matrix = values.ndim == 2 and "blocks" in name
        kind, data = ("Q4_0", q4_0(values)) if matrix else ("F32", values.tobytes())
        made[name] = (kind, values.shape, data)
    return made


def test_a_model_of_q4_0_keeps_its_codes(tmp_path: Path) -> None:
    made = of_four_bits()
    source = locate(str(write(tmp_path / "flux.gguf", made)))
    assert source.dtype == "bfloat16"
    assert {layer.kind for layer in source.held.values()} == {"int4"}
    # Rows of a joined layer: the values of the whole, cut.
    name = "double_blocks.1.img_attn.qkv.weight"
    whole = (
        BLOCKS["Q4_0"].values(np.frombuffer(made[name][2], np.uint8).reshape(-1, 18)).reshape(made[name][1])
    )
    key = tensor_of(source.held["transformer_blocks.1.attn.to_k"].weight).numpy()
    np.testing.assert_array_equal(key, whole[len(whole) // 3 : 2 * len(whole) // 3])
    assert source.held["transformer_blocks.1.attn.to_k"].weight.source.length * 3 == len(made[name][2])


def lists(depth: int) -> bytes:
    """A key whose value is a list in a list, and so on."""
    return text("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 7, 0)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([lists(3000)], "lists deep"),
        ([text("general.alignment") + struct.pack("<I", 8) + text("x")], "its alignment is 'x'"),
        ([text("general.alignment") + struct.pack("<Ii", 5, -8)], "its alignment is '-8'"),
        ([struct.pack("<Q", 1 << 25) + b"short"], "of which"),
    ],
)
def test_a_header_that_lies(pairs: list[bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))
    with pytest.raises(PassError, match=said):
        gguf_tensors(path)
