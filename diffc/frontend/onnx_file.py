"""An ONNX file from elsewhere, read so that passes can take it: weights as recipes, the backbone's own names.

Only what concerns the interface and the file happens here. What nodes mean is the business of the passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from diffc.errors import DiffcError
from diffc.models.family import Family
from diffc.models.registry import FAMILIES
from diffc.models.spec import InputSpec
from passes.graph.trt_ops import DOMAIN, TRT_OPS
from passes.storage import bind_weights, make_recipe, read_graph
from passes.weights.recipe import default_opset

STANDARD = ("", "ai.onnx")
CONTRIB = "com.microsoft"
# Names that the exporters make up: "onnx::Cast_3", "inputs.29", "hidden_states.1", "1285".
_MADE_UP = re.compile(r"onnx::.*|inputs?(\.\d+)?|.*\.\d+|\d+")
_NESTED = re.compile(r"added_cond_kwargs\.(\w+)")


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
    _raise_ir_version(model)
    fake = _drop_weight_inputs(model.graph)
    notes += [f"{fake} weights were listed as graph inputs"] if fake else []
    _forget_types(model.graph)
    notes += name_interface(model.graph)
    return Imported(model, tuple(notes))


def _hoist_constants(model: ModelProto, path: Path) -> int:
    """Large Constant nodes become initializers, as recipes; how many."""
    count = 0
    for graph in _graphs(model.graph):
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
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
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
        for graph in _graphs(model.graph)
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


def _is_known(node: NodeProto, opset: int, functions: set[tuple[str, str]]) -> bool:
    if (node.domain, node.op_type) in functions or node.domain == CONTRIB:
        return True
    if node.domain == DOMAIN:
        return node.op_type in TRT_OPS
    # FLOAT4E2M1 models of ModelOpt are stamped with a newer opset than their nodes are of, and the other way round.
    newest = onnx.defs.onnx_opset_version()
    return node.domain in STANDARD and onnx.defs.has(node.op_type, max(opset, min(newest, 23)), "")


def _raise_ir_version(model: ModelProto) -> None:
    """ModelOpt stamps a newer opset on a file and leaves its IR version behind; they came out together."""
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
    for part in _graphs(graph):
        theirs = {
            name for node in part.node if node.domain not in (*STANDARD, DOMAIN) for name in node.output
        }
        kept = [value for value in part.value_info if value.name in theirs]
        values = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del part.value_info[:]
        part.value_info.extend(values)


def name_interface(graph: GraphProto) -> list[str]:
    """Give inputs and the output the names of the family that they identify; a line for what was renamed."""
    inputs = {name: match[1] for name in (v.name for v in graph.input) if (match := _NESTED.fullmatch(name))}
    family = family_of_interface(graph)
    outputs: dict[str, str] = {}
    if family is not None:
        spec, specs = family
        pairs = zip(graph.input, specs, strict=True)
        inputs |= {v.name: s.name for v, s in pairs if _MADE_UP.fullmatch(v.name) and v.name != s.name}
        if len(graph.output) == 1 and _MADE_UP.fullmatch(graph.output[0].name):
            outputs = {graph.output[0].name: spec.output}
    taken = _names(graph)
    renamed = {old: new for old, new in (inputs | outputs).items() if new not in taken}
    _rename(graph, renamed)
    what = f"the interface of {family[0].name}: " if family is not None else ""
    return [what + ", ".join(f"{old} is {new}" for old, new in renamed.items())] if renamed else []


def family_of_interface(graph: GraphProto) -> tuple[Family, Sequence[InputSpec]] | None:
    """The one family whose inputs, in order, have these ranks and sizes; None when there is none or several."""
    found = [
        (spec, inputs)
        for spec in FAMILIES.values()
        for flag in (0, 1)
        for inputs in [spec.inputs(_Config(1, flag))]
        if _fits(graph, inputs, spec.inputs(_Config(2, flag)))
    ]
    return found[0] if len({spec.name for spec, _ in found}) == 1 else None


class _Config(Mapping[str, int]):
    """A config.json in which every size is `size` and every switch (`..._embeds`) is `flag`."""

    def __init__(self, size: int, flag: int):
        self._size, self._flag = size, flag

    def __getitem__(self, key: str) -> int:
        return self._flag if key.endswith("_embeds") else self._size

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _fits(graph: GraphProto, one: Sequence[InputSpec], two: Sequence[InputSpec]) -> bool:
    """Whether inputs fit; a size that differs between two configs is the model's own and may be anything."""
    if len(graph.input) != len(one):
        return False
    sizes: dict[str, int | str] = {}
    for value, first, second in zip(graph.input, one, two, strict=True):
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if len(first.dims) < 2 and len(dims) < 2:
            continue  # timestep and guidance: exporters trace them as a scalar, as one step or as a batch
        if len(dims) != len(first.dims):
            return False
        for dim, a, b in zip(dims, first.dims, second.dims, strict=True):
            if isinstance(a, str):
                if isinstance(dim, int) and isinstance(sizes.setdefault(a, dim), int) and sizes[a] != dim:
                    return False
            elif a == b and dim != a:
                return False
    return True


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors everywhere in a graph and its subgraphs."""
    if not names:
        return
    for part in _graphs(graph):
        for value in (*part.input, *part.output, *part.value_info):
            value.name = names.get(value.name, value.name)
        for node in part.node:
            for field in (node.input, node.output):
                for index, name in enumerate(field):
                    if name in names:
                        field[index] = names[name]


def _names(graph: GraphProto) -> set[str]:
    """Every tensor name in use."""
    found: set[str] = set()
    for part in _graphs(graph):
        found |= {t.name for t in part.initializer} | {v.name for v in (*part.input, *part.output)}
        found |= {name for node in part.node for name in (*node.input, *node.output)}
    return found


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all below it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for body in attribute.graphs:
                yield from _graphs(body)
