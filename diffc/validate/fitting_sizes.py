"""Which sizes of its dynamic dimensions a graph takes, as far as ONNX's shape inference tells: nothing is run.

Some exports say "dynamic" of a dimension whose traced size went into constants that the graph reshapes and expands by.
No weight is read, so this works for a graph of any size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from passes.graph.inference import nodes_of, shell

Sizes = Mapping[str, int]
_INTEGERS = (TensorProto.INT64, TensorProto.INT32)
_MOST_AXES = 8
"""Elements of a constant that may be a shape."""
_MOST = 1 << 13
"""The largest size that is looked for among constants."""
_PATCHES = (1, 2)
"""A constant counts patches of that many rows or columns."""
_USUAL = (64, 128, 96, 16, 1, 2, 77, 24, 512, 4096)
"""Sizes of which a dimension that really is dynamic takes one: of rows, tokens and batches."""
_UNSURE = ("op_type:If", "op_type:Loop", "op_type:Scan")
"""Nodes that may hold bodies which do not run at the sizes in question."""


class FittingSizes:
    """Asks of one graph whether sizes contradict it; `tells`: whether ONNX can follow the graph at all.

    `model` has no operators that ONNX does not know.
    """

    def __init__(self, model: ModelProto):
        self._shell = shell(model)
        del self._shell.graph.value_info[:]
        for value in self._shell.graph.output:
            value.type.tensor_type.ClearField("shape")
        dims = [d for v in self._shell.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param]
        self._names = {name: [d for d in dims if d.dim_param == name] for name in (d.dim_param for d in dims)}
        self.tells = not self._problem({})

    def reason(self, sizes: Sizes) -> str:
        """Why the graph does not run at these sizes of some or all dimensions; empty where nothing contradicts it."""
        return self._problem(sizes) if self.tells else ""

    def _problem(self, sizes: Sizes) -> str:
        for name, dims in self._names.items():
            for dim in dims:
                dim.Clear()
                if name in sizes:
                    dim.dim_value = sizes[name]
                else:
                    dim.dim_param = name
        try:
            found = onnx.shape_inference.infer_shapes(self._shell, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            return _first(str(error))
        return _unequal_volume(found)

    def only_sizes(self) -> dict[str, int]:
        """The dimensions that are dynamic in name alone, and their sizes."""
        found = {name: self.only_size(name) for name in self._names}
        return {name: size for name, size in found.items() if size is not None}

    def only_size(self, name: str) -> int | None:
        """The one size of a dimension that the constants of the graph leave; None for one that takes several."""
        if not self.tells or len(list(islice(self._passing(name, _USUAL), 3))) == 3:
            return None
        found = list(self._passing(name, {*self._constants(), *_USUAL}))
        several = [size for size in found if size > 1] or found  # 1 may be there because it broadcasts
        if len(several) != 1 or any(self._passing(name, [several[0] * times for times in (2, 3, 5)])):
            return None
        return several[0]

    def _passing(self, name: str, sizes: Iterable[int]) -> Iterator[int]:
        return (size for size in sizes if not self._problem({name: size}))

    def search(self, seconds: float) -> Iterator[Sizes]:
        """Sizes of all dimensions that nothing contradicts, made of constants of the graph; ends after `seconds`."""
        if self.tells and self._names:
            end = time.monotonic() + seconds
            yield from self._search({}, list(self._names), self._constants(), end)

    def _search(
        self, sizes: Sizes, names: Sequence[str], constants: Sequence[int], end: float
    ) -> Iterator[Sizes]:
        if not names:
            yield sizes
            return
        for size in constants:
            if time.monotonic() > end:
                return
            more = {**sizes, names[0]: size}
            if not self._problem(more):
                yield from self._search(more, names[1:], constants, end)

    def _constants(self) -> list[int]:
        """The whole numbers in constants that may be shapes, those of patches doubled, and the sizes of constants.

        1 comes last.
        """
        graph = self._shell.graph
        tensors = [*graph.initializer]
        tensors += [a.t for n in nodes_of(graph) for a in n.attribute if a.name == "value"]
        short = (t for t in tensors if t.data_type in _INTEGERS and math.prod(t.dims) <= _MOST_AXES)
        found = {int(v) * p for t in short for v in np.ravel(numpy_helper.to_array(t)) for p in _PATCHES}
        tables = {size for t in tensors for size in t.dims}
        tables |= {d.dim_value for v in graph.input for d in v.type.tensor_type.shape.dim}
        return [*(v for v in [*sorted(found), *sorted(tables - found)] if 1 < v <= _MOST), 1]


def _first(error: str) -> str:
    """The first complaint of ONNX's inference; empty where it is about a body that need not run."""
    line = next((line for line in error.splitlines() if "op_type:" in line), f"op_type:? {error}")
    return "" if any(kind in line for kind in _UNSURE) else line[line.index("op_type:") :].strip()


def _unequal_volume(model: ModelProto) -> str:
    """The first Reshape that would change how many values there are; empty where none is known to."""
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    ranked = (v for v in values if v.type.tensor_type.HasField("shape"))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in ranked}
    shapes |= {t.name: list(t.dims) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Reshape" and {node.input[0], node.output[0]} <= shapes.keys():
            given, made = shapes[node.input[0]], shapes[node.output[0]]
            if all(given) and all(made) and math.prod(given) != math.prod(made):
                return f"op_type:Reshape, node name: {node.name}): a tensor of shape {given} becomes {made}"
    return ""
