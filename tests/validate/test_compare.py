"""The comparer accepts what is equal, and rejects every way to be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from diffc.errors import DiffcError
from diffc.validate.compare import compare, save_inputs, save_json, save_outputs


@pytest.fixture(params=[0, 1])
def outputs(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(request.param)
    return {
        "sample": rng.standard_normal((2, 4, 16, 8)).astype(np.float32),
        "other": (3 * rng.standard_normal((2, 4, 16, 8)) + 1).astype(np.float32),
    }


def test_equal_outputs_pass_with_no_error(outputs):
    rows = compare(outputs, {k: v.copy() for k, v in outputs.items()}, 1e-6)
    assert [r.name for r in rows] == ["sample", "other"]
    for row in rows:
        assert row.passed
        assert row.reason == ""
        assert (row.rel_l2, row.max_abs) == (0.0, 0.0)
        assert row.cosine == pytest.approx(1.0, abs=1e-12)
        assert row.shape == (2, 4, 16, 8)


def test_the_figures_are_those_of_the_definitions():
    a, b = np.array([3.0, 4.0], np.float32), np.array([3.0, 4.5], np.float32)
    (row,) = compare({"y": a}, {"y": b}, 0.2)
    assert row.rel_l2 == pytest.approx(0.1, rel=1e-12)
    assert row.max_abs == pytest.approx(0.5, rel=1e-12)
    assert row.cosine == pytest.approx(27 / (5 * np.hypot(3, 4.5)), rel=1e-12)


def test_float64_keeps_what_float16_would_overflow():
    a = np.full((64, 64), 300, np.float16)  # the sum of squares, 3.7e8, is over 65504
    (row,) = compare({"y": a}, {"y": a + np.float16(0.25)}, 2e-3)
    assert row.passed
    assert row.rel_l2 == pytest.approx(0.25 / 300, rel=1e-9)


@pytest.mark.parametrize(("error", "passes"), [(0.001, True), (0.004, True), (0.006, False), (0.01, False)])
def test_noise_passes_below_the_tolerance_of_half_a_percent_only(outputs, error, passes):
    rng = np.random.default_rng(5)
    noisy = {}
    for name, a in outputs.items():
        noise = rng.standard_normal(a.shape)
        noisy[name] = (a + noise * error * np.linalg.norm(a) / np.linalg.norm(noise)).astype(np.float32)
    rows = compare(outputs, noisy, 0.005)
    assert [r.passed for r in rows] == [passes, passes]
    assert [r.rel_l2 for r in rows] == pytest.approx([error, error], rel=1e-3)


def test_a_scale_error_of_one_percent_fails_though_the_direction_is_right(outputs):
    rows = compare(outputs, {k: v * np.float32(1.01) for k, v in outputs.items()}, 0.005)
    assert not any(r.passed for r in rows)
    assert all(r.cosine > 0.9999999 for r in rows)
    assert "0.01 is over the tolerance 0.005" in rows[0].reason


def test_swapped_outputs_fail(outputs):
    rows = compare(outputs, {"sample": outputs["other"], "other": outputs["sample"]}, 0.02)
    assert [r.passed for r in rows] == [False, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "result"])
def test_one_value_that_is_not_finite_fails(outputs, bad, side):
    broken = {k: v.copy() for k, v in outputs.items()}
    broken["other"][1, 2, 3, 4] = bad
    pair = (broken, outputs) if side == "reference" else (outputs, broken)
    good, row = compare(*pair, 0.02)
    assert good.passed
    assert not row.passed
    assert row.reason == f"1 of 1024 values of the {side} are NaN or infinite"


def test_a_missing_and_an_additional_output_fail(outputs):
    renamed = {"sample": outputs["sample"], "othr": outputs["other"]}
    rows = {r.name: r for r in compare(outputs, renamed, 0.02)}
    assert rows["sample"].passed
    assert not rows["other"].passed
    assert rows["other"].reason == "missing from the result"
    assert not rows["othr"].passed
    assert rows["othr"].reason == "not an output of the reference"


def test_a_result_without_any_output_fails(outputs):
    assert [r.passed for r in compare(outputs, {}, 0.02)] == [False, False]


@pytest.mark.parametrize(
    "change", [lambda a: a.reshape(4, 2, 16, 8), lambda a: a[:1], lambda a: a[..., None]]
)
def test_another_shape_fails(outputs, change):
    row = compare(outputs, {**outputs, "sample": change(outputs["sample"])}, 0.02)[0]
    assert not row.passed
    assert "instead of [2, 4, 16, 8]" in row.reason


def test_zeros_fail_on_either_side(outputs):
    zeros = np.zeros((2, 4, 16, 8), np.float32)
    (row,) = compare({"sample": zeros}, {"sample": zeros}, 0.02)
    assert not row.passed
    assert "zero everywhere" in row.reason
    (row,) = compare({"sample": outputs["sample"]}, {"sample": zeros}, 0.02)
    assert not row.passed
    assert (row.rel_l2, row.cosine) == (1.0, 0.0)


def test_an_empty_output_fails():
    (row,) = compare({"y": np.ones((0, 4), np.float32)}, {"y": np.ones((0, 4), np.float32)}, 0.02)
    assert not row.passed


def test_nothing_to_compare_and_a_tolerance_for_anything_are_refused(outputs):
    with pytest.raises(DiffcError, match="nothing to compare"):
        compare({}, {}, 0.02)
    for tolerance in (0, 1, -0.1, np.nan):
        with pytest.raises(DiffcError, match="between 0 and 1"):
            compare(outputs, outputs, tolerance)


@pytest.mark.parametrize(("dtype", "step"), [(ml_dtypes.bfloat16, 2e-3), (ml_dtypes.float8_e4m3fn, 3e-2)])
def test_types_that_numpy_lacks_compare_by_value(outputs, dtype, step):
    narrow = {k: v.astype(dtype) for k, v in outputs.items()}
    rows = compare(outputs, narrow, 0.05)
    assert all(r.passed for r in rows)
    assert all(step / 2 < r.rel_l2 < 2 * step for r in rows)
    assert not any(r.passed for r in compare(outputs, narrow, step / 4))


def test_polygraphy_prints_nothing(outputs, capfd):
    compare(outputs, {"sample": outputs["other"]}, 0.02)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_the_report_is_strict_json(outputs, tmp_path):
    bad = {"sample": outputs["sample"], "other": np.full_like(outputs["other"], np.nan)}
    rows = compare(outputs, bad, 0.02)
    save_json(rows, tmp_path / "report.json")
    good, broken = json.loads((tmp_path / "report.json").read_text())
    assert good["passed"] is True
    assert good["shape"] == [2, 4, 16, 8]
    assert broken["rel_l2"] is None
    assert broken["reason"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_polygraphy_reads_the_saved_inputs_and_outputs(tmp_path):
    """`polygraphy run` compares ONNX Runtime with the saved outputs, and notices when they are wrong."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Softplus", ["x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["b", 5])],
        [value("y", TensorProto.FLOAT, ["b", 5])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)
    y = np.log1p(np.exp(x))
    save_inputs({"x": x}, tmp_path / "inputs.json")
    assert _polygraphy(tmp_path, y) == 0
    assert _polygraphy(tmp_path, y + np.float32(0.01)) == 1


def _polygraphy(folder: Path, outputs: np.ndarray) -> int:
    save_outputs({"y": outputs}, "torch", folder / "outputs.json")
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"
    options = ["--onnxrt", "--load-inputs", "inputs.json", "--load-outputs", "outputs.json"]
    command = [sys.executable, "-c", program, "run", "m.onnx", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode
