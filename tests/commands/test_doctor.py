"""`diffc doctor` tells the truth about this machine, and of what is missing how to get it."""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata

import pytest

from diffc.backends.probes import Probe
from diffc.backends.target import TARGETS
from diffc.cli.main import run
from diffc.commands import doctor
from diffc.errors import DiffcError
from diffc.quantize.formats import FORMATS
from tests.cli_helpers import Capture


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in findings}


def test_what_is_here_works_and_what_is_not_has_a_fix(capsys: Capture) -> None:
    assert run(["doctor", "--json", "-"]) == 0
    printed = capsys.readouterr()
    found = by_name([doctor.Finding(**entry) for entry in json.loads(printed.out)])
    assert found["onnx"].detail == metadata.version("onnx")
    assert found["target ort"].works
    assert found["target trt-rtx"].works == (importlib.util.find_spec("tensorrt_rtx") is not None)
    for finding in found.values():
        assert finding.works or finding.fix or finding.what in ("torch on a GPU", "NVIDIA driver")
        assert finding.what.split()[-1] in printed.err


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "polygraphy":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = by_name(list(doctor._libraries()))
    assert not found["polygraphy"].works
    assert found["polygraphy"].fix.startswith('pip install "polygraphy==')
    assert "is tested with" in found["torch"].detail  # version 1 of everything is not what is pinned
    assert not found["one ONNX Runtime"].works  # with everything "installed", both of its packages are
    with pytest.raises(DiffcError, match="nothing can be compiled here: polygraphy is not installed"):
        doctor.require_able(list(found.values()))


def test_a_crash_of_native_code_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    crash = "import ctypes; ctypes.string_at(0)"
    found = doctor._target(TARGETS["trt-rtx"], Probe(crash, "install the NVIDIA driver"))
    assert not found.works
    assert found.detail
    assert found.fix


@pytest.mark.parametrize(("sm", "works"), [(75, True), (89, True), (90, False), (120, True)])
def test_a_gpu_is_told_what_to_compile_for(sm: int, works: bool) -> None:
    found = doctor.gpu("RTX", sm, 24 << 30)
    assert found.works == works
    assert f"SM{sm}, 26 GB" in found.detail
    assert (f"--sm {sm}" in found.detail) == works
    assert ("ort-cuda" in found.fix) == (not works)
    named = found.detail.rpartition("formats ")[2] if works else found.detail.rpartition("formats here: ")[2]
    assert named.split(", ") == [fmt.name for fmt in FORMATS.values() if fmt.min_sm <= sm]
