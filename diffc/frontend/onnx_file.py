"""An ONNX file from elsewhere, read so that passes can take it: weights as recipes, the backbone's own names.

Only what concerns the interface and the file happens here. What nodes mean is the business of the passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from diffc.errors import DiffcError
from diffc.frontend.first_look import first_look
from diffc.frontend.onnx_interface import fix_channels, graphs_of, name_dimensions, name_interface
from diffc.frontend.onnx_values import CONTRIB as CONTRIB
from diffc.frontend.onnx_values import check_values, contrib_operators
from passes.graph.inference import infer_types
from passes.graph.trt_ops import DOMAIN, TRT_OPS
from passes.storage import bind_weights, make_recipe, read_graph
from passes.weights.recipe import default_opset

STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Imported:
    """A model that was read, and a line for each thing that was done to its interface."""

    model: ModelProto
    notes: tuple[str, ...]


def read_model(path: Path) -> Imported:
    """Read `path` for the passes; large tensors become recipes, none is kept in memory that lies beside the file.

    Raises PassError for files that are missing, corrupt or cut off, and DiffcError for operators that neither ONNX
    nor TensorRT's quantization has.
    """
    model = read_graph(path)
    notes = [f"{count} Constant nodes are weights" for count in [_hoist_constants(model, path)] if count]
    bind_weights(model, path)
    fix_domains(model)
    check_operators(model, path)
    check_places(model, path)
    _raise_ir_version(model)
    fake = _drop_weight_inputs(model.graph)
    notes += [f"{fake} weights were listed as graph inputs"] if fake else []
    _forget_types(model.graph)
    notes += name_interface(model.graph)
    notes += fix_channels(model.graph)
    notes += name_dimensions(model.graph)
    check_values(model, path)
    first_look(model, path)
    check_axes(model, path)
    return Imported(model, tuple(notes))


def _hoist_constants(model: ModelProto, path: Path) -> int:
    """Large Constant nodes become initializers, as recipes; how many."""
    count = 0
    for graph in graphs_of(model.graph):
        kept = []
        for node in graph.node:
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if node.op_type != "Constant" or value is None:
                kept.append(node)
                continue
            make_recipe(value, path)
            if value.data_location != TensorProto.EXTERNAL:
                kept.append(node)
                continue
            value.name = node.output[0]
            graph.initializer.append(value)
            count += 1
        if len(kept) != len(graph.node):
            nodes = [NodeProto.FromString(node.SerializeToString()) for node in kept]
            del graph.node[:]
            graph.node.extend(nodes)
    return count


def fix_domains(model: ModelProto) -> None:
    """Operators of TensorRT that were written without their domain, as its parser accepts, get it and its version."""
    functions = {(function.domain, function.name) for function in model.functions}
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    for node in nodes:
        if (
            node.op_type.startswith("TRT_")
            and node.op_type in TRT_OPS
            and (node.domain, node.op_type) not in functions
        ):
            node.domain = DOMAIN
    if any(node.domain == DOMAIN for node in nodes) and DOMAIN not in [
        item.domain for item in model.opset_import
    ]:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def check_operators(model: ModelProto, path: Path) -> None:
    """Raise DiffcError that names every operator that is not known, up to five."""
    opset = default_opset(model.opset_import)
    if opset is None:
        raise DiffcError(f"{path} does not say its opset", fix="export it with an opset of 17 or later")
    functions = {(function.domain, function.name) for function in model.functions}
    unknown = [
        f"{node.domain + '::' if node.domain else ''}{node.op_type} (node {node.name or node.output[0]!r})"
        for graph in graphs_of(model.graph)
        for node in graph.node
        if not _is_known(node, opset, functions)
    ]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DiffcError(
            f"{path} has operators that neither ONNX opset {opset} nor TensorRT's quantization has: "
            + ", ".join(unknown[:5])
            + more,
            fix="export the model without them, or add each as a model-local function",
        )


def check_places(model: ModelProto, where: object) -> None:
    """Raise DiffcError for a node of ONNX with fewer inputs or outputs than its operator has: passes read them."""
    opset = default_opset(model.opset_import) or 0
    parts = [node for graph in graphs_of(model.graph) for node in graph.node]
    for node in (*parts, *(node for function in model.functions for node in function.node)):
        if node.domain not in STANDARD:
            continue
        least = _least(node.op_type, opset)
        if len(node.input) < least[0] or len(node.output) < least[1]:
            raise DiffcError(
                f"{where}: {node.op_type} node {node.name[:80]!r} has {len(node.input)} inputs and {len(node.output)}"
                f" outputs, and the operator has {least[0]} and {least[1]} at least",
                fix="export the model again",
            )


@lru_cache(1024)
def _least(op: str, opset: int) -> tuple[int, int]:
    """How many inputs and outputs an operator of ONNX has at least; none for one that is not known."""
    try:
        schema = onnx.defs.get_schema(op, min(opset, onnx.defs.onnx_opset_version()), "")
    except onnx.defs.SchemaError:
        return 0, 0
    return schema.min_input, schema.min_output


def check_axes(model: ModelProto, path: Path) -> None:
    """Raise DiffcError for a Concat along an axis that its inputs do not have.

    torch's legacy exporter counts -1 from the end of a shape that it took for longer, and writes the result into a
    constant that other operators share (LTX-Video): which of their axes and sizes were -1 is not in the file.
    """
    inferred = infer_types(model)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info if _has_shape(v)}
    for node in (n for n in model.graph.node if n.op_type == "Concat" and n.domain in STANDARD):
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        found = {ranks.get(name) for name in node.input}
        rank = found.pop() if len(found) == 1 else None
        if rank is not None and not -rank <= axis < rank:
            raise DiffcError(
                f"{path}: Concat node {node.name!r} joins tensors of {rank} axes along axis {axis}, which they do not"
                " have. torch's legacy exporter overwrote a -1 there, and wherever else the model reads the same"
                " constant: no runtime opens the file, and what the other places should say is not in it",
                fix="compile the model itself: diffc compile PIPELINE; or export it with dynamo=True",
            )


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.HasField("shape"))


def _is_known(node: NodeProto, opset: int, functions: set[tuple[str, str]]) -> bool:
    if (node.domain, node.op_type) in functions:
        return True
    if node.domain == CONTRIB:  # what ONNX has as well stands there in files of old tools
        known = contrib_operators()
        return not known or node.op_type in known or onnx.defs.has(node.op_type)
    if node.domain == DOMAIN:
        return node.op_type in TRT_OPS
    # FLOAT4E2M1 models of ModelOpt are stamped with a newer opset than their nodes are of, and the other way round.
    newest = onnx.defs.onnx_opset_version()
    return node.domain in STANDARD and onnx.defs.has(node.op_type, max(opset, min(newest, 23)), "")


def _raise_ir_version(model: ModelProto) -> None:
    """ModelOpt stamps a newer opset on a file and leaves its IR version as it was; the two were published together."""
    opset = default_opset(model.opset_import) or 0
    model.ir_version = max(model.ir_version, onnx.helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", opset), 0))


def _drop_weight_inputs(graph: GraphProto) -> int:
    """Take weights off the list of graph inputs: they are constants, and nobody feeds them."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    dropped = len(graph.input) - len(inputs)
    if dropped:
        kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
        del graph.input[:]
        graph.input.extend(kept)
    return dropped


def _forget_types(graph: GraphProto) -> None:
    """Drop what the exporter says about tensors inside the graph, where ONNX or our own table says it better.

    ModelOpt leaves UINT8 on FP8 tensors, the types of before a rewrite, and nothing at all on FP4.
    """
    for part in graphs_of(graph):
        theirs = {
            name for node in part.node if node.domain not in (*STANDARD, DOMAIN) for name in node.output
        }
        kept = [value for value in part.value_info if value.name in theirs]
        values = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del part.value_info[:]
        part.value_info.extend(values)
