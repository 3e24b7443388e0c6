"""The safetensors of a folder: which are taken, and one clear error for each way in which they are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.sources.backbone import FakeBackbone, check_weights
from diffc.models.sources.locate import locate
from diffc.models.sources.safetensors_files import file_weights, folder_weights
from passes.weights.evaluate import evaluate
from tests.models.sources.folders import FILE, KEYS, SHARDS, backbone, files_of, sharded, tensors


def test_recipes_give_what_was_written(tmp_path: Path) -> None:
    weights = file_weights(backbone(tmp_path) / FILE)
    assert list(weights) == list(KEYS)
    for name, array in tensors().items():
        np.testing.assert_array_equal(evaluate(weights[name]), array)


@pytest.mark.parametrize(
    "index",
    [
        FILE + ".index.json",
        FILE + ".index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "model.safetensors.index.json",
    ],
)
def test_shards(tmp_path: Path, index: str) -> None:
    folder = sharded(tmp_path, SHARDS, index)
    assert files_of(folder_weights(folder)) == {key: folder / name for key, name in SHARDS.items()}


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "flux-mine.safetensors"])
def test_another_name_serves_when_it_is_the_only_one(tmp_path: Path, name: str) -> None:
    assert set(files_of(folder_weights(backbone(tmp_path, weights=name))).values()) == {tmp_path / name}


def test_full_weights_come_before_the_variant(tmp_path: Path) -> None:
    backbone(tmp_path, weights="diffusion_pytorch_model.fp16.safetensors")
    backbone(tmp_path)
    assert set(files_of(folder_weights(tmp_path)).values()) == {tmp_path / FILE}


def test_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    repository = tmp_path / "models--acme--flux"
    folder = backbone(repository / "snapshots" / "0a1b" / "transformer", weights=None)
    (repository / "blobs").mkdir()
    save_file(tensors(), repository / "blobs" / "5f1e")
    (folder / "config.json").rename(repository / "blobs" / "9c0d")
    try:
        (folder / FILE).symlink_to(repository / "blobs" / "5f1e")
        (folder / "config.json").symlink_to(repository / "blobs" / "9c0d")
    except OSError:
        pytest.skip("this account may not make links")
    assert files_of(locate(str(folder)).weights) == dict.fromkeys(KEYS, folder / FILE)
    for name in (FILE, "config.json"):
        target = (folder / name).resolve()
        target.rename(tmp_path / name)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(DiffcError, match="leaves the folder: a link leads out"):
            locate(str(folder))
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


def test_pickled_weights_only(tmp_path: Path) -> None:
    (backbone(tmp_path, weights=None) / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(
        DiffcError, match=r"pickled weights only[\s\S]*FluxTransformer2DModel as M; M.from_pretrained"
    ):
        folder_weights(tmp_path)


def test_no_choice_between_files(tmp_path: Path) -> None:
    backbone(tmp_path, weights="a.safetensors")
    backbone(tmp_path, weights="b.safetensors")
    with pytest.raises(DiffcError, match=r"could be the weights: a\.safetensors, b\.safetensors"):
        folder_weights(tmp_path)


def test_shard_without_its_index(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match=r"shards need their index\.json"):
        folder_weights(backbone(tmp_path, weights="m-00001-of-00002.safetensors"))


@pytest.mark.parametrize("keep", [0, 5, 8, 20, -1, -100])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    """Cut within the length, the header and the data. `keep` below 0 counts from the end."""
    path = backbone(tmp_path) / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    actual = len(whole[:keep])
    header = 8 + int.from_bytes(whole[:8], "little")
    expected = 8 if actual < 8 else header if actual < header else len(whole)
    with pytest.raises(DiffcError) as caught:
        folder_weights(tmp_path)
    assert f"{path} is truncated: {actual} bytes, expected {expected}" in str(caught.value)


def test_truncated_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path, SHARDS) / SHARDS["c.bias"]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DiffcError, match=r"m-00002-of-00002\.safetensors is truncated"):
        folder_weights(tmp_path)


def test_bytes_after_the_end(tmp_path: Path) -> None:
    path = backbone(tmp_path) / FILE
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DiffcError, match="is damaged"):
        folder_weights(tmp_path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = backbone(tmp_path) / FILE
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    with pytest.raises(DiffcError, match=r"Git LFS pointer[\s\S]*git lfs pull"):
        folder_weights(tmp_path)


def test_no_safetensors_inside(tmp_path: Path) -> None:
    (backbone(tmp_path) / FILE).write_bytes(np.random.default_rng(4).bytes(5000))
    with pytest.raises(DiffcError, match="is not a safetensors file"):
        folder_weights(tmp_path)


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": {"dtype": "F16"}}', b'{"a": 3}'])
def test_header_that_does_not_parse(tmp_path: Path, header: bytes) -> None:
    (backbone(tmp_path) / FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DiffcError, match="safetensors header"):
        folder_weights(tmp_path)


def test_header_that_lies_about_a_shape(tmp_path: Path) -> None:
    path = backbone(tmp_path) / FILE
    path.write_bytes(path.read_bytes().replace(b"[4,6]", b"[4,9]", 1))
    with pytest.raises(DiffcError, match="bytes do not hold"):
        folder_weights(tmp_path)


def test_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, backbone(tmp_path) / FILE)
    with pytest.raises(DiffcError, match="holds no tensors"):
        folder_weights(tmp_path)


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/m.safetensors", "C:\\m.safetensors", "a\\..\\..\\m", "a/../../m"]
)
def test_index_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DiffcError, match="leaves the folder"):
        folder_weights(sharded(tmp_path, SHARDS | {"c.bias": name}))


def test_index_of_a_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path, SHARDS)
    (folder / SHARDS["c.bias"]).unlink()
    with pytest.raises(DiffcError, match=r"does not have: m-00002-of-00002\.safetensors"):
        folder_weights(folder)


def test_index_of_a_tensor_that_is_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match=r"holds 'a\.weight', which it does not"):
        folder_weights(sharded(tmp_path, SHARDS | {"a.weight": SHARDS["c.bias"]}))


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": ["a"]}])
def test_index_without_a_map(tmp_path: Path, content: dict[str, Any]) -> None:
    (backbone(tmp_path) / (FILE + ".index.json")).write_text(json.dumps(content))
    with pytest.raises(DiffcError, match="has no weight_map"):
        folder_weights(tmp_path)


def test_integers_where_floats_belong(tmp_path: Path) -> None:
    """Weights of int16 passed every check before the work (F16g)."""
    folder = Path(shutil.copytree(materialize("tiny-sd3") / "transformer", tmp_path / "transformer"))
    (file,) = folder.glob("*.safetensors")
    arrays = load_file(file)
    name = next(name for name in arrays if name.endswith("attn.to_q.weight"))
    save_file({**arrays, name: arrays[name].astype(np.int16)}, file)
    with pytest.raises(DiffcError, match=rf"{name}' holds int16 values[\s\S]*Fix: "):
        check_weights(FakeBackbone(locate(str(folder)), "float16"))
