"""A compile that takes over another's graph has the bytes of a compile of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffc.artifact.folder import MANIFEST, RUN
from diffc.compile.plan import check
from diffc.compile.recorded import Recorded
from diffc.compile.request import CompileRequest
from diffc.compile.siblings import compile_for_others
from diffc.compile.spine import compile_plan
from diffc.errors import UsageError
from diffc.progress import Silent
from diffc.sweep.store import SharedCalibrations, Store

REQUEST = {"format": "int8", "steps": 1, "calib_size": 1, "image_size": 64, "skip_validation": True}


def contents(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names if not p.match(RUN)}


@pytest.mark.compiles
def test_an_artifact_of_another_place_and_a_calibration_that_is_lent(tmp_path: Path) -> None:
    request = CompileRequest("tiny-sd3", tmp_path / "one", **REQUEST)  # type: ignore[arg-type]
    shared = SharedCalibrations(Store((tmp_path / "store").as_uri()))
    made, result = compile_plan(check(request), Recorded(Silent()), shared)
    other = replace(request, output=tmp_path / "other")
    compile_for_others(made, request.output, other, Silent())
    assert contents(other.output) == contents(request.output)
    result.artifact.verify()
    with pytest.raises(UsageError, match="differ in more than their GPUs"):
        compile_for_others(made, request.output, replace(other, seed=3), Silent())
    for folder in (tmp_path / "store/.calibrations").iterdir():
        for file in folder.iterdir():
            assert file.read_bytes() == (request.output / "checkpoint" / file.name).read_bytes()
    assert json.loads((other.output / MANIFEST).read_text(encoding="utf-8"))["request"]["steps"] == 1
