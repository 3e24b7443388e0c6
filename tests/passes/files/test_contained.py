"""What a file names lies in its own folder: by every system's rules, after following links, at every door."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import diffc
from diffc.artifact.folder import Artifact, write_manifest
from diffc.cli.main import run
from diffc.commands.package.copying import check_tree, copy_file, copy_tree
from diffc.commands.package.optimum import backbone
from diffc.commands.package.parts import find_parts
from diffc.errors import DiffcError
from passes.base import PassError
from passes.files.contained import contained, safe_name, why_outside
from tests.artifact.manifests import described
from tests.cli_helpers import Capture

OUTSIDE = (
    ("", "empty"),
    (".", "the folder itself"),
    ("./", "the folder itself"),
    (None, "not a text"),
    (7, "not a text"),
    (["a"], "not a text"),
    ("../a", r"\.\."),
    ("a/../../b", r"\.\."),
    ("a/..", r"\.\."),
    ("/etc/passwd", "absolute"),
    ("//server/share/a", "absolute"),
    ("\\\\server\\share\\a", "absolute"),
    ("\\a", "absolute"),
    ("a\\..\\..\\b", "backslash"),
    ("..\\a", "backslash"),
    ("C:a", "colon"),
    ("C:/a", "colon"),
    ("a:stream", "colon"),
    ("file:///etc/passwd", "colon"),
    ("a\0b", "control"),
    ("a\nb", "control"),
    ("a\x1b[2J", "control"),
    ("a\x9b2J", "control"),
    ("a\x7f", "control"),
    ("a\x9f", "control"),
    ("a\udc80", "control"),
    ("nul", "device"),
    ("NUL.txt", "device"),
    ("a/con", "device"),
    ("COM1.onnx", "device"),
    ("lpt9 .x", "device"),
    ("CONIN$", "device"),
    ("a.", "dot or a space"),
    ("a /b", "dot or a space"),
    ("...", "dot or a space"),
    ("x" * 5000, "too long"),
)
INSIDE = (
    "a",
    "a.onnx_data",
    "a/b/c.bin",
    "./a",
    "a//b",
    ".hidden",
    "käse",
    "a\xa0b",
    "console",
    "com10",
    "null",
    "a..b",
)


@pytest.mark.parametrize(("name", "reason"), OUTSIDE)
def test_names_that_leave_the_folder(name: object, reason: str, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=rf"(?s)^the model .* lies outside .*{reason}.*Fix: "):
        contained(tmp_path, name, what="the model")


@pytest.mark.parametrize("name", INSIDE)
def test_names_that_do_not(name: str, tmp_path: Path) -> None:
    assert contained(tmp_path, name) == tmp_path / name


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("this account may not make links")


def test_links_count_by_where_they_lead(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a").touch()
    (tmp_path / "out").touch()
    link(tmp_path / "in" / "good", tmp_path / "in" / "a")
    link(tmp_path / "in" / "bad", tmp_path / "out")
    link(tmp_path / "in" / "up", tmp_path)
    link(tmp_path / "in" / "loop", tmp_path / "in" / "loop")
    link(tmp_path / "here", tmp_path / "in")
    for folder in (tmp_path / "in", tmp_path / "here"):
        assert contained(folder, "good") == folder / "good"
        for name in ("bad", "up/out", "up", "loop"):
            assert why_outside(folder, name)


def test_the_hubs_cache_links_to_blobs_of_the_same_repository(tmp_path: Path) -> None:
    blobs = {name: tmp_path / f"models--{name}" / "blobs" / "5f1e" for name in ("acme--unet", "other--unet")}
    for blob in blobs.values():
        blob.parent.mkdir(parents=True)
        blob.touch()
    snapshot = tmp_path / "models--acme--unet" / "snapshots" / "0a1b"
    for folder in (snapshot, snapshot / "unet"):
        link(folder / "ours", blobs["acme--unet"])
        link(folder / "theirs", blobs["other--unet"])
        assert contained(folder, "ours", hub=True) == folder / "ours"
        assert why_outside(folder, "ours")
        assert why_outside(folder, "theirs", hub=True)
    link(tmp_path / "mine" / "ours", blobs["acme--unet"])
    assert why_outside(tmp_path / "mine", "ours", hub=True)


@pytest.mark.parametrize("folder", ["models--acme--unet/other/0a1b", "acme--unet/snapshots/0a1b"])
def test_a_folder_that_only_looks_like_the_hubs_cache(folder: str, tmp_path: Path) -> None:
    """Both names count: a folder called snapshots, in one that is called as a repository."""
    snapshot = tmp_path / folder
    blob = snapshot.parents[1] / "blobs" / "5f1e"
    blob.parent.mkdir(parents=True)
    blob.touch()
    link(snapshot / "w", blob)
    assert why_outside(snapshot, "w", hub=True)


@pytest.mark.parametrize("text", ["model", "model-trt-rtx", "b1-64x64-t8-smooth", "a.b_c"])
def test_safe_names_stay(text: str) -> None:
    assert safe_name(text) == text


@pytest.mark.parametrize(
    "text", ['x" + str(1) + "', "a b", "../a", "", "nul", "-rf", "$(id)", "a\nb", "a\udc80", "x" * 300]
)
def test_other_names_are_cleaned_and_stay_apart(text: str) -> None:
    clean = safe_name(text)
    assert clean.replace("-", "").replace("_", "").replace(".", "").isalnum()
    assert clean.isascii()
    assert clean[0] != "-"
    assert len(clean) <= 100
    assert not why_outside(Path(), clean)
    assert safe_name(f"{text}!") != clean


def graph(location: str, folder: Path) -> ModelProto:
    """y = x W, the data of W at `location`."""
    value = helper.make_tensor_value_info
    x, y = value("x", TensorProto.FLOAT, ["n", 64]), value("y", TensorProto.FLOAT, ["n", 64])
    weight = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[64, 64], data_location=1)
    weight.external_data.add(key="location", value=location)
    made = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, folder / "model.onnx")
    return model


def artifact(folder: Path, location: str = "model.onnx_data", **changed: Any) -> Path:
    """An artifact of `graph`, as far as it is looked at before anything runs."""
    folder.mkdir(parents=True, exist_ok=True)
    graph(location, folder)
    if not (folder / "model.onnx_data").is_symlink():
        (folder / "model.onnx_data").write_bytes(np.zeros((64, 64), np.float32).tobytes())
    content = described(
        targets={"ort": "model.onnx"},
        model={"name": "m", "family": "sd3", "config": {}},
        request={"model": "tiny-sd3"},
    )
    manifest = write_manifest(folder, content, {}) | changed
    if "more" in manifest:
        manifest["files"] |= manifest.pop("more")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def cached(file: str) -> dict[str, Any]:
    model = {"suffix": "", "files": {"ort": file}, "inputs": [], "outputs": []}
    return {"models": [model], "plan": {}}


EVIL: Mapping[str, dict[str, Any]] = {
    "target": {"targets": {"ort": "../other.onnx"}},
    "absolute target": {"targets": {"ort": "/etc/passwd"}},
    "unlisted target": {"targets": {"ort": "other.onnx"}},
    "file": {"more": {"../x": {"bytes": 1, "sha256": "0"}}},
    "engine": {"engines": [{"file": "..\\a.engine", "target": "trt-rtx", "version": "1", "sms": [89]}]},
    "unlisted engine": {"engines": [{"file": "a.engine", "target": "trt-rtx", "version": "1", "sms": [89]}]},
    "weights": {
        "engines": [
            {
                "file": "model.onnx",
                "target": "trt-rtx",
                "version": "1",
                "sms": [89],
                "weights": "../../a.onnx",
            }
        ]
    },
    "unlisted weights": {
        "engines": [
            {"file": "model.onnx", "target": "trt-rtx", "version": "1", "sms": [89], "weights": "a.onnx"}
        ]
    },
    "cache plan": {"cache": cached("C:a.onnx")},
    "unlisted in a cache plan": {"cache": cached("a.onnx")},
}
DOORS: Mapping[str, Callable[[str], list[str]]] = {
    "validate": lambda a: ["validate", a, "--against", "ort"],
    "package": lambda a: ["package", a, "-o", f"{a}-package"],
    "generate": lambda a: ["generate", a, "--prompt", "x", "-o", f"{a}.png"],
    "bench": lambda a: ["bench", a],
    "slim": lambda a: ["slim", a, "-o", f"{a}-slim"],
    "against": lambda a: ["validate", f"{a}-good", "--against", a],
}


@pytest.mark.parametrize("case", EVIL)
def test_every_door_refuses_what_the_manifest_may_not_name(
    case: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = artifact(tmp_path / "a", **EVIL[case])
    artifact(tmp_path / "a-good", format="as imported")
    expected = "lists no" if "unlisted" in case else "names a file outside the artifact"
    with pytest.raises(DiffcError, match=expected):
        diffc.load(folder)
    for door in DOORS.values():
        assert run(door(str(folder))) == 1
        assert expected in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"a", "a-good"}


def test_an_artifacts_file_may_be_no_link_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "private").write_bytes(bytes(64 * 64 * 4))
    link(tmp_path / "a" / "model.onnx_data", tmp_path / "private")
    with pytest.raises(DiffcError, match="a link leads out of the folder"):
        Artifact.load(artifact(tmp_path / "a"))


@pytest.mark.parametrize("location", ["../private", "../../victim", "/etc/passwd", "extra.bin"])
def test_a_package_holds_weights_of_the_artifact_only(location: str, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "artifacts" / "a", location)
    for name in ("artifacts/private", "victim", "artifacts/a/extra.bin"):
        (tmp_path / name).write_bytes(b"private")
    found = Artifact.load(folder)
    (tmp_path / "out").mkdir()
    with pytest.raises((DiffcError, PassError), match=r"lies outside|lists no extra\.bin"):
        backbone(found, found.model, tmp_path / "out" / "transformer", {})
    assert (tmp_path / "victim").read_bytes() == b"private"
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_package_of_an_honest_artifact(tmp_path: Path) -> None:
    found = Artifact.load(artifact(tmp_path / "a"))
    backbone(found, found.model, tmp_path / "unet", {})
    made = onnx.load(tmp_path / "unet" / "model.onnx")
    assert not numpy_helper.to_array(made.graph.initializer[0]).any()
    with pytest.raises(DiffcError, match=r"two files of the package would be config\.json"):
        copy_file(found.model, tmp_path / "unet" / "config.json")


def pipeline(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"tokenizer": ["transformers", "CLIPTokenizer"]}))
    return folder


def test_a_component_is_copied_with_links_inside_the_pipeline(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipe")
    link(folder / "tokenizer_2", folder / "tokenizer")
    link(folder / "tokenizer" / "merges.txt", folder / "model_index.json")
    for name in ("tokenizer", "tokenizer_2"):
        copy_tree(folder, name, tmp_path / "out")
        copied = tmp_path / "out" / name
        assert {p.name for p in copied.iterdir() if p.is_file() and not p.is_symlink()} == {
            "vocab.json",
            "merges.txt",
        }


@pytest.mark.parametrize("where", ["tokenizer/notes.txt", "tokenizer/sub", "tokenizer/loop"])
def test_a_link_brings_nothing_from_elsewhere_into_a_package(where: str, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipe")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").touch()
    targets = {"notes.txt": tmp_path / "private" / "key", "sub": tmp_path / "private", "loop": folder}
    link(folder / where, targets[Path(where).name])
    with pytest.raises(DiffcError, match="taken into a package"):
        copy_tree(folder, "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    link(folder / "vae", tmp_path / "private")
    with pytest.raises(DiffcError, match="a link leads out of the folder"):
        check_tree(folder, "vae")


def test_a_pipeline_in_the_hubs_cache_is_taken(tmp_path: Path) -> None:
    repository = tmp_path / "models--acme--sd"
    snapshot = pipeline(repository / "snapshots" / "0a1b")
    for number, file in enumerate(("model_index.json", "tokenizer/vocab.json")):
        blob = repository / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        (snapshot / file).rename(blob)
        link(snapshot / file, blob)
    parts = find_parts(Artifact(tmp_path, {}), None, snapshot)
    copy_tree(parts.folder, *parts.taken, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer" / "vocab.json").is_symlink()


def test_an_onnx_file_in_the_hubs_cache_is_read(tmp_path: Path) -> None:
    from passes.storage import load
    from passes.weights.evaluate import evaluate
    from passes.weights.recipe import Recipe

    repository = tmp_path / "models--acme--unet"
    snapshot, blobs = repository / "snapshots" / "0a1b", repository / "blobs"
    artifact(snapshot)
    blobs.mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        (snapshot / name).rename(blobs / name[::-1])
        link(snapshot / name, blobs / name[::-1])
    recipe = Recipe.of_tensor(load(snapshot / "model.onnx").graph.initializer[0])
    assert recipe is not None
    assert not evaluate(recipe).any()


def test_weights_beside_the_file_that_a_link_leads_to_are_read(tmp_path: Path) -> None:
    from passes.storage import load

    artifact(tmp_path / "real")
    link(tmp_path / "links" / "m.onnx", tmp_path / "real" / "model.onnx")
    assert load(tmp_path / "links" / "m.onnx").graph.initializer[0].name == "W"


def test_an_index_names_tokenizers_of_the_package_only(tmp_path: Path) -> None:
    """`tokenizer/../..` would have its configuration rewritten."""
    from diffc.commands.package.optimum import _index

    folder = pipeline(tmp_path / "pipe")
    config = json.dumps({"extra_special_tokens": ["<a>"]})
    (tmp_path / "tokenizer_config.json").write_text(config)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(config)
    index = json.loads((folder / "model_index.json").read_text()) | {"tokenizer/../..": ["transformers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    parts = find_parts(Artifact(tmp_path, {}), None, folder)
    (tmp_path / "out").mkdir()
    copy_tree(folder, "tokenizer", tmp_path / "out")
    _index(parts, tmp_path / "out")
    assert (tmp_path / "tokenizer_config.json").read_text() == config
    assert (
        "additional_special_tokens" in (tmp_path / "out" / "tokenizer" / "tokenizer_config.json").read_text()
    )
