"""`diffc sweep` on the command line: what it would do, what it refuses, and how its options reach a cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffc.cli.main import run
from tests.cli_helpers import Capture, listing, refusal

SMALL = ("--steps", "2", "--calib-size", "2", "--image-size", "64")


def test_a_dry_run_lists_the_cells_and_writes_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(
        "model: tiny-sd3\nformat: [fp8, nvfp4]\nsm: [86, 89, 120]\nexclude: {format: nvfp4, sm: 86}\n", encoding="utf-8"
    )  # fmt: skip
    before = listing(tmp_path)
    line = ["sweep", "sweep.yaml", "--sm", "89", "120", "-o", "out", "--dry-run", *SMALL]
    assert run([*line, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["cell"], each["status"]) for each in found] == [
        ("tiny-sd3-fp8-sm89", "to do"),
        ("tiny-sd3-fp8-sm120", "to do"),
        ("tiny-sd3-nvfp4-sm89", "refused"),
        ("tiny-sd3-nvfp4-sm120", "to do"),
    ]
    assert all(1 << 30 < each["memory"] < 4 << 30 for each in found if each["status"] == "to do")
    assert listing(tmp_path) == before
    assert run(line) == 0
    text = capsys.readouterr().out
    assert "graph of tiny-sd3-fp8-sm89" in text
    assert "tiny-sd3-nvfp4-sm89: format 'nvfp4' was asked for, which needs SM120" in text


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        ((), "the sweep has no model", 2),
        (("--model", "tiny-sd3", "--format", "fp9"), "unknown format 'fp9'", 2),
        (("--model", "tiny-sd3", "--exclude", "speed=1"), "unknown axis of --exclude", 2),
        (("--model", "tiny-sd3", "--evaluate", "clip"), "unknown metric of --evaluate", 2),
        (("--model", "tiny-sd3", "--memory", "much"), "--memory is 'much'", 2),
        (("--model", "tiny-sd3", "--artifacts", "nosuch://x"), "cannot open the store nosuch://x", 1),
        (("--model", "tiny-sd3", "--calib-size", "0"), "Invalid value", 2),
        (("--model", "a.onnx"), "is no diffusers model", 2),
    ],
)
def test_what_is_wrong_with_every_cell_is_said_before_any_work(
    tmp_path: Path, capsys: Capture, arguments: tuple[str, ...], said: str, code: int
) -> None:
    line = ["sweep", *arguments, "-o", str(tmp_path / "out"), "--dry-run"]
    assert said in refusal(line, tmp_path, capsys, code)


def test_an_artifact_is_no_folder_of_a_sweep(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    line = ["sweep", "--model", "tiny-sd3", "-o", str(tmp_path), "--dry-run"]
    assert "is an artifact, not a folder of a sweep" in refusal(line, tmp_path, capsys, 2)
