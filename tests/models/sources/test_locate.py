"""What MODEL can be, and one clear error for everything that it can not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.sources.locate import locate

FLUX = {"_class_name": "FluxTransformer2DModel", "num_layers": 1}
KEYS = ("a.weight", "b.weight", "c.bias")
FILE = "diffusion_pytorch_model.safetensors"


def tensors(keys: tuple[str, ...] = KEYS) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    return {key: generator.standard_normal((4, 6)).astype(np.float16) for key in keys}


def backbone(folder: Path, config: dict[str, Any] | None = None, weights: str | None = FILE) -> Path:
    """A small backbone folder; `weights` None leaves them out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FLUX if config is None else config))
    if weights:
        save_file(tensors(), folder / weights)
    return folder


def sharded(folder: Path, weight_map: dict[str, str], index: str = FILE + ".index.json") -> Path:
    """A backbone of two shards: the first holds KEYS[:2], the second the rest."""
    backbone(folder, weights=None)
    save_file(tensors(KEYS[:2]), folder / "m-00001-of-00002.safetensors")
    save_file(tensors(KEYS[2:]), folder / "m-00002-of-00002.safetensors")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


SHARDS = dict(zip(KEYS, ["m-00001-of-00002.safetensors"] * 2 + ["m-00002-of-00002.safetensors"], strict=True))


def test_backbone_folder(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "mine")
    source = locate(str(folder))
    assert (source.name, source.pipeline_dir, source.backbone_dir) == ("mine", None, folder)
    assert (source.family, source.config) == ("flux", FLUX)
    assert source.weights == dict.fromkeys(KEYS, folder / FILE)


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone(tmp_path / "tiny-sd3")
    monkeypatch.chdir(tmp_path)
    source = locate("./tiny-sd3")  # a path, though the bare name is an embedded model
    assert source.backbone_dir == tmp_path / "tiny-sd3"
    assert source.family == "flux"


def test_embedded_name_and_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFC_CACHE", str(tmp_path))
    source = locate("tiny-sd35")
    assert (source.name, source.family) == ("tiny-sd35", "sd3")
    assert source.pipeline_dir is not None
    assert source.backbone_dir == source.pipeline_dir / "transformer"
    assert "transformer_blocks.0.attn2.norm_q.weight" in source.weights
    copy = shutil.copytree(source.pipeline_dir, tmp_path / "copy")
    assert locate(str(copy)).weights.keys() == source.weights.keys()
    assert locate(str(copy)).name == "copy"


def test_pipeline_with_a_unet(tmp_path: Path) -> None:
    backbone(tmp_path / "unet", {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"})
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer": [None, None]}))
    source = locate(str(tmp_path))
    assert (source.family, source.pipeline_dir, source.backbone_dir) == ("sdxl", tmp_path, tmp_path / "unet")


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
    assert locate(str(folder)).weights == {key: folder / name for key, name in SHARDS.items()}


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "flux-mine.safetensors"])
def test_another_name_serves_when_it_is_the_only_one(tmp_path: Path, name: str) -> None:
    assert set(locate(str(backbone(tmp_path, weights=name))).weights.values()) == {tmp_path / name}


def test_full_weights_come_before_the_variant(tmp_path: Path) -> None:
    backbone(tmp_path, weights="diffusion_pytorch_model.fp16.safetensors")
    backbone(tmp_path)
    assert set(locate(str(tmp_path)).weights.values()) == {tmp_path / FILE}


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
    assert locate(str(folder)).weights == dict.fromkeys(KEYS, folder / FILE)
    for name in (FILE, "config.json"):
        target = (folder / name).resolve()
        target.rename(tmp_path / name)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(DiffcError, match="leaves the folder: a link leads out"):
            locate(str(folder))
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


def test_unknown_name() -> None:
    with pytest.raises(DiffcError) as caught:
        locate("no/such-model")
    for part in (
        "no/such-model",
        "tiny-sd3, tiny-sd35, tiny-flux, tiny-sdxl",
        "model_index.json",
        "config.json",
    ):
        assert part in str(caught.value)


def test_folder_without_any_json(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match=r"neither model_index\.json nor config\.json"):
        locate(str(tmp_path))


def test_pipeline_without_a_backbone(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "WuerstchenPipeline", "prior": ["a", "b"]})
    )
    with pytest.raises(
        UnsupportedError, match="WuerstchenPipeline has none of the components transformer, unet"
    ):
        locate(str(tmp_path))


