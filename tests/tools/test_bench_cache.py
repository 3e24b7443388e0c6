"""Operations of cached steps: as torch counts them; and tools/bench/cache.py on an embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffc.compile.cached.operations import count_operations
from diffc.errors import DiffcError
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import find_family
from diffc.models.sources.backbone import build_backbone
from diffc.models.sources.locate import locate
from diffc.models.spec import Shape
from passes.storage import load
from tests import ROOT
from tests.conftest import Cells

SHAPE = Shape(2, 64, 96, 21)
SMALL = {"targets": ("ort",), "sms": (), "dtype": "float32", "skip_validation": True}


def counted_by_torch(model: str) -> int:
    source = locate(model)
    spec = source.family
    values = random_inputs(spec, source.config, SHAPE, dtype=torch.float32, seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        backbone = build_backbone(spec, source.config, torch.float32)
        with FlopCounterMode(display=False) as counter:
            backbone(**forward_kwargs(spec, source.config, values))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("model", ["digits-sd3", "digits-sdxl"])
def test_operations_are_those_that_torch_counts(compiled: Cells, model: str) -> None:
    cell = compiled(model, "none", **SMALL)
    sizes = locate(model).family.sizes(SHAPE)
    graph = load(cell.folder / "model.onnx")
    found = count_operations(graph, sizes, {})
    assert found.total() == counted_by_torch(model)
    assert found["Attention"] > 0
    larger = count_operations(graph, sizes | {"batch": 4}, {})
    assert larger["Attention"] == 2 * found["Attention"]


def test_a_shape_that_is_not_known_is_named(compiled: Cells) -> None:
    graph = load(compiled("digits-sd3", "none", **SMALL).folder / "model.onnx")
    first = next(node for node in graph.graph.node if node.op_type == "MatMul")
    first.input[0] = _behind_unknown(graph, first)
    with pytest.raises(DiffcError, match=r"the shape of .* at .* is not known"):
        count_operations(graph, find_family("sd3").sizes(SHAPE), {})


def _behind_unknown(graph: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """An operator in front of `node` that ONNX does not know."""
    place = list(graph.graph.node).index(node)
    graph.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    strange = onnx.helper.make_node("Odd", [node.input[0]], ["strange"], "strange", domain="elsewhere")
    graph.graph.node.insert(place, strange)
    return "strange"


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["full+reduced", "segments"])
def test_the_tool_measures_every_model_and_the_generation(tmp_path: Path, layout: str) -> None:
    table = tmp_path / "rows.json"
    options = ["digits-sd3", "blocks:first=0,every=4", "--size", "64", "--repeat", "2", "--json", str(table)]
    options += ["--layout", layout]
    subprocess.run([sys.executable, "-m", "tools.bench.cache", *options], cwd=ROOT, check=True, timeout=300)
    content = json.loads(table.read_text(encoding="utf-8"))
    plain, keep, reuse = content["models"]
    assert plain["gflop"] == keep["gflop"] > 2 * reuse["gflop"] > 0
    assert min(row["ms"] for row in content["models"]) > 0
    assert all(row["rel_l2"] < 1e-5 for row in content["models"])
    step, generation = content["savings"]
    assert step["operations"] == pytest.approx(1 - reuse["gflop"] / plain["gflop"])
    assert generation["operations"] == pytest.approx(0.75 * step["operations"])  # 15 of 20 steps
