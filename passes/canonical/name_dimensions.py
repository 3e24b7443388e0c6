"""name-dimensions: every dynamic dimension of an input gets a name that options can spell."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register, walk
from passes.graph.inference import fill_types
from passes.graph.to_onnx import export_model, tensors_of

_PLAIN = re.compile(r"[\w.-]+")
Dimension = int | str | None


@register
@dataclass(frozen=True)
class NameDimensions(Pass):
    """Name the dimensions of the graph's inputs, so that profiles and fix-size can speak of them.

    1. A dimension without a name, or of size 0 or below, which exporters write where they know none
       before: x [?, 3, ?]      after: x [x_0, 3, x_2]
    2. A name with other characters than letters, digits, `_`, `.` and `-`, everywhere in the graph
       before: x [batch size]      after: x [batch_size]

    Shapes that follow from the inputs are inferred anew. Inputs of unknown rank stay.
    """

    name: ClassVar[str] = "name-dimensions"

    def run(self, graph: gs.Graph) -> PassResult:
        """Name the inputs, then infer all other shapes from them."""
        taken = {dim for tensor in graph.inputs for dim in tensor.shape or () if isinstance(dim, str)}
        renamed: dict[str, str] = {}
        notes: list[str] = []
        for tensor in graph.inputs:
            for axis, dim in enumerate(tensor.shape or ()):
                if _is_named(dim) or dim in renamed:
                    continue
                wish = _spelled(dim) if isinstance(dim, str) and dim else _spelled(f"{tensor.name}_{axis}")
                name = _fresh(wish, taken)
                notes.append(f"dimension {axis} of {tensor.name!r} is called {name}")
                if isinstance(dim, str) and dim:
                    renamed[dim] = name
                else:
                    tensor.shape[axis] = name
        if not notes:
            return PassResult()
        _rename(graph, renamed)
        fill_types(graph, export_model(graph))
        return PassResult(len(notes), tuple(notes))


def _is_named(dim: Dimension) -> bool:
    """Whether a dimension is a number from 1 on, or a name that options can spell and that ONNX did not make up."""
    if isinstance(dim, str):
        return _PLAIN.fullmatch(dim) is not None and not dim.startswith("unk__")
    return dim is not None and dim > 0


def _spelled(text: str) -> str:
    """The text with `_` for what options cannot spell."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_") or "size"


def _fresh(wish: str, taken: set[str]) -> str:
    name, number = wish, 1
    while name in taken:
        number += 1
        name = f"{wish}_{number}"
    taken.add(name)
    return name


def _rename(graph: gs.Graph, renamed: dict[str, str]) -> None:
    """Let shapes have the new names; a shape in which a dimension is not known is forgotten, and inferred later."""
    ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for part in walk(graph):
        for tensor in tensors_of(part).values():
            if not isinstance(tensor, gs.Variable) or tensor.shape is None:
                continue
            tensor.shape = [renamed.get(dim, dim) for dim in tensor.shape]
            if id(tensor) not in ends and not all(map(_is_named, tensor.shape)):
                tensor.shape = None
