"""The command line: every refusal is one clear message, names the fix, and leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffc.cli.main import run
from diffc.models.embedded.catalogue import EMBEDDED, materialize
from diffc.quantize.formats import FORMATS
from tests.cli_helpers import RTX, Capture, compile_arguments, refusal


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "fp9"], rf"unknown format 'fp9'. Known: {', '.join(FORMATS)}. Did you mean fp8\?\n"),
        (["--target", "cuda"], r"unknown target 'cuda'. Known: trt-rtx, tensorrt, ort"),
        ([*RTX, "--sm", "88"], r"unknown compute capability '88'. Known: 75, 80, 86, 89, 120, 121"),
        (["--dtype", "float8"], r"unknown dtype 'float8'. Known: auto, float32, float16, bfloat16"),
        (RTX, r"'trt-rtx' builds for named GPUs[\s\S]*--sm 89 --sm 120"),
        (["--sm", "89"], r"--sm is given, and no target builds for named GPUs[\s\S]*--target trt-rtx"),
        (["--profile", "depth=3"], r"unknown axis 'depth'. Known: batch, height, width, text"),
        (["--profile", "batch=many"], r"'many' is not a size[\s\S]*MIN:OPT:MAX"),
        (["--profile", "batch=4:2:1"], r"'4:2:1' is not a size, nor three in ascending order"),
        (["--profile", "batch=1:2"], r"'1:2' is not a size"),
        (["--profile", "batch=0"], r"a size below 1"),
        (["--profile", "height=100"], r"height 100 px does not fit sd3[\s\S]*multiple of 16"),
        (["--profile", "height=64:128:4096"], r"this model ends at"),
        (["--format", "fp8", "--image-size", "33"], r"height 33 px does not fit sd3[\s\S]*multiple of 16"),
        (
            [*RTX, "--sm", "89", "--optimization-level", "9"],
            r"no optimization level 9[\s\S]*0 \(fast build\) to 5",
        ),
        (["--weight-streaming"], r"no target builds an engine[\s\S]*--target trt-rtx"),
        (["--from-checkpoint", "x"], r"format 'none' takes no checkpoint"),
    ],
)
def test_bad_options_are_refused_with_the_choices(
    more: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    assert re.search(message, refusal(compile_arguments(tmp_path, *more), tmp_path, capsys, code=2))


def test_a_checkpoint_that_is_missing_is_refused(tmp_path: Path, capsys: Capture) -> None:
    arguments = compile_arguments(tmp_path, "--format", "fp8", "--from-checkpoint", "no/such")
    assert re.search(r"no checkpoint at .*such", refusal(arguments, tmp_path, capsys))


def test_fp8_for_an_old_gpu_is_refused_before_anything_is_loaded(tmp_path: Path, capsys: Capture) -> None:
    """Before the model is even looked for: it does not exist."""
    arguments = compile_arguments(tmp_path, "--format", "fp8", *RTX, "--sm", "86", "--sm", "89", model="none")
    error = refusal(arguments, tmp_path, capsys)
    assert (
        "needs SM89 or newer; too old: SM86. Formats that run there: none, int8, int8_smoothquant, int4_awq\n"
        in error
    )
    assert "leave out --sm 86" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "tiny-sd3"],
        ["compile", "-o", "x"],
        ["compile", "tiny-sd3", "-o", "x", "--steps", "0"],
        ["compile", "tiny-sd3", "-o", "x", "--batch-size", "none"],
        ["compile", "tiny-sd3", "-o", "x", "--image-size", "0"],
        ["compile", "tiny-sd3", "-o", "x", "--seed", "-1"],
        ["compile", "tiny-sd3", "-o", "x", "--no-such-option"],
        ["--debug", "compile", "tiny-sd3"],
        ["compile", "tiny-sd3", "-o", "x", "-q", "1"],
        ["decompile"],
        ["models", "draw"],
        ["opt", "x.onnx"],
    ],
)
def test_usage_errors_exit_2(
    arguments: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in arguments if word in ("compile", "models", "opt")]
    assert f"See {' '.join(['diffc', *words])} --help" in refusal(arguments, tmp_path, capsys, code=2)


def test_unknown_models_are_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for model, message in (
        ("tiny-sd4", "'tiny-sd4' is not the name of an embedded model"),
        (str(tmp_path / "file"), "nothing reads the model"),
        (str(tmp_path / "empty"), "model_index.json"),
    ):
        error = refusal(compile_arguments(tmp_path, model=model), tmp_path, capsys)
        assert message in error
        assert ", ".join(EMBEDDED) in error


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A copy of tiny-sd3's backbone folder, to be damaged."""
    return Path(shutil.copytree(materialize("tiny-sd3") / "transformer", tmp_path / "transformer"))


