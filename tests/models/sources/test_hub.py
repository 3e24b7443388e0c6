"""Models of the Hugging Face hub, from a cache whose layout is made here and from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from diffc.errors import DiffcError, UsageError
from diffc.models.embedded.catalogue import materialize
from diffc.models.sources.components import check_components
from diffc.models.sources.hub import needed_files, pinned
from diffc.models.sources.hub_cache import identity, snapshot
from diffc.models.sources.locate import locate, locate_again
from diffc.models.sources.source import HubOptions
from tests.models.sources.hub_server import COMMIT, serving

COMMITS = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef")
NAME = "acme/tiny"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def in_cache(cache: Path, commit: str, model: str = "tiny-sd3", *, variant: str = "") -> Path:
    """The repository folder of `NAME` in a hub cache, with one more snapshot; files are links to blobs."""
    repository = cache / "models--acme--tiny"
    for folder in ("refs", "blobs"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    source = materialize(model)
    for file in source.rglob("*"):
        if file.is_file():
            name = file.relative_to(source).as_posix()
            if variant:
                name = name.replace(".safetensors", f".{variant}.safetensors")
            content = file.read_bytes()
            blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = repository / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(blob)
            except OSError:  # an account of Windows that may not make links: the hub's library copies, too
                link.write_bytes(content)
    return repository


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_an_id_is_found_in_the_cache(tmp_path: Path, variant: str) -> None:
    repository = in_cache(tmp_path, COMMITS[0], variant=variant)
    source = locate(NAME, HubOptions(cache_dir=tmp_path))
    assert (source.name, source.revision, source.variant) == (NAME, COMMITS[0], variant or None)
    assert source.pipeline_dir == repository / "snapshots" / COMMITS[0]
    assert source.weights.keys() == locate("tiny-sd3").weights.keys()
    check_components(source)


def test_folders_of_the_cache_are_taken_under_the_id(tmp_path: Path) -> None:
    repository = in_cache(tmp_path, COMMITS[0])
    for folder in (repository, repository / "snapshots" / COMMITS[0]):
        source = locate(str(folder))
        assert (source.name, source.revision) == (NAME, COMMITS[0])
    backbone = locate(str(repository), HubOptions(subfolder="transformer"))
    assert (backbone.name, backbone.pipeline_dir, backbone.path.name) == (NAME, None, "transformer")


def test_a_revision_chooses_the_snapshot(tmp_path: Path) -> None:
    repository = in_cache(tmp_path, COMMITS[0], "tiny-sd3")
    in_cache(tmp_path, COMMITS[1], "tiny-flux")
    (repository / "refs" / "v1").write_text(COMMITS[0])
    for revision, family in ((None, "flux"), ("main", "flux"), ("v1", "sd3"), (COMMITS[0], "sd3")):
        assert locate(NAME, HubOptions(revision, cache_dir=tmp_path)).family.name == family
    with pytest.raises(
        DiffcError, match=r"acme/tiny at revision v2 is not a folder here and not in the cache"
    ):
        locate(NAME, HubOptions("v2", cache_dir=tmp_path))


def test_an_artifact_finds_its_commit_again(tmp_path: Path) -> None:
    in_cache(tmp_path / "cache", COMMITS[0], "tiny-sd3")
    options = HubOptions(cache_dir=tmp_path / "cache", token="hf_secret")
    source = locate(NAME, options)
    request = {"model": NAME, "hub": pinned(options, source).to_json()}
    manifest = json.loads(json.dumps({"request": request, "model": {"name": NAME, "revision": COMMITS[0]}}))
    assert "hf_secret" not in json.dumps(manifest) + repr(options)
    in_cache(tmp_path / "cache", COMMITS[1], "tiny-flux")
    assert locate_again(manifest).family.name == "sd3"
    manifest["request"]["model"] = str(tmp_path / "gone")  # a folder of the cache that was moved
    assert locate_again(manifest).revision == COMMITS[0]


def test_an_id_that_is_not_cached_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(
        DiffcError, match=r"acme/tiny is not a folder here and not in the cache .*HF_HUB_OFFLINE"
    ):
        locate(NAME, HubOptions(cache_dir=tmp_path))


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    in_cache(tmp_path, COMMITS[0], variant="fp16")
    with pytest.raises(DiffcError, match=r"no weights of the variant 'bf16'; it has: fp16"):
        locate(NAME, HubOptions(variant="bf16", cache_dir=tmp_path))
    with pytest.raises(UsageError, match=r"--revision v1 is given, and .* is not of the Hugging Face hub"):
        locate("tiny-sd3", HubOptions("v1"))


def test_only_what_is_needed_is_taken() -> None:
    stem = "unet/diffusion_pytorch_model"
    plain = ["unet/config.json", f"{stem}.safetensors", "vae/config.json", "vae/model.safetensors"]
    fp16 = [f"{stem}.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    fp16 += [f"{stem}.safetensors.index.fp16.json", "vae/model.fp16.safetensors"]
    texts = ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/spiece.model"]
    never = [
        f"{stem}.bin",
        "unet/model.onnx",
        "unet/pytorch_model.bin.index.json",
        "sd_xl.safetensors",
        "README.md",
    ]
    never += [
        "vae_decoder/config.json",
        "unet/openvino/model.json",
        f"{stem}.ckpt",
        f"{stem}.non_ema.safetensors",
    ]
    files = [*plain, *fp16, *texts, *never]
    folders = ["unet", "vae", "tokenizer"]
    for seed in range(3):
        random.Random(seed).shuffle(files)
        assert set(needed_files(files, folders, None)) == {*plain, *texts}
        configs = {file for file in plain if file.endswith("config.json")}
        assert set(needed_files(files, folders, "fp16")) == {*fp16, *texts, *configs}
    below = [f"sub/{file}" for file in files]
    assert needed_files(below, ["sub/vae"], "fp16") == [f for f in below if f in ("sub/vae/config.json",)] + [
        "sub/vae/model.fp16.safetensors"
    ]


def test_one_snapshot_serves_where_no_branch_is_noted(tmp_path: Path) -> None:
    repository = in_cache(tmp_path, COMMITS[0])
    (repository / "refs" / "main").unlink()
    found = snapshot(repository, None)
    assert found is not None
    assert identity(found / "vae") == (NAME, COMMITS[0])
    (repository / "snapshots" / COMMITS[1]).mkdir()
    assert snapshot(repository, None) is None
    assert identity(tmp_path / "x") == ("x", None)


def test_a_download_takes_the_variant_and_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    source = materialize("tiny-sd3")
    paths = [path for path in source.rglob("*") if path.is_file()]
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
    weights = [name for name in files if name.endswith(".safetensors")]
    for name in weights:
        files[name.replace(".safetensors", ".fp16.safetensors")] = files[name]
        files[name.replace(".safetensors", ".bin")] = files["single.safetensors"] = b"never read"
    with serving(files) as (address, fetched):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        found = locate(NAME, HubOptions(variant="fp16", cache_dir=tmp_path))
        with pytest.raises(DiffcError, match=r"acme/absent is not a folder here .* RepositoryNotFoundError"):
            locate("acme/absent", HubOptions(cache_dir=tmp_path))
    check_components(found)
    assert (found.name, found.revision, found.variant) == (NAME, COMMIT, "fp16")
    assert not [name for name in fetched if name.endswith(".bin") or name in (*weights, "single.safetensors")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(NAME, HubOptions(cache_dir=tmp_path)).revision == COMMIT
