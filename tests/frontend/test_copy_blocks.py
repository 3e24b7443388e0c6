"""Tracing a few of many equal blocks: the graph is that of a whole trace."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.frontend import trace as frontend
from diffc.frontend.blocks import Run
from diffc.frontend.copy_blocks import copy_blocks
from diffc.models.embedded import tiny
from diffc.models.sources.backbone import build_backbone
from diffc.models.sources.locate import ModelSource
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of
from diffc.quantize.options import QuantOptions
from passes.graph.check import check_structure
from tests.frontend.block_networks import REPEATING, Forward, Network, fake
from tools.bench.profile_trace import fake_checkpoint, fake_source

DEEP: dict[str, dict[str, Any]] = {
    "flux": tiny.FLUX | {"num_layers": 5, "num_single_layers": 6},
    "sd3": tiny.SD35 | {"num_layers": 9},  # two dual blocks, six plain ones, the last without a text output
    "sdxl": tiny.SDXL | {"transformer_layers_per_block": (1, 1, 6)},
}
KINDS = ("int8", "fp8", "int4_awq", "w4a8_awq", "nvfp4", "nvfp4_svdquant", "mxfp8")
RANK = 8


def every_kind(source: ModelSource) -> Checkpoint:
    """A checkpoint in which neighbouring layers have different formats, equal blocks the same ones."""
    found = {kind: fake_checkpoint(source, kind, QuantOptions(mha=kind == "fp8")) for kind in KINDS}
    held = {kind: checkpoint for kind, checkpoint in found.items() if checkpoint is not None}
    layers = {kind: {layer_of(path) for path in c.settings} for kind, c in held.items()}
    of: dict[str, str] = {}
    for layer in sorted(set().union(*layers.values())):
        fitting = [kind for kind in KINDS if layer in layers[kind]]
        of[layer] = fitting[zlib.crc32(re.sub(r"\d+", "#", layer).encode()) % len(fitting)]
    assert set(of.values()) == set(KINDS)
    settings = {p: s for k, c in held.items() for p, s in c.settings.items() if of[layer_of(p)] == k}
    amax = {p: a for k, c in held.items() for p, a in c.amax.items() if of[layer_of(p)] == k}
    base = held["fp8"]
    return Checkpoint(
        base.family, "fp8", base.config, settings, amax, scaling=scaling_of(source, of, settings)
    )


def scaling_of(source: ModelSource, of: dict[str, str], settings: Any) -> dict[str, Any]:
    """Channel factors for AWQ layers, and low-rank branches as well for SVDQuant, all different."""
    with FakeTensorMode():
        backbone = build_backbone(source.family, source.config, torch.float32)
    rng, scaling = np.random.default_rng(5), {}
    for layer, kind in of.items():
        weight = f"{layer}.weight_quantizer"
        if kind not in ("w4a8_awq", "nvfp4_svdquant") or f"{layer}.input_quantizer" not in settings:
            continue
        rows, columns = backbone.get_parameter(f"{layer}.weight").shape
        draw = {f"{layer}.input_quantizer.pre_quant_scale": (columns,)}
        if kind == "nvfp4_svdquant":
            draw |= {f"{weight}.svdquant_lora_a": (RANK, columns), f"{weight}.svdquant_lora_b": (rows, RANK)}
        scaling |= {k: rng.uniform(0.5, 2, size).astype(np.float32) for k, size in draw.items()}
    assert any(name.endswith("lora_a") for name in scaling)
    return scaling


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=pytest.mark.slow) for family in ("flux", "sd3", "sdxl")],
)
def test_a_trace_with_copies_is_the_whole_trace_byte_for_byte(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fake_source(family, DEEP[family], tmp_path)
    checkpoint = every_kind(source)
    copied: list[Run] = []

    def recording(model: ir.Model, runs: Sequence[Run]) -> None:
        copy_blocks(model, runs)
        copied.extend(runs)  # not reached when it refuses

    monkeypatch.setattr(frontend, "copy_blocks", recording)
    dtype = "bfloat16" if family == "flux" else "float16"
    ours = frontend.trace(source, dtype=dtype, checkpoint=checkpoint)
    assert copied
    whole = frontend.trace(source, dtype=dtype, checkpoint=checkpoint, whole=True)
    assert whole.ByteSize() > 500_000
    assert ours.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


@pytest.mark.parametrize("forward", REPEATING)
def test_copied_blocks_compute_what_torch_does(forward: Forward, tmp_path: Path) -> None:
    _, runs, program = fake(forward)
    assert [run.left_out for run in runs] == [("blocks.2", "blocks.3", "blocks.4", "blocks.5")]
    copy_blocks(program.model, runs)
    torch.manual_seed(8)
    network = Network(forward).eval()
    state = network.state_dict()
    assert set(program.model.graph.initializers) == set(state)
    for name, value in program.model.graph.initializers.items():
        value.const_value = ir.tensor(state[name].numpy(), name=name)
    model = program.model_proto
    model.ir_version = 11
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "m.onnx")
    x = torch.randn(9, 6)
    with torch.no_grad(), OrtSession(tmp_path / "m.onnx") as session:
        (ours,) = session.run({model.graph.input[0].name: x.numpy()}).values()
        theirs = network(x).numpy()
        network.blocks[4].linear.weight += 0.1
        damaged = network(x).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(damaged - theirs).max() > 1e-3


def test_the_structural_check_is_linear_in_nodes() -> None:
    def seconds(count: int) -> float:
        nodes = [
            onnx.helper.make_node("Transpose", [f"x{i}"], [f"x{i + 1}"], f"n{i}", perm=[0, 1])
            for i in range(count)
        ]
        ends = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2])
            for name in ("x0", f"x{count}")
        ]
        graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
        times = []
        for _ in range(3):
            start = time.process_time()
            check_structure(None, model, None)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(16000) < 8 * seconds(
        4000
    )  # linear: 4 times; when every attribute copied all names: 14 times
