"""What a training refuses before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffc.cli.main import run
from diffc.errors import DiffcError
from diffc.train.request import TrainRequest, check
from diffc.train.run import check_device


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "qta"}, "unknown method 'qta'. Known: qad, qat, lora-qad, lora-qat"),
        ({"format": "none"}, "rounds nothing that training could make up for"),
        ({"format": "int9"}, "unknown format"),
        ({"method": "qat"}, "--method qat needs --data"),
        ({"data": "somewhere"}, "--method qad learns from the unquantized backbone and takes no --data"),
        ({"method": "qat", "data": "not-there"}, "--data not-there is not a folder"),
        ({"steps": 0}, "--steps is 0"),
        ({"rate": 2.0}, "--lr is 2"),
        ({"ema": 1.0}, "--ema is 1"),
        ({"precision": "fp4"}, "unknown mixed precision"),
        ({"image_size": 60}, "does not fit sd3"),
    ],
)
def test_what_cannot_work_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    request = TrainRequest("tiny-sd3", tmp_path / "out", "nvfp4")
    with pytest.raises(DiffcError, match=message.replace(".", r"\.")):
        check(replace(request, **changed))
    assert not any(tmp_path.iterdir())


def test_the_key_is_of_what_decides_the_result(tmp_path: Path) -> None:
    plan = check(TrainRequest("tiny-sd3", tmp_path / "out", "nvfp4"))
    same = replace(plan, request=replace(plan.request, output=tmp_path / "other", force=True))
    assert same.key == plan.key
    assert replace(plan, request=replace(plan.request, seed=1)).key != plan.key
    assert plan.request.interval == 20


def test_the_command_checks_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"1")
    assert run(["train", "tiny-sd3", "--format", "nvfp4", "-o", str(tmp_path / "photos")]) == 1
    assert "is not a checkpoint" in capsys.readouterr().err
    assert run(["train", "tiny-sd3", "--format", "nvfp4", "--steps", "0", "-o", str(tmp_path / "x")]) == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"device": "cuda"}, "torch sees no GPU"), ({"precision": "fp16"}, "fp16 needs a GPU")],
)
def test_a_gpu_that_is_not_there_is_told(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DiffcError, match=message):
        check_device(replace(TrainRequest("tiny-sd3", tmp_path / "out", "nvfp4"), **changed))
