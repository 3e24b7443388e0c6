"""Cells before any work: refusals are rows with their one message, and equal calibrations have equal keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError
from diffc.sweep.cells import Axes
from diffc.sweep.prepare import Ready, finished, prepare
from diffc.sweep.request import SweepRequest
from diffc.sweep.rows import FAILED, REFUSED, Row
from tests.sweep.test_store import artifact


def sweep_of(folder: Path, axes: Axes, **settings: Any) -> SweepRequest:
    """A sweep of small compiles for `ort`."""
    base = CompileRequest("", folder, steps=2, calib_size=2, image_size=64)
    return SweepRequest(axes, base, folder, **settings)


def prepared(folder: Path, axes: Axes, **settings: Any) -> list[Ready | Row]:
    return prepare(sweep_of(folder, axes, **settings), axes.cells())


def test_a_format_that_a_gpu_lacks_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    axes = Axes(["tiny-sd3"], ["fp8", "nvfp4"], ["89", "120"])
    sweep = sweep_of(tmp_path, axes)
    sweep = replace(sweep, base=replace(sweep.base, targets=("ort", "trt-rtx")))
    fp8_89, fp8_120, row, nvfp4 = prepare(sweep, axes.cells())
    assert isinstance(row, Row)
    assert (row.cell, row.status, row.attempt) == ("tiny-sd3-nvfp4-sm89", REFUSED, 0)
    assert "needs SM120 or newer" in row.message
    assert isinstance(fp8_89, Ready)
    assert isinstance(fp8_120, Ready)
    assert isinstance(nvfp4, Ready)
    assert fp8_89.graph == fp8_120.graph != nvfp4.graph
    assert fp8_89.request.sms == (89,)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_fails_alone(tmp_path: Path) -> None:
    good, bad = prepared(tmp_path, Axes(["tiny-sd3", str(tmp_path / "nowhere")], ["none"]))
    assert isinstance(good, Ready)
    assert isinstance(bad, Row)
    assert bad.status == FAILED
    assert "nothing reads the model" in bad.message


def test_what_is_wrong_with_every_cell_is_said_once(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, Axes(["tiny-sd3"], ["none", "fp8"]))
    sweep = replace(sweep, base=replace(sweep.base, targets=("tpu",)))
    with pytest.raises(DiffcError, match="unknown target 'tpu'"):
        prepare(sweep, sweep.axes.cells())


def test_calibrations_are_shared_across_plans_and_not_across_formats_and_models(tmp_path: Path) -> None:
    axes = Axes(["tiny-sd3", "tiny-flux"], ["fp8", "int8"], cache_plans=["none", "deepcache"])
    keys = [each.calibration for each in prepared(tmp_path, axes) if isinstance(each, Ready)]
    assert len(keys) == 8
    assert all(keys)
    assert keys[0::2] == keys[1::2]
    assert len(set(keys)) == 4
    none, mx = prepared(tmp_path, Axes(["tiny-sd3"], ["none", "mxfp8"]))
    assert isinstance(none, Ready)
    assert isinstance(mx, Ready)
    assert (none.calibration, mx.calibration) == ("", "")


def test_other_prompts_are_another_calibration(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, Axes(["tiny-sd3"], ["fp8"]))
    other = replace(sweep, base=replace(sweep.base, calib_size=3))
    (one,), (two,) = (prepare(each, each.axes.cells()) for each in (sweep, other))
    assert isinstance(one, Ready)
    assert isinstance(two, Ready)
    assert one.calibration != two.calibration


def test_an_artifact_of_this_request_is_finished_and_another_is_not_replaced(tmp_path: Path) -> None:
    (ready,) = prepared(tmp_path, Axes(["tiny-sd3"], ["none"]))
    assert isinstance(ready, Ready)
    assert finished(ready, None) is None
    described = {"request": dict(ready.described), "model": {"name": "m", "fingerprint": ready.fingerprint}}
    folder = artifact(ready.request.output, **described)
    manifest = finished(ready, None)
    assert manifest is not None
    assert manifest["request"] == ready.described
    (folder / "model.onnx").write_bytes(b"Graph")  # the size is right, the hash is not
    assert finished(ready, None) is None
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "manifest.json").write_text(
        json.dumps(json.loads((folder / "manifest.json").read_text()) | {"request": {"seed": 4}}), encoding="utf-8"
    )  # fmt: skip
    with pytest.raises(DiffcError, match="was compiled from other options"):
        finished(ready, None)
    assert finished(replace(ready, request=replace(ready.request, force=True)), None) is None


def test_an_onnx_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="is no diffusers model"):
        prepared(tmp_path, Axes(["a.onnx"], ["none"]))
