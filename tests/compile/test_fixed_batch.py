"""A profile with one batch: written into the graph, where target ort-cuda makes use of it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

import diffc
from diffc.commands.validate import ValidateRequest, validate_artifact
from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import DiffcError
from diffc.models.spec import Shape
from diffc.validate.cuts import module_values
from tests.cli_helpers import Capture, refusal


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("fixed") / "out"
    targets, profile = ("ort", "ort-cuda"), f"batch={request.param}"
    compile_model(CompileRequest("tiny-sd3", folder, dtype="float32", targets=targets, profile=profile))
    return folder, request.param


def test_every_input_has_it_and_norms_take_residual_sums_in(compiled: tuple[Path, int]) -> None:
    folder, batch = compiled
    for name, norms in (("model.onnx", 0), ("model-ort-cuda.onnx", 1)):
        model = onnx.load(folder / name, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            assert dims[0].dim_value == batch
            assert all(d.dim_param for d in dims[2:] if value.name == "hidden_states")  # the others stay free
        kinds = Counter(node.op_type for node in model.graph.node)
        assert bool(kinds["SkipLayerNormalization"]) == norms
        assert kinds["SkipLayerNormalization"] % batch == 0


def test_it_was_validated_at_this_batch_and_can_be_again(compiled: tuple[Path, int], capsys: Capture) -> None:
    folder, batch = compiled
    found = validate_artifact(ValidateRequest(folder), bisect=True)
    shapes = {report.shape for report in found.reports}
    assert {s.batch for s in shapes if isinstance(s, Shape)} == {batch}
    assert len(shapes) == 2
    assert not any(report.wrong for reports in found.modules.values() for report in reports)
    error = refusal(["validate", str(folder), "--shape", f"batch={batch + 1}"], folder, capsys, code=2)
    assert f"was compiled for a batch of {batch}" in error


def test_what_a_norm_took_in_is_still_held_against_its_module(compiled: tuple[Path, int]) -> None:
    folder, batch = compiled
    points = {
        p.module: p
        for p in module_values(onnx.load(folder / "model-ort-cuda.onnx", load_external_data=False))
    }
    plain = {p.module for p in module_values(onnx.load(folder / "model.onnx", load_external_data=False))}
    assert points.keys() <= plain
    if batch == 1:  # the sum with the positions, which the first norm gives now
        assert points["pos_embed"].op == "SkipLayerNormalization"
    assert "transformer_blocks.0.attn.to_out.0" not in points  # its bias went into a norm


@pytest.mark.slow
def test_at_a_large_size_images_are_computed_one_by_one(compiled: tuple[Path, int], tmp_path: Path) -> None:
    """What the graph is made fast for is the usual size of the profile; it is right at any, module by module."""
    small, batch = compiled
    profile = f"batch={batch},height=64:768:1024,width=64:768:1024"
    request = CompileRequest(
        "tiny-sd3", tmp_path / "out", dtype="float16", targets=("ort-cuda",), profile=profile
    )
    result = compile_model(request)
    assert all(report.passed for report in result.validation)
    files = tmp_path / "out" / "model.onnx", small / "model-ort-cuda.onnx"
    graphs = [onnx.load(file, load_external_data=False).graph for file in files]
    counts = [Counter(node.op_type for node in graph.node) for graph in graphs]
    # Two projections of each feed-forward and one of each attention, for every image but the first.
    more = counts[0]["MatMul"] - counts[1]["MatMul"]
    assert more == 0 if batch == 1 else more >= 3
    assert any(
        node.name.startswith("transformer_blocks.") and is_gated_weight(node, graphs[0])
        for node in graphs[0].node
    )
    found = validate_artifact(ValidateRequest(tmp_path / "out"), bisect=True)
    assert not any(report.wrong for reports in found.modules.values() for report in reports)


def is_gated_weight(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether a node multiplies a weight."""
    weights = {t.name for t in graph.initializer if len(t.dims) == 2 and min(t.dims) > 1}
    return node.op_type == "Mul" and bool(weights & set(node.input))


def test_another_batch_is_refused(compiled: tuple[Path, int]) -> None:
    folder, batch = compiled
    module = diffc.load(folder, target="ort")
    text = torch.zeros(batch + 1, 8, module.config.joint_attention_dim)
    with pytest.raises(DiffcError, match=rf"takes \[{batch}, .*[\s\S]*compile again"):
        module(
            hidden_states=torch.zeros(batch + 1, module.config.in_channels, 8, 8),
            encoder_hidden_states=text,
            pooled_projections=torch.zeros(batch + 1, module.config.pooled_projection_dim),
            timestep=torch.ones(batch + 1),
        )


@pytest.mark.slow
@pytest.mark.compiles
def test_with_a_cache_plan(tmp_path: Path) -> None:
    """Kept tensors are written in terms of the sizes that are left, and no weight is stored for each model."""
    plan = "blocks:every=2,first=1,last=1"
    request = CompileRequest(
        "tiny-sd3", tmp_path / "out", dtype="float32", profile="batch=3", cache_plan=plan
    )
    result = compile_model(replace(request, targets=("ort-cuda", "ort")))
    assert {report.model for report in result.validation} > {"model.onnx"}
    assert all(report.passed for report in result.validation)
    keep, *_ = result.artifact.manifest["cache"]["models"]
    assert all(value["dims"][0] == 3 for value in (*keep["inputs"], *keep["outputs"]))
    plain = replace(request, output=tmp_path / "plain", targets=("ort-cuda",), cache_plan="")
    compile_model(replace(plain, skip_validation=True))
    sizes = {f: (tmp_path / f / "model.onnx_data").stat().st_size for f in ("out", "plain")}
    projections = sum(  # which merge-projections turns after joining: single ones have other bytes
        math.prod(t.dims) * 4
        for t in onnx.load(tmp_path / "plain" / "model.onnx", load_external_data=False).graph.initializer
        if t.name.endswith("proj.weight/joined")
    )
    assert sizes["out"] <= sizes["plain"] + 1.1 * projections
