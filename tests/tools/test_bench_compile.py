"""tools/bench/compile.py: both routes, and that ModelOpt's takes the steps of its diffusers example."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from tests import ROOT
from tests.backbones import backbone_of
from tools.bench.compile import compile_code, library_folders


def test_bytecode_is_there_before_anything_is_measured(tmp_path: Path) -> None:
    assert Path(torch.__file__).parents[1] in library_folders()
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("x = (\n")
    compile_code({tmp_path})
    assert [file.name.split(".")[0] for file in (tmp_path / "__pycache__").iterdir()] == ["good"]


@pytest.mark.compiles
@pytest.mark.slow
def test_the_steps_of_modelopts_example(tmp_path: Path) -> None:
    source, output, report = tmp_path / "flux", tmp_path / "out", tmp_path / "report.json"
    backbone_of("flux", torch.bfloat16).save_pretrained(source)  # type: ignore[operator]
    output.mkdir()
    command = ["-m", "tools.bench.routes", "modelopt", source, "fp8", output, report, "64"]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, timeout=300)
    found = json.loads(report.read_text(encoding="utf-8"))
    assert [stage["name"] for stage in found["stages"]] == [
        *("import libraries", "load the model", "quantize with amax 1", "to the CPU and back"),
        *("export", "load again", "post-process", "save"),
    ]
    assert sorted(file.name for file in output.iterdir()) == ["model.onnx", "model.onnx_data"]
    model = onnx.load(output / "model.onnx")
    assert len(model.graph.node) == found["nodes"]
    assert (model.ir_version, model.opset_import[0].version) == (9, 20)
    dims = {
        value.name: [d.dim_param for d in value.type.tensor_type.shape.dim] for value in model.graph.input
    }
    assert dims["hidden_states"] == ["batch", "image", ""]
    assert dims["txt_ids"] == ["", ""]
    quantized = [node for node in model.graph.node if node.op_type == "TRT_FP8QuantizeLinear"]
    assert len({node.name for node in quantized}) > 20
    assert not any(node.name.startswith(("/proj_out", "/x_embedder")) for node in quantized)
    # The weights are as large as before: 16 bits each.
    assert (output / "model.onnx_data").stat().st_size > 1.9 * found["parameters"]


@pytest.mark.slow  # minutes, and 7 GB of memory for ModelOpt's route
def test_both_routes(tmp_path: Path) -> None:
    """On one block of FLUX.1-dev of each kind: 0.7 billion weights."""
    table = tmp_path / "rows.json"
    options = ["--depths", "1", "--pixels", "64", "--folder", str(tmp_path), "--json", str(table)]
    subprocess.run([sys.executable, "-m", "tools.bench.compile", *options], cwd=ROOT, check=True, timeout=900)
    ours, legacy = json.loads(table.read_text(encoding="utf-8"))
    assert (ours["route"], legacy["route"]) == ("diffc", "modelopt")
    assert ours["error"] == legacy["error"] == ""
    assert ours["parameters"] == legacy["parameters"] > 5e8
    # 8-bit weights beside 16-bit ones, written once beside twice.
    assert ours["on_disk"] < 1.2 * ours["parameters"]
    assert 1.9 * ours["parameters"] < legacy["on_disk"] < 2.1 * ours["parameters"] < legacy["written"] / 1.9
    assert ours["peak_rss"] < legacy["peak_rss"]
    for row in (ours, legacy):
        assert row["nodes"] > 100
        assert sum(stage["wall"] for stage in row["stages"]) < row["wall"]
