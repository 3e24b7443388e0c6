"""fix-axes: an axis that lies one behind the last, as torch's legacy exporter writes it, becomes the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import Names, inline
from passes.graph.match import array_of, producer

_SAME = frozenset(
    (
        *(
            "Cast",
            "Clip",
            "Cos",
            "Erf",
            "Exp",
            "Gelu",
            "Identity",
            "LayerNormalization",
            "Neg",
            "Pad",
            "Relu",
        ),
        *(
            "Sigmoid",
            "Sin",
            "Slice",
            "Softmax",
            "Sqrt",
            "Tanh",
            "Transpose",
            "QuantizeLinear",
            "DequantizeLinear",
        ),
    )
)
"""Operators whose output has the rank of their first input."""
_BROADCAST = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Where", "Equal", "Greater", "Less"])


@register
@dataclass(frozen=True)
class FixAxes(Pass):
    """Read an axis that is equal to the rank as the last axis.

    The exporter counts a negative axis from the end of the shape that it has inferred. Where that has one dimension
    too many (it takes `x.flatten()` of a matrix for a matrix), -1 becomes an axis that does not exist:

    1. Concat<axis = r>(a, b) of tensors of rank r  ->  Concat<axis = r - 1>(a, b)
    2. Gather<axis = 0>(Shape(x), r) of x of rank r  ->  Gather<axis = 0>(Shape(x), r - 1)

    Any larger axis, or one of a tensor whose rank is not known, is left alone. As it stands such a graph is no valid
    ONNX, and no runtime opens it.
    """

    name: ClassVar[str] = "fix-axes"

    def run(self, graph: gs.Graph) -> PassResult:
        """One sweep in graph order: what follows a fixed node has its rank from it."""
        names, fixed = Names(graph), list[str]()
        for part in walk(graph):
            ranks: dict[int, int] = {}
            for node in part.nodes:
                if (fix := _FIXES.get(node.op)) is not None and fix(node, ranks, names):
                    fixed.append(node.name)
                rank = _output_rank(node, ranks)
                for tensor in node.outputs if rank is not None else ():
                    ranks[id(tensor)] = rank
        notes = (f"{len(fixed)} axes behind the last, such as that of {fixed[0]!r}",) if fixed else ()
        return PassResult(len(fixed), notes)


def _rank(tensor: gs.Tensor, ranks: Mapping[int, int]) -> int | None:
    if id(tensor) in ranks:
        return ranks[id(tensor)]
    return None if tensor.shape is None else len(tensor.shape)


def _fix_concat(node: gs.Node, ranks: Mapping[int, int], _: Names) -> bool:
    found = {_rank(tensor, ranks) for tensor in node.inputs}
    if len(found) != 1 or node.attrs.get("axis") not in found or None in found:
        return False
    node.attrs["axis"] -= 1
    return True


def _fix_gather(node: gs.Node, ranks: Mapping[int, int], names: Names) -> bool:
    shape, index = producer(node.inputs[0]), _constant(node.inputs[1])
    if shape is None or shape.op != "Shape" or shape.attrs or index is None or index.size != 1:
        return False
    if int(index.reshape(-1)[0]) != _rank(shape.inputs[0], ranks):
        return False
    node.inputs[1] = inline(names.fresh(f"{node.name}/last"), (index - 1).astype(np.int64))
    return True


_FIXES: Mapping[str, Callable[[gs.Node, Mapping[int, int], Names], bool]] = {
    "Concat": _fix_concat,
    "Gather": _fix_gather,
}


def _output_rank(node: gs.Node, ranks: Mapping[int, int]) -> int | None:
    """The rank of what a node gives, where it is plain to see."""
    own = [_rank(tensor, ranks) for tensor in node.inputs if not tensor.is_empty()]
    if node.op in _SAME or node.op == "Concat":
        return own[0]
    if node.op in _BROADCAST:
        return None if None in own else max(rank for rank in own if rank is not None)
    if node.op in ("Gemm", "Flatten"):
        return 2
    if node.op == "Reshape":
        target = _constant(node.inputs[1])
        return None if target is None else target.size
    if node.op == "Unsqueeze" and len(node.inputs) > 1 and own[0] is not None:
        axes = _constant(node.inputs[1])
        return None if axes is None else own[0] + axes.size
    return _rank(node.outputs[0], {}) if node.outputs else None


def _constant(tensor: gs.Tensor) -> np.ndarray | None:
    """The value of a constant or of a Constant node."""
    node = producer(tensor)
    if node is not None and node.op == "Constant":
        return array_of(node.attrs["value"]) if "value" in node.attrs else None
    return array_of(tensor) if isinstance(tensor, gs.Constant) else None
