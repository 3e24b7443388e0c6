"""Tracing a few of many equal blocks: the graph is that of a whole trace, and what cannot be stamped is not."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.frontend import trace as frontend
from diffc.frontend.blocks import KEPT, Run, find_runs, shortened
from diffc.frontend.copy_blocks import StampError, stamp
from diffc.models.embedded import tiny
from diffc.models.registry import find_family
from diffc.models.sources.backbone import build_backbone
from diffc.models.sources.locate import ModelSource
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of
from diffc.quantize.options import QuantOptions
from passes.graph.check import check_structure
from tools.bench.profile_trace import FLUX_DEV, fake_checkpoint, fake_source

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
def test_a_stamped_trace_is_the_whole_trace_byte_for_byte(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fake_source(family, DEEP[family], tmp_path)
    checkpoint = every_kind(source)
    stamped: list[Run] = []

    def recording(model: ir.Model, runs: Sequence[Run]) -> None:
        stamp(model, runs)
        stamped.extend(runs)  # not reached when it refuses

    monkeypatch.setattr(frontend, "stamp", recording)
    dtype = "bfloat16" if family == "flux" else "float16"
    ours = frontend.trace(source, dtype=dtype, checkpoint=checkpoint)
    assert stamped
    whole = frontend.trace(source, dtype=dtype, checkpoint=checkpoint, whole=True)
    assert whole.ByteSize() > 500_000
    assert ours.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


def test_flux_dev_traces_6_of_57_blocks() -> None:
    with FakeTensorMode():
        backbone: Any = build_backbone(find_family("flux"), FLUX_DEV, torch.bfloat16)
        runs = find_runs(backbone)
        with shortened(backbone, runs):
            left = [
                n
                for n, _ in backbone.named_modules()
                if re.fullmatch(r"(single_)?transformer_blocks\.\d+", n)
            ]
        assert len(backbone.transformer_blocks) == 19
    assert [(run.first, run.last) for run in runs] == [(0, 18), (0, 37)]
    assert len(left) == 2 * KEPT
    assert sum(len(run.left_out) for run in runs) == 57 - len(left)


class Block(nn.Module):
    def __init__(self, size: int, slope: float = 0.1) -> None:
        super().__init__()
        self.linear, self.slope = nn.Linear(size, size), slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.leaky_relu(self.linear(x), self.slope)


Forward = Callable[[Any, torch.Tensor], torch.Tensor]


class Network(nn.Module):
    def __init__(self, forward: Forward, count: int = 7) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(6) for _ in range(count))
        self.end, self.function = nn.Linear(6, 3), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.end(self.function(self, x))
        return result


def chain(network: Any, x: torch.Tensor) -> torch.Tensor:
    for block in network.blocks:
        x = block(x)
    return x


def shared(network: Any, x: torch.Tensor) -> torch.Tensor:
    """All blocks read what comes before them, what the first made, and the number of rows."""
    first = None
    for block in network.blocks:
        x = block(x) + x.shape[0]
        first = x if first is None else first
        x = block.linear(first) + x
    return x + first


def between(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Work of the network's own between blocks, on what the last one made."""
    for block in network.blocks:
        y = block(x)
        x = torch.cat([y[:, 3:] * 0.5, y[:, :3]], 1)
    return x


def around(network: Any, x: torch.Tensor) -> torch.Tensor:
    """The same on what a block has read."""
    for block in network.blocks:
        x = torch.cat([block(x)[:, :3], x[:, :3] * 0.5], 1)
    return x


