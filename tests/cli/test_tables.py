"""The tables of the command line: what a newcomer reads of a comparison, sizes and shapes."""

from __future__ import annotations

import io
from typing import Any

from diffc.cli.tables import compared, file_rows, lora_lines, made_for, megabytes
from diffc.cli.terminal import Terminal
from diffc.models.spec import Shape
from diffc.terminal_text import Screen
from diffc.validate.compare import OutputComparison
from diffc.validate.reports import ShapeReport

SHAPE = Shape(1, 64, 96, 24)


def report(error: float, limit: float, floor: float | None = None) -> ShapeReport:
    row = OutputComparison("sample", error <= limit, limit, error, 0.1, 0.99, (1,))
    return ShapeReport(SHAPE, "float16", [row], {}, {}, {}, floor=floor)


def shown(*reports: ShapeReport) -> str:
    terminal, file = Terminal(), io.StringIO()
    terminal.console = Screen(file=file, width=80)
    compared(reports, terminal, "ort against torch")
    return file.getvalue()


def test_a_difference_within_its_limit_is_ok() -> None:
    text = shown(report(4e-3, 2e-2))
    assert "4.0e-03 ok" in text
    assert "limit 2e-02" in text
    assert "within all limits" in text


def test_a_difference_that_the_type_itself_makes_is_ok_and_says_why() -> None:
    text = " ".join(shown(report(6.6e-2, 2e-2, floor=6.7e-2)).split())
    assert "6.6e-02 ok (*)" in text
    assert "roundings of float16 alone move the reference by 6.7e-02 here" in text
    assert "no more than the type itself changes" in text
    assert "FAILED" not in text


def test_a_difference_that_nothing_explains_failed() -> None:
    text = shown(report(6.6e-2, 2e-2, floor=1e-4))
    assert "6.6e-02 FAILED" in text
    assert "within all limits" not in text


def test_sizes_and_shapes_are_for_people() -> None:
    assert megabytes(2_500_000).strip() == "2.50 MB"
    assert megabytes(11.9e9).strip() == "11.90 GB"
    small, best, large = ({"batch": b, "height": 64 * b, "width": 64, "text": 77} for b in (1, 2, 4))
    manifest: dict[str, Any] = {"profile": {"minimum": small, "optimum": best, "maximum": large}}
    assert made_for(manifest) == "Made for batch 1 to 4 (best 2), 64x64 to 256x64 (best 128x64) px, 77 tokens"
    assert made_for({"profile": []}) == "Made for the sizes of the ONNX file"
    manifest |= {
        "files": {
            "model.onnx": {"bytes": 1},
            "model.onnx_data": {"bytes": 50},
            "engines/a.engine": {"bytes": 60},
        },
        "model": {"bytes": 200},
        "engines": [{"file": "engines/a.engine", "sms": [89, 120]}],
    }
    first, weights, engine = file_rows(manifest)
    assert first.split()[0] == "model.onnx"
    assert "25% of the original's" in weights
    assert engine.endswith("for SM89 (RTX 40, L40), SM120 (RTX 50), not run here")


def test_loras_in_a_manifest_have_a_line_each() -> None:
    lora = {"file": "a.safetensors", "weight": 0.8, "layers": {"LoRA": 12, "difference": 2}}
    manifest = {"model": {"loras": [lora]}, "lora_slots": {"rank": 16, "layers": {"a": [1, 2, 1]}}}
    first, second = lora_lines(manifest)
    assert first == "LoRA in the weights: a.safetensors (weight 0.8), 12 LoRA, 2 difference layers"
    assert second == "LoRA slots: 1 layers, up to rank 16"
    assert lora_lines({"model": {}}) == []
