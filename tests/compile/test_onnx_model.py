"""`diffc compile model.onnx`: an existing file through the same stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffc.artifact.folder import Artifact
from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.cli.main import run
from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import DiffcError, UnsupportedError
from diffc.quantize.options import QuantOptions
from diffc.validate.float32 import cpu_session, feed, float32_copy
from diffc.validate.passes import random_feeds
from passes.storage import load
from tests import SHARED
from tests.conftest import HAS_RTX, Cells

FIXTURES = SHARED / "fixtures" / "modelopt-0.47-flux"
PROFILE = "batch=1:1:2,height=8:16:16,width=8:16:16,text=16:32:64"
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="needs tensorrt_rtx")


def outputs(path: Path, feeds: Any) -> list[Any]:
    twin = float32_copy(load(path))
    with cpu_session(twin) as session:
        return [next(iter(session.run(feed(twin, values)).values())) for values in feeds]


def test_a_compiled_model_compiles_again_to_the_same_numbers(compiled: Cells, tmp_path: Path) -> None:
    source = compiled("tiny-sd3", "fp8").folder / "model.onnx"
    result = compile_model(CompileRequest(str(source), tmp_path / "out"))
    feeds = random_feeds(load(source), seed=3)
    for before, after in zip(outputs(source, feeds), outputs(result.artifact.model, feeds), strict=True):
        assert np.linalg.norm(before - after) <= 1e-5 * np.linalg.norm(before)
    manifest = Artifact.load(tmp_path / "out").manifest
    assert manifest["targets"] == {"ort": "model.onnx"}
    assert manifest["inputs"][0]["name"] == "hidden_states"
    with OrtSession(result.artifact.model) as session:
        assert {i.name for i in session.inputs} == {i["name"] for i in manifest["inputs"]}


@needs_rtx
def test_dynamic_dimensions_need_ranges_by_their_names(compiled: Cells, tmp_path: Path) -> None:
    source = compiled("tiny-sd3", "fp8").folder / "model.onnx"
    request = CompileRequest(str(source), tmp_path / "out", targets=("trt-rtx",), sms=(89,))
    with pytest.raises(DiffcError, match=r"batch=1:2:4,height=64:128:128,[\s\S]*usual for sd3"):
        compile_model(request)
    with pytest.raises(DiffcError, match="unknown axis 'frames'"):
        compile_model(CompileRequest(**{**vars(request), "profile": "frames=1"}))
    result = compile_model(CompileRequest(**{**vars(request), "profile": PROFILE}))
    assert [e.sms for e in result.engines] == [(89,)]
    assert result.engines[0].path.stat().st_size > 100_000


@needs_rtx
def test_gpus_without_the_types_of_the_file_are_refused_before_anything_is_written(
    compiled: Cells, tmp_path: Path
) -> None:
    source = compiled("tiny-sd3", "fp8").folder / "model.onnx"
    request = CompileRequest(str(source), tmp_path / "out", targets=("trt-rtx",), sms=(86,), profile=PROFILE)
    with pytest.raises(UnsupportedError, match="FP8"):
        compile_model(request)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"format": "fp8"}, "--format"),
        ({"dtype": "float16"}, "--dtype"),
        ({"options": QuantOptions(mha=True)}, "options of quantization"),
        ({"prompts": ("a fox",)}, "--prompts-file"),
    ],
)
def test_what_the_file_decides_cannot_be_asked_for(
    changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(DiffcError, match=named):
        compile_model(CompileRequest("model.onnx", tmp_path / "out", **changed))


def test_a_missing_file_is_one_clear_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", str(tmp_path / "no.onnx"), "-o", str(tmp_path / "out")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_rtx
@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the shared fixtures are not here")
@pytest.mark.parametrize(
    ("name", "sms"),
    [
        ("flux_fp8", (89, 120)),
        ("flux_nvfp4", (120,)),
        pytest.param("flux_svd", (120,), marks=pytest.mark.slow),
        *(
            pytest.param(name, (89, 120), marks=pytest.mark.slow)
            for name in ("flux_int4awq", "flux_w4a8", "flux_mxfp8")
        ),
    ],
)
def test_modelopt_exports_compile_without_flags(name: str, sms: tuple[int, ...], tmp_path: Path) -> None:
    request = CompileRequest(
        str(FIXTURES / f"{name}.onnx"), tmp_path / "out", targets=("trt-rtx", "ort"), sms=sms
    )
    result = compile_model(request)
    assert [e.sms for e in result.engines] == [(sm,) for sm in sms]
