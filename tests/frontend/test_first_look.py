"""Files of a kilobyte on which native code hangs or asks for all memory: one error, soon, with exit code 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from diffc.cli.main import run
from diffc.compile import import_check
from diffc.compile.import_check import ImportCheck
from diffc.errors import DiffcError
from diffc.frontend.first_look import first_look
from diffc.frontend.onnx_file import check_operators
from diffc.frontend.onnx_values import check_values
from passes import Pipeline
from tests.cli_helpers import Capture

INFO = helper.make_tensor_value_info


def made(nodes: list[onnx.NodeProto], *weights: TensorProto, out: str = "y") -> ModelProto:
    x, y = INFO("x", TensorProto.FLOAT, ["n"]), INFO(out, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def constant(name: str, value: object, dtype: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def huge_range() -> ModelProto:
    """Range to 2^36, whose values ONNX's inference writes out."""
    nodes = [
        helper.make_node("Range", ["a", "b", "c"], ["r"], "r"),
        helper.make_node("Cast", ["r"], ["f"], "f", to=1),
        helper.make_node("Add", ["f", "x"], ["y"], "add"),
    ]
    return made(nodes, constant("a", 0), constant("b", 1 << 36), constant("c", 1))


def undefined() -> ModelProto:
    return made([helper.make_node("Abs", ["x", "x", "x"], ["y"], "abs")])


def endless() -> ModelProto:
    """A Loop whose condition stays true."""
    true = constant("t", True, np.bool_)
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"], "i"), helper.make_node("Neg", ["v"], ["w"], "n")],
        "body",
        [INFO("i", 7, []), INFO("c", 9, []), INFO("v", 1, ["n"])],
        [INFO("d", 9, []), INFO("w", 1, ["n"])],
    )
    return made([helper.make_node("Loop", ["", "t", "x"], ["y"], "loop", body=body)], true)


def spread() -> ModelProto:
    """A constant of 2^31 elements, which ONNX Runtime folds when it opens the model."""
    shape = constant("s", [1 << 31])
    nodes = [
        helper.make_node("Expand", ["o", "s"], ["e"], "e"),
        helper.make_node("ReduceSum", ["e"], ["r"], "r", keepdims=0),
        helper.make_node("Add", ["r", "x"], ["y"], "add"),
    ]
    return made(nodes, shape, constant("o", [1.5], np.float32))


@pytest.mark.parametrize("model", [huge_range, undefined])
@pytest.mark.parametrize("command", ["import", "opt"])
def test_what_onnx_cannot_follow(
    model: Callable[[], ModelProto], command: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "m.onnx").write_bytes(model().SerializeToString())
    more = ["-p", "remove-unused"] if command == "opt" else []
    assert run([command, str(tmp_path / "m.onnx"), *more, "-o", str(tmp_path / "o.onnx")]) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert "Fix: " in error
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("model", [endless, spread])
def test_what_does_not_end_in_onnx_runtime_is_not_compared(
    model: Callable[[], ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_check, "_SECONDS", 1.0)
    first_look(model(), "m")
    check = ImportCheck(strict=True)
    result = Pipeline.parse("inline-functions,fold-constants,remove-unused").run(model(), check=check)
    checks = [record.check for record in result.records if record.changed] or [check._run(result.model, True)]
    assert all("ONNX Runtime was stopped" in str(line) or "did not run" in str(line) for line in checks)


def quantized(scale: float, axis: int = 0, op: str = "QuantizeLinear", domain: str = "") -> ModelProto:
    """A weight [4, 3] through a quantizer with a scale for each row."""
    scales = constant("s", [scale, 1.0, 2.0, 0.5], np.float32)
    zero = constant("z", [0, 0, 0, 0], np.int8)
    weight = constant("W", np.random.default_rng(2).normal(size=(4, 3)), np.float32)
    nodes = [helper.make_node(op, ["W", "s", "z"], ["y"], "quantize", axis=axis, domain=domain)]
    return made(nodes, scales, zero, weight)


@pytest.mark.parametrize("value", [0.0, -1e-3, np.nan, np.inf])
def test_a_scale_that_is_none(value: float) -> None:
    check_values(quantized(0.25), "m")
    with pytest.raises(DiffcError, match=r"'s'.* holds"):
        check_values(quantized(value), "m")


@pytest.mark.parametrize("axis", [1, 99, -5])
def test_scales_along_an_axis_of_another_size(axis: int) -> None:
    with pytest.raises(DiffcError, match=f"4 values for axis {axis}"):
        check_values(quantized(1.0, axis), "m")


def test_nan_in_a_weight_of_the_graph() -> None:
    one = made([helper.make_node("Add", ["x", "c"], ["y"], "add")], constant("c", [np.nan], np.float32))
    check_values(one, "m")
    one.graph.initializer[0].CopyFrom(constant("c", [1.0, np.nan, 3.0], np.float32))
    with pytest.raises(DiffcError, match="the weight 'c' holds NaN"):
        check_values(one, "m")


def test_an_operator_that_onnx_runtime_does_not_have(tmp_path: Path) -> None:
    for name, known in (("QuickGelu", True), ("NoSuchOperator", False)):
        model = made([helper.make_node(name, ["x"], ["y"], "n", domain="com.microsoft")])
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        if known:
            check_operators(model, tmp_path)
        else:
            with pytest.raises(DiffcError, match="NoSuchOperator"):
                check_operators(model, tmp_path)
