"""torch modules of a pipeline (text encoders, VAE) -> ONNX files that run everywhere the backbone does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.commands.package.graphs import Graph
from diffc.errors import MismatchError
from diffc.frontend.names import name_nodes
from diffc.frontend.trace import IR_VERSION, quiet_exporter, to_onnx
from diffc.validate.compare import compare
from passes import Pipeline
from passes.presets import CANONICAL, target_passes
from passes.storage import save
from passes.weights.initializers import INLINE_BYTES
from passes.weights.sources import keep

# Relative L2 error of an output in ONNX Runtime against torch, in the same type. Measured on the embedded models: 1e-6
# and 2e-3; a file in which one weight is 10 % off has 1e-2 and more.
MAX_REL_L2 = {"float32": 1e-4, "float16": 1e-2}


def export(graph: Graph) -> onnx.ModelProto:
    """The graph at opset 23, weights as recipes over the module's memory, rewritten as TensorRT-RTX wants it.

    That form is plain ONNX, which ONNX Runtime runs on every provider: attention without a fused kernel there
    (float32, the wide heads of a VAE) is decomposed.
    """
    with quiet_exporter(), torch.no_grad():
        exported = torch.export.export(
            graph.module, (graph.feed[1],), dynamic_shapes=(_dynamic(graph),), strict=False
        )
        program = to_onnx(exported)
    _name(program.model, graph)
    _keep_weights(program.model)
    model: onnx.ModelProto = program.model_proto
    model.ir_version, model.producer_name = IR_VERSION, "diffc"
    return Pipeline((*CANONICAL, *target_passes("ort-trt-rtx"))).run(model).model


def write(graph: Graph, folder: Path) -> None:
    """Export the graph to `folder`: model.onnx with its weights beside it, and config.json."""
    import json

    folder.mkdir(parents=True)
    save(export(graph), folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps(dict(graph.config), indent=2), encoding="utf-8")


def check(graph: Graph, file: Path) -> float:
    """The largest relative L2 error of an output in ONNX Runtime on the CPU, against the torch module.

    Raises MismatchError beyond `MAX_REL_L2`, with the component's name.
    """
    name, value = graph.feed
    with torch.no_grad():
        given = graph.module(value)
    wanted = [given] if isinstance(given, torch.Tensor) else list(given)
    reference = {key: tensor.float().numpy() for key, tensor in zip(graph.outputs, wanted, strict=True)}
    with OrtSession(file, exact=True) as session:
        result = {key: array.astype("float32") for key, array in session.run({name: value.numpy()}).items()}
    dtype = "float16" if any(p.dtype == torch.float16 for p in graph.module.parameters()) else "float32"
    rows = compare(reference, result, MAX_REL_L2[dtype])
    for row in rows:
        if not row.passed:
            raise MismatchError(f"{graph.name}: output {row.name} differs from torch: {row.reason}")
    return max(row.rel_l2 or 0.0 for row in rows)


def _dynamic(graph: Graph) -> dict[int, Any]:
    """`dynamic_shapes` of the feed for torch.export."""
    found = {}
    for index, dim in enumerate(graph.dims):
        if isinstance(dim, str):
            factor, _, name = dim.rpartition(" * ")
            symbol = torch.export.Dim(f"_{name}" if factor else name, min=1, max=graph.most.get(name))
            found[index] = int(factor) * symbol if factor else symbol
    return found


def _name(model: ir.Model, graph: Graph) -> None:
    """Give the graph the names of the contract. Inner values keep only dimensions that the input names."""
    name_nodes(model.graph)
    (feed,) = model.graph.inputs
    known = {str(old): new for old, new in zip(feed.shape or (), graph.dims, strict=True)}
    feed.name, feed.shape = graph.feed[0], ir.Shape(graph.dims)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([d if isinstance(d, int) else known.get(str(d)) for d in value.shape])
    for value, (name, dims) in zip(model.graph.outputs, graph.outputs.items(), strict=True):
        value.name, value.shape = name, ir.Shape(dims)
    model.graph.name = re.sub(r"\W", "_", graph.name)


def _keep_weights(model: ir.Model) -> None:
    """Replace large initializers by recipes over the module's own memory, so that the protobuf holds no copy."""
    for name, value in _large(model):
        array: Any = value.const_value
        value.const_value = ir.serde.TensorProtoTensor(keep(array.numpy()).to_tensor(name))


def _large(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
            yield name, value
