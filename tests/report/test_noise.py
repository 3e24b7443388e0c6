"""The error of each layer in each step: sums that grow with every call, told apart by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffc.commands.generate import GenerateRequest
from diffc.errors import DiffcError
from diffc.progress import Silent
from diffc.report.build import report
from diffc.report.noise import layer_noises, noises_of
from diffc.report.request import ReportRequest
from tests.conftest import Cells
from tests.report.made import made

REQUEST = GenerateRequest("a", "a.png", "a seven", steps=2)


def test_steps_are_told_apart_whatever_calls_they_take() -> None:
    calls = [
        [(10.0, 0.1), (4.0, 4.0)],
        [(20.0, 0.2), (8.0, 8.0)],
        [(30.0, 1.2), (12.0, 8.0)],
        [(40.0, 2.2), (16.0, 8.0)],
    ]
    found = noises_of(["a", "b"], calls, REQUEST)
    assert found.snr == pytest.approx(np.array([[20.0, 10.0], [0.0, np.inf]]))
    assert found.overall == pytest.approx([10 * np.log10(40 / 2.2), 10 * np.log10(2)])
    assert [(path, step) for path, step, _, _ in found.worst(2)] == [("b", 0), ("a", 1)]


def test_an_artifact_without_a_calibration_has_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="has no calibration"):
        layer_noises(made(tmp_path / "a"), REQUEST, Silent())


def test_layers_and_pictures_of_a_compile(compiled: Cells, tmp_path: Path) -> None:
    cell = compiled("tiny-sd3", "fp8")
    request = ReportRequest(
        cell.folder, tmp_path / "report.html", paint="a fox", layers=True, steps=2, size=64
    )
    report(request, Silent())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Error by layer and step" in page
    assert page.count('<img src="data:image/png;base64,') == 2
    assert "PSNR" in page