def collected(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Two results go from block to block, and one of the last block's is not used."""
    total = x
    for block in network.blocks:
        x = block(x)
        total = total + x
    return total


def numbered(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x) * (number + 1.5)
    return x


def alternating(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x) * (0.5 if number % 2 else 0.25)
    return x


def every_third(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(-x if number % 3 == 2 else x)
    return x


def once(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x)
        x = x if number else x * 0.5
    return x


def all_but_last(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x)
        x = x if number == 2 else x * 0.5
    return x


def two_back(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Behind the second block x is read again, as something that all share would be."""
    seen = [x, x]
    for block in network.blocks:
        seen.append(block(seen[-1]) * seen[-2])
    return seen[-1]


def gathered(network: Any, x: torch.Tensor) -> torch.Tensor:
    seen = [x]
    for block in network.blocks:
        seen.append(block(seen[-1]))
    return sum(seen[1:], x)


def second_last(network: Any, x: torch.Tensor) -> torch.Tensor:
    seen = [x]
    for block in network.blocks:
        seen.append(block(seen[-1]))
    return seen[-1] + seen[-2]


def third_last(network: Any, x: torch.Tensor) -> torch.Tensor:
    seen = [x]
    for block in network.blocks:
        seen.append(block(seen[-1]))
    return seen[-1] + seen[-3]


def picked(network: Any, x: torch.Tensor) -> torch.Tensor:
    """What the last block computes on its way is a result."""
    for block in network.blocks:
        y = block.linear(x)
        x = torch.relu(y) * y
    return x + y


def exported(network: nn.Module, runs: Sequence[Run], mode: FakeTensorMode) -> Any:
    with mode, shortened(network, runs), torch.no_grad():
        x = torch.randn(5, 6)
        dynamic = ({0: torch.export.Dim("rows", min=1, max=64)},)
        program = torch.export.export(network, (x,), dynamic_shapes=(dynamic[0],), strict=False)
        return torch.onnx.export(program, dynamo=True, opset_version=23, optimize=False, verbose=False)


def fake(forward: Forward) -> tuple[nn.Module, list[Run], Any]:
    """A network on fake tensors, its runs and its ONNX program without the blocks that they leave out."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        network = Network(forward).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    runs = find_runs(network)
    return network, runs, exported(network, runs, mode)


@pytest.mark.parametrize("forward", [chain, shared, between, around, collected])
def test_stamped_blocks_compute_what_torch_does(forward: Forward, tmp_path: Path) -> None:
    _, runs, program = fake(forward)
    assert [run.left_out for run in runs] == [("blocks.2", "blocks.3", "blocks.4", "blocks.5")]
    stamp(program.model, runs)
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


def text(graph: ir.Graph) -> list[str]:
    return [*graph.initializers, *(str(node) for node in graph)]


REFUSED = (
    *(numbered, alternating, every_third, once, all_but_last),
    *(two_back, gathered, second_last, third_last, picked),
)


@pytest.mark.parametrize("forward", REFUSED)
def test_networks_that_do_not_repeat_are_refused_and_left_alone(forward: Forward) -> None:
    _, runs, program = fake(forward)
    before = text(program.model.graph)
    with pytest.raises(StampError):
        stamp(program.model, runs)
    assert text(program.model.graph) == before


def test_values_of_a_blocks_own_are_not_copied() -> None:
    _, runs, program = fake(chain)
    weight = program.model.graph.initializers["blocks.1.linear.bias"]
    weight.const_value = ir.tensor(np.ones(6, np.float32))
    with pytest.raises(StampError, match="own"):
        stamp(program.model, runs)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda blocks: setattr(blocks[3], "slope", 0.2), []),
        (lambda blocks: setattr(blocks[0], "slope", 0.2), [(1, 6)]),
        (lambda blocks: setattr(blocks[6].linear, "bias", None), [(0, 5)]),
        (lambda blocks: blocks[5].double(), [(0, 4)]),
        (lambda blocks: blocks[2].register_forward_hook(lambda *_: None), [(3, 6)]),
        (lambda blocks: setattr(blocks[1], "linear", nn.Identity()), [(2, 6)]),
        (lambda blocks: setattr(blocks[6], "options", {"a": (1, 2)}), [(0, 5)]),
        (lambda blocks: setattr(blocks[6].linear, "weight", blocks[1].linear.weight), []),
        (lambda blocks: None, [(0, 6)]),
    ],
)
def test_only_equal_blocks_are_a_run(
    damage: Callable[[Any], object], expected: list[tuple[int, int]]
) -> None:
    network = Network(chain)
    damage(network.blocks)
    assert [(run.first, run.last) for run in find_runs(network)] == expected


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
