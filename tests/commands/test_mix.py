"""`diffc mix` from calibration to a checkpoint, its plan and its picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffc.artifact.folder import Artifact
from diffc.cli.main import run
from diffc.commands.mix.request import MIXABLE, MixRequest
from diffc.commands.mix.run import _available, _fitting, mix, mixed_request
from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError, UsageError
from diffc.progress import Silent
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions


@pytest.mark.slow
def test_a_mix_is_within_its_size_and_no_worse_than_any_format_of_that_size(tmp_path: Path) -> None:
    request = MixRequest(
        "tiny-sd3",
        tmp_path / "mixed",
        bits=6.0,
        formats=("nvfp4", "int8"),
        prompts=("a red fox",),
        steps=2,
        batch_size=1,
        image_size=64,
        plot=tmp_path / "a.svg",
    )
    best, *uniform = mix(request, Silent())
    assert best.bits <= 6
    assert [one.name for one in uniform] == ["nvfp4", "int8"]
    assert all(best.noise < one.noise for one in uniform if one.bits <= 6)
    assert (tmp_path / "a.svg").stat().st_size > 1000
    plan = tmp_path / "mixed.plan.json"
    formats = json.loads(plan.read_text(encoding="utf-8"))["formats"]
    projections = [formats[f"transformer_blocks.0.attn.to_{name}"] for name in "qkv"]
    assert len(set(projections)) == 1
    quantized = {path for path, name in formats.items() if name != "none"}
    found = Checkpoint.load(tmp_path / "mixed")
    assert {layer_of(name) for name in found.settings} == quantized
    edited = {**formats, sorted(quantized)[0]: "none"}
    plan.write_text(json.dumps({"formats": edited}), encoding="utf-8")
    again = replace(request, output=tmp_path / "edited", bits=None, plan=plan, plot=None)
    assert mix(again, Silent()) == []
    layers = {layer_of(name) for name in Checkpoint.load(tmp_path / "edited").settings}
    assert layers == quantized - {sorted(quantized)[0]}


def test_one_limit_is_asked_for(tmp_path: Path) -> None:
    for limits in ({}, {"bits": 5.0, "size": 10**9}, {"bits": 5.0, "psnr": 30.0}):
        with pytest.raises(UsageError, match="one of --bits, --size, --psnr and --plan"):
            mix(MixRequest("tiny-sd3", tmp_path, **limits), Silent())
    with pytest.raises(UsageError, match="--psnr is -1"):
        mix(MixRequest("tiny-sd3", tmp_path, psnr=-1.0), Silent())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "fp8"}, "format 'fp8' is one format"),
        ({"from_checkpoint": "x"}, "--from-checkpoint is a calibration"),
        ({"calibrate": "synthetic"}, "random inputs say nothing of pictures"),
        ({"model": "x.onnx"}, "of an .onnx file"),
        ({"options": QuantOptions(mha=True)}, "attention is not part of a mix"),
        ({"model": "no-such-model"}, "no-such-model"),
    ],
)
def test_compiles_that_no_mix_can_be_made_for(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    request = CompileRequest(**{"model": "tiny-sd3", "output": tmp_path / "out", **changed})
    with pytest.raises(DiffcError, match=message):
        mixed_request(request, Silent(), bits=5.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.compiles
def test_a_compile_makes_the_smallest_mix_of_a_quality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    few = ["--steps", "2", "--batch-size", "1", "--calib-size", "1", "--image-size", "64"]
    arguments = ["compile", "tiny-sd3", "--format", "auto", *few, "--keep", "*.ff.*", "-o", str(out)]
    assert run([*arguments, "--psnr", "20"]) == 0
    said = capsys.readouterr().out
    assert float(said.split("pictures ")[1].split()[0]) >= 20
    plan = json.loads((tmp_path / "out.mixed.plan.json").read_text(encoding="utf-8"))
    assert plan["psnr_db"] >= 20
    assert not any(".ff." in path for path in plan["formats"])
    manifest = Artifact.load(out).manifest
    assert manifest["format"] == "mixed"
    assert Checkpoint.load(out / "checkpoint").calibration["formats"] == sorted(
        {name for name in plan["formats"].values() if name != "none"}, key=list(FORMATS).index
    )


def test_formats_that_a_gpu_lacks_are_no_part_of_a_mix(tmp_path: Path) -> None:
    def available(sm: int) -> tuple[str, ...]:
        return _available(CompileRequest("tiny-sd3", tmp_path, targets="trt-rtx", sms=sm))

    assert available(75) == ("int8",)
    assert available(89) == ("fp8", "int8")
    assert available(120) == MIXABLE


def test_options_reach_the_formats_that_take_them() -> None:
    options = QuantOptions(weight_scales="four-six", keep=("*.ff.*",), level=2.5)
    assert _fitting(options, "nvfp4") == options
    assert _fitting(options, "int8") == replace(options, weight_scales="max")