def test_pipeline_without_the_folder_of_its_backbone(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    with pytest.raises(DiffcError, match="names the component 'transformer'"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "QwenImageTransformer2DModel"}, "class QwenImageTransformer2DModel"),
        ({"_class_name": "UNet2DConditionModel", "addition_embed_type": None}, "addition_embed_type=None"),
        ({"_class_name": ["x"]}, r"class \['x'\]"),
        ({}, "class None"),
    ],
)
def test_unknown_class(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    known = r"Known: SD3Transformer2DModel \(sd3\), FluxTransformer2DModel \(flux\), UNet2DCond.* \(sdxl\)"
    with pytest.raises(UnsupportedError, match=f"{said}.*{known}"):
        locate(str(backbone(tmp_path, config)))


@pytest.mark.parametrize(
    ("text", "said"), [(b"{", "not valid JSON"), (b"[1]", "no JSON object"), (b"\xff\xfe{", "not valid JSON")]
)
def test_corrupt_config(tmp_path: Path, text: bytes, said: str) -> None:
    (backbone(tmp_path) / "config.json").write_bytes(text)
    with pytest.raises(DiffcError, match=said):
        locate(str(tmp_path))


def test_config_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    (tmp_path / "transformer" / "config.json").mkdir(parents=True)
    with pytest.raises(DiffcError, match=r"config\.json"):
        locate(str(tmp_path))


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="folder without weights"):
        locate(str(backbone(tmp_path, weights=None)))


def test_pickled_weights_only(tmp_path: Path) -> None:
    (backbone(tmp_path, weights=None) / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(
        DiffcError, match=r"pickled weights only[\s\S]*FluxTransformer2DModel as M; M.from_pretrained"
    ):
        locate(str(tmp_path))


def test_no_choice_between_files(tmp_path: Path) -> None:
    backbone(tmp_path, weights="a.safetensors")
    backbone(tmp_path, weights="b.safetensors")
    with pytest.raises(DiffcError, match=r"to take from a\.safetensors, b\.safetensors"):
        locate(str(tmp_path))


def test_shard_without_its_index(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match=r"shards need their index\.json"):
        locate(str(backbone(tmp_path, weights="m-00001-of-00002.safetensors")))


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
        locate(str(tmp_path))
    assert f"{path} is truncated: {actual} bytes, expected {expected}" in str(caught.value)


def test_truncated_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path, SHARDS) / SHARDS["c.bias"]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DiffcError, match=r"m-00002-of-00002\.safetensors is truncated"):
        locate(str(tmp_path))


def test_bytes_after_the_end(tmp_path: Path) -> None:
    path = backbone(tmp_path) / FILE
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DiffcError, match="is damaged"):
        locate(str(tmp_path))


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = backbone(tmp_path) / FILE
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    with pytest.raises(DiffcError, match=r"Git LFS pointer[\s\S]*git lfs pull"):
        locate(str(tmp_path))


def test_no_safetensors_inside(tmp_path: Path) -> None:
    (backbone(tmp_path) / FILE).write_bytes(np.random.default_rng(4).bytes(5000))
    with pytest.raises(DiffcError, match="is not a safetensors file"):
        locate(str(tmp_path))


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": {"dtype": "F16"}}', b'{"a": 3}'])
def test_header_that_does_not_parse(tmp_path: Path, header: bytes) -> None:
    (backbone(tmp_path) / FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DiffcError, match="header does not parse"):
        locate(str(tmp_path))


def test_header_that_lies_about_a_shape(tmp_path: Path) -> None:
    path = backbone(tmp_path) / FILE
    path.write_bytes(path.read_bytes().replace(b"[4,6]", b"[4,9]", 1))
    with pytest.raises(DiffcError, match="is damaged"):
        locate(str(tmp_path))


def test_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, backbone(tmp_path) / FILE)
    with pytest.raises(DiffcError, match="holds no tensors"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/m.safetensors", "C:\\m.safetensors", "a\\..\\..\\m", "a/../../m"]
)
def test_index_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DiffcError, match="leaves the folder"):
        locate(str(sharded(tmp_path, SHARDS | {"c.bias": name})))


def test_index_of_a_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path, SHARDS)
    (folder / SHARDS["c.bias"]).unlink()
    with pytest.raises(DiffcError, match=r"does not have: m-00002-of-00002\.safetensors"):
        locate(str(folder))


def test_index_of_a_tensor_that_is_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match=r"holds 'a\.weight', which it does not"):
        locate(str(sharded(tmp_path, SHARDS | {"a.weight": SHARDS["c.bias"]})))


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": ["a"]}])
def test_index_without_a_map(tmp_path: Path, content: dict[str, Any]) -> None:
    (backbone(tmp_path) / (FILE + ".index.json")).write_text(json.dumps(content))
    with pytest.raises(DiffcError, match="has no weight_map"):
        locate(str(tmp_path))


def test_import_is_light() -> None:
    code = (
        "import sys, diffc.models.sources.locate; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
