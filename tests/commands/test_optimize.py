"""`diffc opt`: passes over an .onnx file from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.cli.main import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x [n, 64] times an INT8-quantized weight of 16 KB, kept in a file beside the model; and a dead branch."""
    rng = np.random.default_rng(21)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    scale = np.abs(weight).max(0) / np.float32(127)
    tensors = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(scale.astype(np.float32), "s"),
        numpy_helper.from_array(np.zeros(64, np.int8), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], "quantize", axis=1),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize", axis=1),
        helper.make_node("MatMul", ["x", "d"], ["y"], "product"),
        helper.make_node("Exp", ["x"], ["unused"], "dead"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save(proto, path, save_as_external_data=True, location="model.weights", size_threshold=1024)
    return path


PASSES = "fold-weight-qdq,remove-unused"


@pytest.mark.parametrize("check", ["structure", "numeric"])
def test_passes_are_run_checked_and_reported(
    check: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out.onnx"
    assert run(["opt", str(model), "-p", PASSES, "-o", str(out), "--check", check]) == 0
    printed = capsys.readouterr().out
    assert "4 -> 3" in printed
    assert "3 -> 2" in printed
    written = onnx.load(out)
    assert [n.op_type for n in written.graph.node] == ["DequantizeLinear", "MatMul"]
    assert out.with_name("out.onnx_data").stat().st_size == 64 * 64
    x = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    results = []
    for path in (model, out):
        with OrtSession(path) as session:
            results.append(session.run({"x": x})["y"])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-5)


def with_one_input(tmp_path: Path, dims: list[str], node: onnx.NodeProto, weight: np.ndarray) -> Path:
    """x -> node -> Identity -> y, and a node that nothing reads."""
    value = helper.make_tensor_value_info
    ends = value("x", TensorProto.FLOAT, dims), value("y", TensorProto.FLOAT, None)
    last = helper.make_node("Identity", ["z"], ["y"], "last")
    unread = helper.make_node("Relu", ["x"], ["unread"], "unread")
    tensors = [numpy_helper.from_array(weight, "W")]
    graph = helper.make_graph([node, last, unread], "graph", ends[:1], ends[1:], tensors)
    path = tmp_path / "made.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


@pytest.mark.parametrize(
    ("dims", "node", "weight", "said"),
    [
        (
            ["batch", "channels", "height", "width"],
            helper.make_node("Conv", ["x", "W"], ["z"], "conv"),
            np.ones((3, 7, 1, 1), np.float32),
            "outputs within",
        ),
        (
            ["tokens"],  # made for 4099 tokens, and says that it takes any number
            helper.make_node("Mul", ["x", "W"], ["z"], "mul"),
            np.ones((4099,), np.float32),
            "outputs within",
        ),
    ],
    ids=["channels of the weights", "a size that the weights hold"],
)
def test_sizes_at_which_the_graph_runs_are_found(
    dims: list[str],
    node: onnx.NodeProto,
    weight: np.ndarray,
    said: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path, out = with_one_input(tmp_path, dims, node, weight), tmp_path / "out.onnx"
    assert run(["opt", str(path), "-p", "remove-unused", "-o", str(out), "--check", "numeric"]) == 0
    assert said in capsys.readouterr().out
    declared = onnx.load(out).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in declared] == dims


def test_dump_writes_the_graph_after_every_pass(model: Path, tmp_path: Path) -> None:
    arguments = ["opt", str(model), "-p", PASSES, "-o", str(tmp_path / "out.onnx"), "--dump"]
    assert run([*arguments, str(tmp_path / "dump")]) == 0
    names = ["00-fold-weight-qdq.onnx", "01-remove-unused.onnx"]
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["-p", "fold-everything"],
            "unknown pass 'fold-everything'. Known passes: add-trt-functions, add-zero-bias",
        ),
        (["-p", ""], "the pipeline is empty"),
        (["-p", "fold-weight-qdq{"], "cannot read the pipeline"),
        (["-p", "fold-weight-qdq{fast=yes}"], "has no option 'fast=yes'. Known options: deep=bool"),
        (["-p", "widen-types{source=float16,target=7,x=1}"], "has no option"),
        (["-p", PASSES, "--check", "hope"], "unknown check 'hope'. Known: structure, numeric"),
        (["-p", PASSES, "-o", "no/such/folder/out.onnx"], "no such folder"),
    ],
)
def test_bad_arguments_are_refused(
    more: list[str], message: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = [] if "-o" in more else ["-o", str(tmp_path / "out.onnx")]
    assert run(["opt", str(model), *more, *output]) == (2 if "--check" in more else 1)
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_output_that_exists_is_kept_unless_forced(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    out.write_text("mine")
    arguments = ["opt", str(model), "-p", PASSES, "-o", str(out)]
    assert run(arguments) == 1
    assert "give --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run([*arguments, "--force"]) == 0
    onnx.checker.check_model(str(out), full_check=True)
    assert (
        run(["opt", str(out), "-p", PASSES, "-o", str(out), "--force"]) == 1
    )  # it reads what it would replace
    onnx.checker.check_model(str(out), full_check=True)


def test_a_model_that_cannot_be_read_is_refused(model: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["-p", PASSES, "-o", str(tmp_path / "out.onnx")]
    weights = model.with_name("model.weights")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(["opt", str(model), *arguments]) == 1
    assert "model.weights" in capsys.readouterr().err
    weights.unlink()
    assert run(["opt", str(model), *arguments]) == 1
    assert "model.weights" in capsys.readouterr().err
    model.write_bytes(model.read_bytes()[:100])
    assert run(["opt", str(model), *arguments]) == 1
    assert "not an ONNX model, or is cut off" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
