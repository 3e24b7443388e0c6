"""Artifacts for tests of the report, made without a compile; their names do what a hostile file would try."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffc.artifact.folder import Artifact, write_manifest
from diffc.artifact.records import save_passes
from diffc.compile.recorded import Recorded
from diffc.progress import Silent
from passes.base import Refusal
from passes.pipeline import PassRecord
from tests.artifact.manifests import described

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>$\\frac{1}{0}$\"&amp;"
"""A name that runs as a script, loads a picture, ends an attribute, and is a formula that does not exist."""
PATH = "blocks.0.attn.to_q"


def quantized_model(path: str = PATH, scale: float = 0.5) -> onnx.ModelProto:
    """x [n, 4] times a weight [4, 8] in FP8, with its input through FP8 as well."""
    fp8 = TensorProto.FLOAT8E4M3FN
    codes = helper.make_tensor(f"{path}.weight", fp8, [4, 8], bytes(range(32)), raw=True)
    weights = [codes, *(numpy_helper.from_array(np.float32(s), n) for n, s in (("ws", scale), ("xs", 0.25)))]
    zero = helper.make_tensor("zero", fp8, [], b"\0", raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "zero"], ["q"], f"{path}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "xs"], ["xq"], f"{path}/DequantizeLinear"),
        helper.make_node("DequantizeLinear", [f"{path}.weight", "ws"], ["w"], f"{path}/DequantizeLinear_1"),
        helper.make_node("MatMul", ["xq", "w"], ["y"], f"{path}/MatMul"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("x", 4), ("y", 8)))
    graph = helper.make_graph(nodes, "g", [x], [y], [*weights, zero])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def made(folder: Path, name: str = HOSTILE, *, scale: float = 0.5, **content: Any) -> Artifact:
    """An artifact in which everything that has a name is called `name`."""
    folder.mkdir(parents=True)
    onnx.save(
        quantized_model(name.replace("/", "_") if name is HOSTILE else name, scale), folder / "model.onnx"
    )
    refusals = (Refusal(f"{name}/a", f"weight '{name}': rounds"), Refusal(f"{name}/b", "weight 'b': rounds"))
    save_passes([PassRecord("fold-x", 1, 0.1, 9, 4, (name,), refusals, name, name)], folder)
    recorded = Recorded(Silent())
    for title in (name, "write weights"):
        with recorded.stage(title):
            pass
    recorded.save(folder, ())
    (folder / "engines").mkdir()
    (folder / "engines" / "e.engine").write_bytes(b"engine")
    tensor = {"name": name, "precision": name, "shape": [1]}
    layer = {"name": name, "type": "MATRIX_MULTIPLY", "inputs": [tensor], "outputs": [tensor]}
    text = json.dumps({"layers": [layer, layer]})
    (folder / "engines" / "e.network.json").write_text(text, encoding="utf-8")
    engine = {
        "file": "engines/e.engine",
        "target": name,
        "version": name,
        "sms": [89],
        "layers": 2,
        "seconds": 1.5,
    }
    plan = {"name": name, "groups": [{"blocks": ["blocks.0"], "steps": {"every": 2}, "keep": "output"}]}
    value = {"name": name, "dtype": "FLOAT", "dims": ["n", 4]}
    model = {"suffix": "", "files": {"ort": "model.onnx"}, "inputs": [value], "outputs": [value]}
    output = {"name": name, "rel_l2": 2e-4, "tolerance": 2e-3, "passed": True}
    report = {"model": name, "shape": {name: 1}, "arithmetic": name, "outputs": [output]}
    manifest = {
        "model": {"name": name, "family": name, "config": {}, "bytes": 256},
        "request": {"model": name, "format": "fp8", "prompts": [name], "steps": 4},
        "versions": {name: name},
        "targets": {"ort": "model.onnx"},
        "engines": [engine],
        "validation": [report],
        "passes": [{"name": name, "changed": 1, "check": name, "notes": [name]}],
        "cache": {"layout": "full+reduced", "plan": plan, "models": [model]},
        **content,
    }
    write_manifest(folder, described(**manifest), {})
    return Artifact.load(folder)
