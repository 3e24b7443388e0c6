"""diffc validate: what is run again, what a damaged artifact says, what cannot be compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffc.cli.main import run
from diffc.commands.validate import ValidateRequest, validate_artifact
from diffc.compile.spine import CompileRequest, compile_model
from diffc.validate.reports import UNROUNDED
from tests.cli_helpers import Capture, refusal
from tests.conftest import Cell, Cells
from tests.validate.damage import SMALL, damaged, scaled, validate
from tests.validate.test_modules import first


@pytest.fixture(scope="module")
def fp8(compiled: Cells) -> Cell:
    return compiled("tiny-sd3", "fp8")


def test_an_artifact_that_was_just_made_is_within_all_limits(fp8: Cell, capsys: Capture) -> None:
    arguments = ["validate", str(fp8.folder), "--shape", SMALL, "--seed", "3", "--seed", "4", "--bisect"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "ort against torch" in out
    models = len(list(fp8.folder.glob("model*.onnx")))  # ONNX Runtime takes another graph than TensorRT-RTX
    assert out.count("all within their limit") == 2 * models
    assert "FAILED" not in out


def test_a_changed_file_is_named_before_anything_runs(fp8: Cell, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(fp8.folder, tmp_path / "copy")
    with (copy / "model.onnx_data").open("r+b") as file:
        file.seek(70_000)
        byte = file.read(1)
        file.seek(70_000)
        file.write(bytes([byte[0] ^ 1]))
    error = refusal(["validate", str(copy)], copy, capsys)
    assert "model.onnx_data was changed after the compile" in error


def test_a_damaged_artifact_is_exit_code_3(fp8: Cell, tmp_path: Path, capsys: Capture) -> None:
    copy = damaged(fp8, tmp_path, scaled("transformer_blocks.1.ff.net.2.weight_quantizer.scale", 1.1))
    assert run(["validate", str(copy), "--shape", SMALL]) == 3
    said = capsys.readouterr()
    assert "FAILED" in said.out
    assert "output 'out_hidden_states'" in said.err
    assert "--bisect" in said.err
    assert run(["validate", str(copy), "--shape", SMALL, "--tolerance", "0.9"]) == 0


@pytest.mark.slow
def test_another_artifact_or_file_can_be_the_reference(fp8: Cell, tmp_path: Path) -> None:
    copy = damaged(fp8, tmp_path, scaled("transformer_blocks.1.ff.net.2.weight_quantizer.scale", 1.1))
    good = validate(fp8.folder, against=str(fp8.folder / "model.onnx"))
    assert all(r.passed and r.rows[0].rel_l2 == 0 for r in good.reports if r.arithmetic != "float16")
    bad = validate(copy, against=str(fp8.folder))
    assert first(bad) == "transformer_blocks.1.ff.net.2"
    damaged_model = [r for r in bad.reports if r.model == "model.onnx" and r.arithmetic == UNROUNDED]
    assert damaged_model
    assert not any(r.passed for r in damaged_model)


def test_what_came_from_a_file_is_held_against_the_file(fp8: Cell, tmp_path: Path, capsys: Capture) -> None:
    source, out = fp8.folder / "model.onnx", tmp_path / "out"
    compile_model(CompileRequest(str(source), out))
    assert validate_artifact(ValidateRequest(out)).against == "ort"
    request = ValidateRequest(out, against=str(source), shapes=("batch=3,text=5",))
    good = validate_artifact(request, bisect=True)
    good.require_match()
    assert str(good.reports[0].shape).startswith("batch 3, ")
    assert good.modules["model.onnx"][0].modules > 90
    error = refusal(["validate", str(out), "--against", "torch"], out, capsys)
    assert "compiled from an ONNX file" in error
    assert "--against model.onnx" in error


def test_onnx_runtime_as_users_run_it(fp8: Cell) -> None:
    reports = validate_artifact(ValidateRequest(fp8.folder, against="ort", shapes=(SMALL,))).reports
    assert {r.arithmetic for r in reports} == {"ort, float16"}
    assert all(r.passed and r.rows[0].rel_l2 for r in reports)


@pytest.mark.parametrize(
    ("more", "said", "code"),
    [
        (["--shape", "height=63"], "use a multiple of", 2),
        (["--shape", "depth=2"], "unknown axis", 2),
        (["--shape", "batch=1:2:4"], "write one number", 2),
        (["--against", "nowhere"], "give --against torch, ort", 1),
        (["--target", "trt"], "unknown target", 2),
        (["--target", "ort-cuda"], "was not compiled for ort-cuda", 1),
        (["--model", "nowhere"], "nothing reads the model", 1),
        (["--model", "tiny-flux"], "is another model than", 1),
        (["--model", "tiny-sd35"], "is another model than", 1),
    ],
)
def test_what_cannot_be_validated_is_refused(
    fp8: Cell, more: list[str], said: str, code: int, capsys: Capture
) -> None:
    assert said in refusal(["validate", str(fp8.folder), *more], fp8.folder, capsys, code)
