"""`diffc doctor` tells the truth about this machine, and of what is missing how to get it."""

from __future__ import annotations

import importlib.util
from importlib import metadata

import pytest

from diffc.cli.main import run
from diffc.commands import doctor


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in findings}


def test_what_is_here_works_and_what_is_not_has_a_mend(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    found = by_name(doctor.examine())
    assert found["onnx"].detail == metadata.version("onnx")
    assert found["target ort"].works
    assert found["target trt-rtx"].works == (importlib.util.find_spec("tensorrt_rtx") is not None)
    for finding in found.values():
        assert finding.works or finding.fix or finding.what == "torch on a GPU"
        assert finding.what.split()[-1] in out


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "polygraphy":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = by_name(list(doctor._libraries()))
    assert not found["polygraphy"].works
    assert found["polygraphy"].fix.startswith("pip install")
    assert not found["one ONNX Runtime"].works  # with everything "installed", both of its packages are


def test_a_crash_of_native_code_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BUILD", "import ctypes; ctypes.string_at(0)")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = doctor._trt_rtx()
    assert not found.works
    assert found.detail
    assert found.fix