def test_damaged_weights_are_refused(backbone: Path, tmp_path: Path, capsys: Capture) -> None:
    weights = backbone / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    arguments = compile_arguments(tmp_path, model=str(backbone))
    for kept in (0, 7, 1000, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:kept])
        assert weights.name in refusal(arguments, tmp_path, capsys), kept
    weights.unlink()
    assert "folder without weights" in refusal(arguments, tmp_path, capsys)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 4}, r"have no tensor 'transformer_blocks\.\d"),
        (
            {"joint_attention_dim": 96},
            r"'context_embedder.weight' has shape .*128.*, and config.json asks for",
        ),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    changed: dict[str, Any], message: str, backbone: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(config | changed))
    error = refusal(compile_arguments(tmp_path, model=str(backbone)), tmp_path, capsys)
    assert re.search(message, error)


def test_a_pipeline_whose_config_does_not_fit_is_refused_before_calibration(
    tmp_path: Path, capsys: Capture
) -> None:
    pipeline = shutil.copytree(materialize("tiny-sd3"), tmp_path / "pipeline")
    path = Path(pipeline) / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 4}))
    arguments = compile_arguments(tmp_path, "--format", "int8", model=str(pipeline))
    assert "have no tensor" in refusal(arguments, tmp_path, capsys)


def test_a_backbone_alone_cannot_be_calibrated(backbone: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = compile_arguments(tmp_path, "--format", "int8", model=str(backbone))
    error = refusal(arguments, tmp_path, capsys)
    assert "is a backbone alone" in error
    assert "--from-checkpoint" in error


def test_an_incomplete_pipeline_is_refused(tmp_path: Path, capsys: Capture) -> None:
    pipeline = Path(shutil.copytree(materialize("tiny-sd3"), tmp_path / "pipeline"))
    shutil.rmtree(pipeline / "vae")
    arguments = compile_arguments(tmp_path, "--format", "int8", model=str(pipeline))
    error = refusal(arguments, tmp_path, capsys)
    assert "model_index.json names vae" in error
    assert "download the whole pipeline" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the prompts file"), (b"", "holds no prompt"), (b" \n\n", "holds no prompt")],
)
def test_bad_prompt_files_are_refused(
    content: bytes | None, message: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    arguments = compile_arguments(tmp_path, "--format", "fp8", "--prompts-file", str(path))
    assert message in refusal(arguments, tmp_path, capsys)


def test_a_prompts_file_in_another_encoding_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompts.txt").write_bytes("ein Mädchen".encode("latin-1"))
    arguments = compile_arguments(tmp_path, "--prompts-file", str(tmp_path / "prompts.txt"))
    assert "UTF-8" in refusal(arguments, tmp_path, capsys)


def test_an_output_that_exists_is_kept(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for more in ([], ["--force"]):
        error = refusal(compile_arguments(tmp_path, *more), tmp_path, capsys)
        assert "exists and is not a diffc artifact" in error
    (out / "manifest.json").write_text("{}")
    assert "--force" in refusal(compile_arguments(tmp_path), tmp_path, capsys)
    (tmp_path / "file").write_text("x")
    arguments = ["compile", "tiny-sd3", "-o", str(tmp_path / "file" / "out")]
    assert "cannot write" in refusal(arguments, tmp_path, capsys)


@pytest.mark.parametrize("model", ["tiny-sd3", "model.onnx"])
def test_a_dry_run_checks_says_what_would_be_made_and_writes_nothing(
    model: str, tmp_path: Path, capsys: Capture
) -> None:
    assert run(compile_arguments(tmp_path, "--dry-run", model=model)) == 0
    printed = capsys.readouterr().out
    assert "Would compile" in printed
    assert "Nothing was written" in printed
    assert list(tmp_path.iterdir()) == []
    refusal(
        compile_arguments(tmp_path, "--dry-run", "--target", "none", model=model), tmp_path, capsys, code=2
    )


def test_a_dry_run_of_a_mix_says_what_would_be_measured(tmp_path: Path, capsys: Capture) -> None:
    arguments = ["compile", "digits-sd3", "--format", "auto", "-o", str(tmp_path / "out"), "--dry-run"]
    assert run([*arguments, "--bits", "5.5", "--target", "trt-rtx", "--sm", "89"]) == 0
    printed = capsys.readouterr().out
    assert "loses in fp8, int8," in printed, "SM89 has no NVFP4"
    assert "Nothing was written" in printed
    assert "number above 0" in refusal([*arguments, "--psnr", "-1"], tmp_path, capsys, code=2)
    assert list(tmp_path.iterdir()) == []
