"""Checkpoints as ModelOpt's scripts leave them, and what a compile samples with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffc.compile.calibration import modelopt_checkpoint
from diffc.compile.plan import check
from diffc.compile.quantize import pipeline_run
from diffc.compile.request import CompileRequest, request_key
from diffc.errors import DiffcError


def test_the_file_in_modelopts_folder_is_found(tmp_path: Path) -> None:
    """quantize.py --quantized-torch-ckpt-save-path X.pt makes the folder X.pt with a file for each backbone."""
    folder = tmp_path / "X.pt"
    folder.mkdir()
    assert modelopt_checkpoint(folder, "transformer") == folder  # empty: refused where it is read
    (folder / "notes.txt").touch()
    (folder / "backbone.pt").touch()
    assert modelopt_checkpoint(folder, "transformer") == folder / "backbone.pt"
    (folder / "vae.pt").touch()
    with pytest.raises(DiffcError, match=r"none is called transformer\.pt: backbone\.pt, vae\.pt"):
        modelopt_checkpoint(folder, "transformer")
    (folder / "transformer.pt").touch()
    assert modelopt_checkpoint(folder, "transformer") == folder / "transformer.pt"
    assert modelopt_checkpoint(folder / "vae.pt", "transformer") == folder / "vae.pt"
    (folder / "checkpoint.json").touch()
    assert modelopt_checkpoint(folder, "transformer") == folder


def test_settings_of_calibration_reach_the_pipeline_and_the_key(tmp_path: Path) -> None:
    request = CompileRequest("tiny-sd3", tmp_path / "out", format="fp8")
    usual = pipeline_run(check(request))
    assert (usual.steps, usual.guidance, usual.height, usual.negative_prompt) == (20, None, None, "")
    asked = replace(request, steps=3, guidance=0.0, negative_prompt="blurry", image_size=64, width=96)
    run = pipeline_run(check(asked))
    assert (run.steps, run.guidance, run.negative_prompt) == (3, 0.0, "blurry")
    assert (run.height, run.width) == (64, 96)
    keys = {
        request_key(r, []) for r in (request, asked, replace(asked, guidance=1.0), replace(asked, width=64))
    }
    assert len(keys) == 4
    with pytest.raises(DiffcError, match="width 33 px does not fit sd3"):
        check(replace(request, width=33))


def test_a_turbo_pipeline_is_sampled_as_it_is_meant_to_be(tmp_path: Path) -> None:
    import shutil

    from diffc.models.embedded.catalogue import materialize

    shutil.copytree(materialize("tiny-sdxl"), tmp_path / "model")
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    turbo = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    scheduler.write_text(json.dumps(turbo))
    plan = check(CompileRequest(tmp_path / "model", tmp_path / "out", format="fp8"))
    assert (plan.sampling.steps, plan.sampling.guidance, plan.runs_pipeline) == (4, 0.0, True)
    assert "trailing" in str(plan.sampling)
    plan = check(CompileRequest(tmp_path / "model", tmp_path / "out", format="fp8", steps=9))
    assert (plan.sampling.steps, plan.sampling.guidance, plan.sampling.why) == (9, 0.0, "")
