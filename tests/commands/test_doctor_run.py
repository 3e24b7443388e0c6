"""`diffc doctor --run`: what can run here is run and compared, the rest is named, a crash is a line of the report."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from diffc.artifact.folder import Artifact
from diffc.cli.main import run
from diffc.commands.doctor_run import child
from diffc.commands.doctor_run import run as doctor
from diffc.commands.doctor_run.cases import Case, Sample, cases
from diffc.commands.doctor_run.child import ended, run_case
from diffc.commands.doctor_run.report import Examined, Outcome
from diffc.errors import DiffcError, MismatchError
from tests.cli_helpers import Capture
from tests.conftest import HAS_RTX, Cell, Cells
from tests.validate.damage import rehash

CASE = Case("trt-rtx", "engines/trt-rtx-sm89.engine", "model.onnx", sms=(89,))
SAMPLE = Sample("batch 1", {"x": np.ones((2, 3), np.float32)})


@pytest.fixture
def fp8(compiled: Cells) -> Cell:
    return compiled("tiny-sd3", "fp8")


def test_without_a_gpu_the_graphs_run_and_the_engines_are_named(
    fp8: Cell, tmp_path: Path, capsys: Capture
) -> None:
    place = tmp_path / "report.json"
    code = run(["doctor", "--run", str(fp8.folder), "--report", str(place), "--repeat", "1"])
    shown = capsys.readouterr()
    report = json.loads(place.read_text("utf-8"))
    by_target: dict[str, list[dict[str, Any]]] = {}
    for case in report["cases"]:
        by_target.setdefault(case["target"], []).append(case)
    (graph,) = by_target["ort"]
    assert graph["status"] == "ok"
    assert {held["against"] for held in graph["compared"]} == {"ONNX Runtime on the CPU", "torch"}
    assert len({held["at"] for held in graph["compared"]}) == 2
    assert any("median" in step for step in graph["steps"])
    assert "send this file back" in shown.out
    assert all(line in " ".join(shown.out.split()) for line in (" ".join(t.split()) for t in report["text"]))
    assert report["machine"]["versions"]["torch"]
    assert "token" not in place.read_text("utf-8").lower().replace("tokens", "")
    if HAS_RTX and not report["machine"]["gpus"]:
        engines = by_target["trt-rtx"]
        assert {tuple(case["sms"]) for case in engines} == {(89,), (120,)}
        assert all("it would run on SM" in case["reason"] for case in engines)
        assert code == 1
        assert "none of the 2 engines could be run" in shown.err


def test_a_wrong_weight_is_reported(fp8: Cell, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8.folder, tmp_path / "artifact"))
    name = fp8.artifact.manifest["targets"]["ort"]
    model = onnx.load(folder / name, load_external_data=False)
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    scales = [
        t for t in model.graph.initializer if t.data_type in floats and not t.dims and not t.external_data
    ]
    for tensor in scales:
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value * 3).astype(value.dtype), tensor.name))
    assert scales
    onnx.save(model, folder / name)
    rehash(folder, name)
    place = tmp_path / "report.json"
    found = doctor.examine_artifact(doctor.DoctorRequest(folder, place, target="ort", repeat=0))
    (outcome,) = found.outcomes
    assert outcome.status == "differs"
    assert "against torch" in outcome.reason
    assert json.loads(place.read_text("utf-8"))["cases"][0]["status"] == "differs"
    with pytest.raises(MismatchError, match="1 of 1 went wrong"):
        found.require_right()


def served(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: float = 60) -> child.Ran:
    """What is made of a worker that does `code`; `notes` in it is its file of notes."""
    start = "import json, sys; notes = open(json.load(open(sys.argv[1]))['notes'], 'w'); "
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", start + code))
    return run_case(tmp_path, CASE, [SAMPLE], tmp_path, gpu=0, repeat=1, timeout=timeout)


CRASH = (
    'print(\'{"doing": "load"}\', file=notes, flush=True); '
    "import ctypes; print('hello', flush=True); ctypes.string_at(0)"
)


def test_a_crash_of_native_code_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = served(CRASH, tmp_path, monkeypatch)
    assert ran.status == "crashed"
    assert "'load'" in ran.reason
    assert "SIGSEGV" in ran.reason or "access violation" in ran.reason
    assert "hello" in ran.log
    assert any("Fatal Python error" in line or "fatal exception" in line for line in ran.log)


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ('print(\'{"error": "no"}\', file=notes)', "failed", "no"),
        ('print(\'{"not_run": "no driver"}\', file=notes)', "not run", "no driver"),
        ('print(\'{"doing": "load"}\\n{"doi\', file=notes)', "crashed", "exit code 0"),
        ("sys.exit(7)", "crashed", "exit code 7"),
    ],
)
def test_how_a_worker_ended(
    code: str, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = served(code, tmp_path, monkeypatch)
    assert ran.status == status
    assert reason in ran.reason


def test_a_worker_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = served("import time; time.sleep(60)", tmp_path, monkeypatch, timeout=1)
    assert ran.status == "timed out"


def test_exit_codes_have_names() -> None:
    assert ended(-11) == "signal SIGSEGV"
    assert ended(0xC0000094) == "exit code 0xC0000094 (integer division by zero)"
    assert ended(0xC0001234) == "exit code 0xC0001234 (an exception of Windows)"


def manifest(**changed: Any) -> dict[str, Any]:
    engines = [
        {"file": f"engines/trt-rtx-sm{sm}{suffix}.engine", "target": "trt-rtx", "sms": [sm]}
        for sm in (89, 120)
        for suffix in ("-full", "-reduced")
    ]
    models = [
        {
            "suffix": suffix,
            "files": {"trt-rtx": f"model{suffix}.onnx", "ort": f"model-ort{suffix}.onnx"},
            "inputs": [],
            "outputs": [],
        }
        for suffix in ("-full", "-reduced")
    ]
    targets = {"trt-rtx": "model.onnx", "ort": "model-ort.onnx"}
    return {"targets": targets, "engines": engines, "cache": {"models": models}, "files": {}} | changed


def test_every_model_of_a_cache_plan_is_a_case() -> None:
    found = cases(Artifact(Path("a"), manifest()))
    assert [(c.target, c.file, c.graph) for c in found if c.target == "ort"] == [
        ("ort", f"model-ort{suffix}.onnx", f"model-ort{suffix}.onnx") for suffix in ("", "-full", "-reduced")
    ]
    engines = [(c.file, c.graph, c.number, c.sms) for c in found if c.is_engine]
    assert len(engines) == 4
    assert ("engines/trt-rtx-sm120-reduced.engine", "model-reduced.onnx", 1, (120,)) in engines
    assert {c.target for c in cases(Artifact(Path("a"), manifest()), "ort")} == {"ort"}


@pytest.mark.parametrize(
    ("statuses", "error"),
    [
        (["ok", "not run"], None),
        (["not run", "not run"], DiffcError),
        (["ok", "crashed"], MismatchError),
        (["not run", "timed out"], MismatchError),
    ],
)
def test_the_exit_code_says_what_became_of_it(statuses: list[str], error: type[Exception] | None) -> None:
    outcomes = [Outcome(CASE, status, "why") for status in statuses]
    found = Examined(Artifact(Path("a"), manifest()), {"gpus": []}, outcomes)
    if error is None:
        found.require_right()
        return
    with pytest.raises(error, match="why") as raised:
        found.require_right()
    assert type(raised.value) is error
