"""Operators that only move data: what they do to shapes and axes, and which quantized types they take."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import onnx
import onnx_graphsurgeon as gs

from passes.graph.grids import Grid
from passes.graph.match import STANDARD, input_of, permutation
from passes.weights.recipe import dtype_of

_SAME_SIZE = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_PICKS = frozenset({"Slice", "Split", "Gather"})
_GROWS = frozenset({"Expand", "Tile"})
_BLOCKS = frozenset({"DepthToSpace", "SpaceToDepth"})
_TAKE_FLOAT8 = frozenset({"Transpose", "Reshape", "Identity"})
_INTEGERS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
MOVES = _SAME_SIZE | _PICKS | _GROWS | _BLOCKS


def is_move(node: gs.Node | None) -> bool:
    """Whether a node moves the data of its first input and computes nothing. Concat is one, too."""
    if node is None or node.domain not in STANDARD:
        return False
    if node.op == "Gather":
        return isinstance(node.inputs[1], gs.Constant)
    return node.op in MOVES or node.op == "Concat"


def data_inputs(node: gs.Node) -> list[gs.Tensor]:
    """The inputs that are moved; the others are shapes, axes and indices."""
    return list(node.inputs) if node.op == "Concat" else [node.inputs[0]]


@lru_cache(maxsize=1024)
def takes(op: str, opset: int, dtype: int) -> bool:
    """Whether ONNX, ONNX Runtime and TensorRT all let `op` move an element type.

    ONNX has no Slice, Split, Concat ... of 8-bit floats. TensorRT-RTX 1.7 builds no Squeeze and Unsqueeze of them
    ("has datatype FP8 but is not consumed by"), and ONNX Runtime 1.31 runs neither these nor Flatten.
    """
    if dtype not in _INTEGERS and op not in _TAKE_FLOAT8:
        return False
    schema = onnx.defs.get_schema(op, opset, "")
    name = schema.outputs[0].type_str
    allowed = next(c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == name)
    return f"tensor({onnx.TensorProto.DataType.Name(dtype).lower()})" in allowed


def grows(node: gs.Node) -> bool:
    """Whether the output can have more elements than the inputs."""
    return node.op in _GROWS


def size_ratio(node: gs.Node, output: gs.Tensor) -> Fraction:
    """Elements of an output for each element of the first input, from below: 0 when that is not known."""
    if node.op in _SAME_SIZE | _BLOCKS | _GROWS:
        return Fraction(1)
    was, now = (_extent(t.shape) for t in (node.inputs[0], output))
    if was is None or now is None or was[1] != now[1] or not was[0]:
        return Fraction(0)
    return Fraction(now[0], was[0])


def _extent(dims: list[int | str | None] | None) -> tuple[int, tuple[str, ...]] | None:
    """The product of dimensions: of the numbers, and the symbols; None when one is not known."""
    known = [dim for dim in dims or [] if dim is not None]
    if dims is None or len(known) < len(dims):
        return None
    numbers = [dim for dim in known if not isinstance(dim, str)]
    return math.prod(numbers), tuple(sorted(dim for dim in known if isinstance(dim, str)))


def grid_before(node: gs.Node, grid: Grid) -> Grid | None:
    """The grid of a move's input when `grid` is that of its output; None when there is none."""
    return grid if grid.axis is None else _moved(node, grid, backward=True)


def grid_after(node: gs.Node, grid: Grid) -> Grid | None:
    """The grid of a move's output when `grid` is that of its input; None when there is none."""
    return grid if grid.axis is None else _moved(node, grid, backward=False)


def _moved(node: gs.Node, grid: Grid, *, backward: bool) -> Grid | None:
    """The grid along the axis to which the channels move. None for blocks: their scales would have to move too."""
    axis = grid.axis
    if axis is None or grid.block_size:
        return None
    if node.op == "Transpose":
        perm = permutation(node, len(node.outputs[0].shape or []))
        return grid.on(perm[axis] if backward else perm.index(axis)) if len(perm) > axis else None
    here, there = (node.inputs[0].shape, node.outputs[0].shape)[:: -1 if backward else 1]
    if here is None or there is None:
        return None
    if node.op in _SAME_SIZE:
        found = _same_axis(here, there, axis)
        return None if found is None else grid.on(found)
    if node.op in ("Concat", "Slice", "Split") and len(here) == len(there) and _untouched(node, axis):
        return grid
    return None


def _same_axis(here: list[int | str | None], there: list[int | str | None], axis: int) -> int | None:
    """The axis of a reshaped tensor that counts the same channels: as many elements lie before it."""
    ahead = _extent(here[:axis])
    if ahead is None or here[axis] is None:
        return None
    fits = (i for i, dim in enumerate(there) if dim == here[axis] and _extent(there[:i]) == ahead)
    return next(fits, None)


def _untouched(node: gs.Node, axis: int) -> bool:
    """Whether Concat, Slice or Split leaves the channels on `axis` as they are."""
    if node.op != "Slice":
        return bool(node.attrs.get("axis", 0) % len(node.outputs[0].shape) != axis)
    was, now = node.inputs[0].shape[axis], node.outputs[0].shape[axis]
    steps = input_of(node, 4)
    return isinstance(was, int) and was == now and steps is None


def element_type(tensor: gs.Tensor) -> str:
    """The name of a tensor's element type, for messages."""
    dtype = dtype_of(tensor)
    return "unknown" if dtype is None else str(onnx.TensorProto.DataType.Name(dtype))
