"""`diffc slim`: copies that a deployment needs, complete and hashed."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.artifact.folder import MANIFEST, Artifact, staging, write_manifest
from diffc.cli.main import run
from diffc.commands.slim import SlimRequest, slim
from diffc.errors import DiffcError
from tests.artifact.manifests import described

GRAPHS = {"model.onnx", "model.onnx_data", "model.ort.onnx"}
SM89 = {"engines/trt-rtx-sm89.engine", "engines/trt-rtx-sm89_ctx.onnx"}
SM120 = {"engines/trt-rtx-sm120.engine"}
PROOFS = {"validation/a.json", "checkpoint/checkpoint.json"}


def made(folder: Path, *, stripped: bool = False) -> Path:
    """An artifact for trt-rtx and ort, with engines for two GPUs."""
    weights = {"weights": "model.onnx"} if stripped else {}
    engines = [
        {
            "file": f"engines/trt-rtx-sm{sm}.engine",
            "target": "trt-rtx",
            "version": "1",
            "sms": [sm],
            **weights,
        }
        for sm in (89, 120)
    ]
    targets = {"trt-rtx": "model.onnx", "ort": "model.ort.onnx"}
    content = described(model={"name": "tiny"}, targets=targets, engines=engines)
    with staging(folder, force=False) as partial:
        for number, name in enumerate(sorted(GRAPHS | SM89 | SM120 | PROOFS)):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(bytes(range(100 + number)))
        write_manifest(partial, content, {})
    return folder


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}


@pytest.mark.parametrize(
    ("targets", "sms", "expected"),
    [
        ((), (), GRAPHS | SM89 | SM120),
        ((), (120,), GRAPHS | SM120),
        (("trt-rtx",), (), SM89 | SM120),
        (("trt-rtx",), (89,), SM89),
        (("ort",), (), {"model.ort.onnx", "model.onnx_data"}),
        (("ort", "trt-rtx"), (89,), {"model.ort.onnx", "model.onnx_data"} | SM89),
    ],
)
def test_a_copy_has_what_its_targets_run_and_loads(
    targets: tuple[str, ...], sms: tuple[int, ...], expected: set[str], tmp_path: Path
) -> None:
    folder = made(tmp_path / "whole")
    copy = slim(SlimRequest(folder, tmp_path / "slim", targets, sms))
    assert files(tmp_path / "slim") == expected
    assert set(copy.missing) == set(copy.manifest["left_out"]) == (GRAPHS | SM89 | SM120 | PROOFS) - expected
    copy.verify()
    for name in expected:
        assert (copy.folder / name).read_bytes() == (folder / name).read_bytes()
    whole = Artifact.load(folder).manifest
    assert {key: value for key, value in copy.manifest.items() if key != "left_out"} == whole
    again = slim(SlimRequest(tmp_path / "slim", tmp_path / "again"))
    assert files(again.folder) == expected


def test_an_engine_without_weights_keeps_the_model_that_has_them(tmp_path: Path) -> None:
    slim(SlimRequest(made(tmp_path / "whole", stripped=True), tmp_path / "slim", ("trt-rtx",), (89,)))
    assert files(tmp_path / "slim") == SM89 | {"model.onnx", "model.onnx_data"}


@pytest.mark.parametrize(
    ("targets", "sms", "message"),
    [
        (("rtx",), (), "unknown target 'rtx'"),
        (("tensorrt",), (), "was compiled for ort, trt-rtx, not for tensorrt"),
        ((), (75,), "has no engine for SM75"),
        (("trt-rtx",), (89, 75), "has no engine for SM75"),
    ],
)
def test_what_the_artifact_does_not_have_is_refused(
    targets: tuple[str, ...], sms: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "whole")
    with pytest.raises(DiffcError, match=message):
        slim(SlimRequest(folder, tmp_path / "slim", targets, sms))
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_a_changed_file_is_found_and_leaves_nothing(tmp_path: Path) -> None:
    folder = made(tmp_path / "whole")
    data = bytearray((folder / "model.onnx_data").read_bytes())
    data[7] ^= 1
    (folder / "model.onnx_data").write_bytes(data)
    with pytest.raises(DiffcError, match="was changed after the compile"):
        slim(SlimRequest(folder, tmp_path / "slim"))
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_a_file_left_out_is_needed_no_more_and_any_other_is(tmp_path: Path) -> None:
    copy = slim(SlimRequest(made(tmp_path / "whole"), tmp_path / "slim", ("ort",)))
    (copy.folder / "model.ort.onnx").unlink()
    with pytest.raises(DiffcError, match=r"model\.ort\.onnx is missing"):
        Artifact.load(copy.folder)


def test_the_command_says_what_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path / "whole")
    out = tmp_path / "slim"
    assert run(["slim", str(folder), "-o", str(out), "--target", "trt-rtx", "--sm", "120"]) == 0
    said = capsys.readouterr().out
    assert "engines/trt-rtx-sm120.engine" in said
    assert "Left out: 7 files" in said
    assert run(["slim", str(folder), "-o", str(out)]) == 1
    assert "--force" in capsys.readouterr().err
