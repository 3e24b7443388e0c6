"""The interface of an ONNX file: names of inputs, outputs and dimensions, and the sizes that its weights decide."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnx import GraphProto, NodeProto, TensorProto

from diffc.models.family import Family
from diffc.models.registry import FAMILIES
from diffc.models.spec import InputSpec

# Names that the exporters make up: "onnx::Cast_3", "inputs.29", "hidden_states.1", "1285".
_MADE_UP = re.compile(r"onnx::.*|inputs?(\.\d+)?|.*\.\d+|\d+")
_NESTED = re.compile(r"added_cond_kwargs\.(\w+)")
_NOT_IN_A_NAME = re.compile(r"[^\w.-]+")
"""What `--profile name=min:opt:max,...` cannot spell."""
# Operators whose first output has the shape of their first input.
_SAME_SHAPE = frozenset({"Cast", "Identity", "QuantizeLinear", "DequantizeLinear"})


def name_dimensions(graph: GraphProto) -> list[str]:
    """Give every dynamic dimension of inputs and outputs a name that `--profile` can spell; a line for what changed.

    Dimensions without a name (or of size 0 or below, as some exporters write them) are called INPUT_AXIS. Of other
    names, what `--profile` reads as its own signs becomes "_".
    """
    known: dict[str, str] = {}
    notes = []
    for value in (*graph.input, *graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value > 0:
                continue
            old = dim.dim_param
            made = known.get(old) if old else None
            if made is None:
                wish = _NOT_IN_A_NAME.sub("_", old).strip("_") or f"{value.name}_{axis}"
                wish = _NOT_IN_A_NAME.sub("_", wish)
                made = wish
                while made in known.values():
                    made += "_"
                known[old or f"\0{value.name}/{axis}"] = made
                if made != old:
                    notes.append(f"axis {axis} of {value.name} is {made}")
            dim.dim_param = made
    return [f"dynamic dimensions that had no usable name: {', '.join(notes)}"] if notes else []


def fix_dimensions(graph: GraphProto, sizes: Mapping[str, int]) -> None:
    """Make the named dynamic dimensions of inputs and outputs numbers."""
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def fix_channels(graph: GraphProto) -> list[str]:
    """Make dimensions numbers whose size the weights decide; a line for what changed.

    The channels of an input that goes into a convolution, and the width of one that goes into a matrix product.
    ModelOpt's scripts declare the channels of images dynamic, as if the graph took any number.
    """
    view = _View(graph)
    sizes: dict[str, int] = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        for axis, size in view.fixed(value.name, len(dims)):
            if -len(dims) <= axis < len(dims) and dims[axis].dim_param:  # a wrong rank is for the checker
                sizes.setdefault(dims[axis].dim_param, size)
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    for value in graph.output:  # its channels are those of another weight, and inference finds them
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.ClearField("dim_param")
    return (
        [", ".join(f"{name} is {size}" for name, size in sizes.items()) + ": the weights decide it"]
        if sizes
        else []
    )


class _View:
    """Who reads a tensor, who makes it, and the shapes of constants."""

    def __init__(self, graph: GraphProto):
        self._readers: dict[str, list[NodeProto]] = {}
        self._makers: dict[str, NodeProto] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
            for name in node.output:
                self._makers[name] = node
        self._held: dict[str, TensorProto] = {t.name: t for t in graph.initializer}

    def fixed(self, name: str, rank: int) -> Iterator[tuple[int, int]]:
        """(axis, size) of a tensor that a convolution or a matrix product with constant weights reads."""
        for node in self._readers.get(name, ()):
            kind = node.op_type.removeprefix("TRT_FP8").removeprefix("TRT_INT4")
            if kind in _SAME_SHAPE and node.input[0] == name:
                yield from self.fixed(node.output[0], rank)
            shape = self.shape(node.input[1]) if len(node.input) > 1 and node.input[0] == name else None
            if shape is None:
                continue
            if node.op_type == "Conv" and len(shape) > 2:
                groups = next((a.i for a in node.attribute if a.name == "group"), 1)
                yield 1, shape[1] * groups
            elif node.op_type == "MatMul" and len(shape) == 2:
                yield rank - 1, shape[0]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant, also of one that is dequantized or transposed; None for what is computed."""
        if name in self._held:
            return tuple(self._held[name].dims)
        node = self._makers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            return None if value is None else tuple(value.dims)
        inner = self.shape(node.input[0]) if node.input else None
        if inner is None:
            return None
        if node.op_type == "Transpose":
            perm = next(
                (list(a.ints) for a in node.attribute if a.name == "perm"), [*range(len(inner))][::-1]
            )
            return tuple(inner[axis] for axis in perm)
        kind = node.op_type.removeprefix("TRT_FP8").removeprefix("TRT_INT4")
        blocks = any(a.name == "block_size" and a.i for a in node.attribute)
        return inner if kind in _SAME_SHAPE and not blocks else None


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
    """The one family whose inputs have these ranks and sizes; None when there is none or several.

    Inputs that have the family's names may come in any order; others are taken in the family's. The specs that are
    returned are in the order of the graph.
    """
    found = []
    for spec in FAMILIES.values():
        for flag in (0, 1):
            one, two = (_ordered(graph, spec.inputs(_Config(size, flag))) for size in (1, 2))
            if _fits(graph, one, two):
                found.append((spec, one))
    return found[0] if len({spec.name for spec, _ in found}) == 1 else None


def _ordered(graph: GraphProto, specs: Sequence[InputSpec]) -> Sequence[InputSpec]:
    """The specs in the order of the graph's inputs where these have their names."""
    by_name = {spec.name: spec for spec in specs}
    names = [_plain(value.name) for value in graph.input]
    return [by_name[name] for name in names] if sorted(names) == sorted(by_name) else specs


def _plain(name: str) -> str:
    """A name without the dictionary that forward() takes it in."""
    nested = _NESTED.fullmatch(name)
    return nested[1] if nested else name


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

    def get(self, key: str, default: Any = None) -> Any:
        """The default: what a config.json need not have is not in this one."""
        del key
        return default


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
    for part in graphs_of(graph):
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
    for part in graphs_of(graph):
        found |= {t.name for t in part.initializer} | {v.name for v in (*part.input, *part.output)}
        found |= {name for node in part.node for name in (*node.input, *node.output)}
    return found


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all below it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)
            for body in attribute.graphs:
                yield from graphs_of(body)
