"""An ONNX file whose interface is a family's runs in that family's pipelines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffc
from diffc.cli.main import run
from diffc.compile.import_onnx import import_result
from diffc.compile.onnx_model import compile_onnx
from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import find_family
from diffc.models.spec import Shape
from diffc.progress import Silent
from diffc.runtime.module import CompiledBackbone
from passes.presets import IMPORT_FILE
from passes.storage import save
from tests.cli_helpers import Capture, refusal
from tests.compile.foreign import disguise
from tests.conftest import Cell, Cells

OWN = {"targets": ("ort",), "sms": (), "dtype": "float32", "skip_validation": True}


@dataclass(frozen=True)
class Foreign:
    """An artifact of diffc's own, and one that was compiled from its graph under the names of another tool."""

    own: Cell
    file: Path
    folder: Path


@pytest.fixture(scope="module")
def foreign(compiled: Cells, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    own = compiled("digits-sd3", "none", **OWN)
    folder = tmp_path_factory.mktemp("foreign")
    file, output = folder / "model.onnx", folder / "artifact"
    disguise(own.folder / "model.onnx", file, "sd3")
    compile_onnx(CompileRequest(str(file), output), Silent())
    return Foreign(own, file, output)


def called(module: CompiledBackbone, shape: Shape) -> Any:
    spec = find_family("sd3")
    values = random_inputs(spec, module.config, shape, dtype=torch.float32, seed=5)
    return module(**forward_kwargs(spec, module.config, values), return_dict=False)[0].numpy()


def test_the_manifest_knows_the_family_and_the_files_own_names(foreign: Foreign) -> None:
    manifest = json.loads((foreign.folder / "manifest.json").read_text("utf-8"))
    own = foreign.own.artifact.manifest["model"]["config"]
    found = manifest["model"]["config"]
    widths = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "patch_size")
    assert {name: found[name] for name in widths} == {name: own[name] for name in widths}
    assert manifest["model"]["family"] == "sd3"
    assert manifest["interface"]["outputs"] == {"out_hidden_states": "sample"}
    assert manifest["interface"]["dims"]["steps"] == "batch"
    assert [value["name"] for value in manifest["outputs"]] == ["sample"]


def test_it_computes_what_the_artifact_of_diffc_computes(foreign: Foreign) -> None:
    with diffc.load(foreign.own.folder) as own, diffc.load(foreign.folder, config=own.config) as module:
        for shape in (Shape(1, 64, 64, 8), Shape(3, 64, 96, 20)):
            np.testing.assert_allclose(called(module, shape), called(own, shape), rtol=1e-4, atol=1e-5)
        one = torch.tensor(500.0)  # a number for all images, as the UNet's pipelines give it
        values = random_inputs(
            find_family("sd3"), own.config, Shape(2, 64, 64, 8), dtype=torch.float32, seed=1
        )
        (same,) = module(**values | {"timestep": one}, return_dict=False)
        (each,) = module(**values | {"timestep": one.expand(2)}, return_dict=False)
        assert torch.equal(same, each)


@pytest.mark.slow
def test_generate_bench_and_validate_run_it(foreign: Foreign, tmp_path: Path, capsys: Capture) -> None:
    folder, pipeline = str(foreign.folder), str(materialize("digits-sd3"))
    picture = tmp_path / "seven.png"
    paint = ["generate", folder, "--prompt", "a handwritten seven", "--steps", "4", "-o", str(picture)]
    assert "--pipeline DIR" in refusal(paint, picture, capsys)
    assert run([*paint, "--pipeline", pipeline, "--compare", str(foreign.own.folder), "--json", "-"]) == 0
    first, second = json.loads(capsys.readouterr().out)["pictures"]
    assert max(first["psnr"] or 0, second["psnr"] or 0) > 60  # dB: they are the same picture
    shape = ["--shape", "batch=2,height=64,width=64,text=8"]
    assert run(["bench", folder, *shape, "--repeat", "2"]) == 0
    assert "without --model DIR there is no torch model" in capsys.readouterr().err
    assert "where its torch model is" in refusal(
        ["bench", folder, "--against", "eager"], tmp_path / "x", capsys
    )
    assert run(["validate", folder, "--against", str(foreign.file)]) == 0


def test_what_import_writes_opens_with_default_options(compiled: Cells, tmp_path: Path) -> None:
    """FP8 that is sliced is what ONNX Runtime's default optimizations make an invalid graph of."""
    import onnxruntime

    source = compiled("tiny-sd3", "fp8").folder / "model.onnx"
    result = import_result(source, check_numbers=False, steps=IMPORT_FILE, ui=Silent())
    save(result.model, tmp_path / "imported.onnx")
    path = str(tmp_path / "imported.onnx")
    assert onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()


def test_a_pipeline_of_other_widths_is_refused(foreign: Foreign) -> None:
    config = json.loads((materialize("digits-sd3") / "transformer" / "config.json").read_text("utf-8"))
    with pytest.raises(DiffcError, match=r"encoder_hidden_states is .*4096"):
        diffc.load(foreign.folder, config=config | {"joint_attention_dim": 4096})
