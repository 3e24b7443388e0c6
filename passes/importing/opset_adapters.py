"""What changed in an operator between opsets, where the schemas alone do not say that a node stands as it is.

`ADAPTERS` rewrite a node; `KEEPS` are changes read by a person: what the operator gained is, left out, what it
did before. Keys are the operator and the opset that changed it. Every other change must show from the two
schemas that it is harmless (`passes.importing.rewrite_opset`).

Prose that changed without the schema, and no evaluator follows by opset: MaxPool and AveragePool 22 name the
windows that start in the right padding, and Attention 24 rows without any key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.graph.edit import Emitter
from passes.importing import older_opsets
from passes.importing.older_opsets import CannotConvertError, Rewrite
from passes.weights.recipe import dtype_of

# The values that the attributes of the function around a node have: its default and those of all callers.
# None where a caller leaves out an attribute without default; a reference where a caller hands on its own.
Scope = Mapping[str, Sequence[Any]]
Adapter = Callable[[gs.Node, Scope], "Rewrite | None"]


def _axes_to_input(node: gs.Node, scope: Scope) -> Rewrite | None:
    """Reductions take their axes as an input; no axes and an empty list both mean all, before and after."""
    axes = node.attrs.get("axes")
    if axes is None:
        return None
    _must_be_given(node, "axes", scope)

    def rewrite(emit: Emitter) -> None:
        del node.attrs["axes"]
        if isinstance(axes, gs.Node.AttributeRef):
            node.inputs.append(emit.emit("Constant", [], np.int64, value_ints=axes))
        elif axes:
            node.inputs.append(emit.constant("axes", np.array(axes, np.int64)))

    return rewrite


def _split_count(node: gs.Node, _: Scope) -> Rewrite | None:
    """A Split without sizes says into how many parts."""
    sized = "split" in node.attrs  # before opset 13
    if sized or (len(node.inputs) > 1 and not node.inputs[1].is_empty()):
        return None

    def rewrite(_: Emitter) -> None:
        node.attrs["num_outputs"] = len(node.outputs)

    return rewrite


def _grid_sample_mode(node: gs.Node, _: Scope) -> Rewrite | None:
    """The modes were renamed when they came to serve any number of dimensions."""
    mode = node.attrs.get("mode", "bilinear")
    if isinstance(mode, gs.Node.AttributeRef):
        raise CannotConvertError(
            f"its mode is the function attribute {mode.name!r}, whose values were renamed"
        )

    def rewrite(_: Emitter) -> None:
        node.attrs["mode"] = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)

    return rewrite


def _dft_axis(node: gs.Node, scope: Scope) -> Rewrite | None:
    """The axis became an input, and its default, 1 before, the last one of the signal."""
    axis = node.attrs.get("axis", 1)
    _must_be_given(node, "axis", scope)

    def rewrite(emit: Emitter) -> None:
        node.attrs.pop("axis", None)
        while len(node.inputs) < 2:
            node.inputs.append(gs.Variable.empty())
        if isinstance(axis, gs.Node.AttributeRef):
            node.inputs.append(emit.emit("Constant", [], np.int64, value_int=axis))
        else:
            node.inputs.append(emit.constant("axis", np.array(axis, np.int64)))

    return rewrite


def _group_scale(node: gs.Node, _: Scope) -> Rewrite:
    """Scale and bias per channel instead of per group, and the arithmetic in the type of the data as before."""
    groups, data = node.attrs.get("num_groups"), node.inputs[0]
    if not isinstance(groups, int):
        raise CannotConvertError("its num_groups is not a number")
    dtype = next((found for found in map(dtype_of, (*node.inputs, *node.outputs)) if found is not None), None)
    if dtype is None:
        raise CannotConvertError("its element type is not known, and the new form names the precision")
    channels = data.shape[1] if data.shape is not None and len(data.shape) > 1 else None

    def rewrite(emit: Emitter) -> None:
        if dtype != TensorProto.FLOAT:
            node.attrs["stash_type"] = dtype
        column = emit.constant("column", np.array([groups, 1], np.int64))
        flat = emit.constant("flat", np.array([-1], np.int64))
        table = _group_table(emit, data, groups, channels)
        for index in (1, 2):
            one = emit.emit("Reshape", [node.inputs[index], column], node.inputs[index].dtype)
            many = emit.emit("Expand", [one, table], node.inputs[index].dtype)
            node.inputs[index] = emit.emit("Reshape", [many, flat], node.inputs[index].dtype)

    return rewrite


def _group_table(emit: Emitter, data: gs.Tensor, groups: int, channels: Any) -> gs.Tensor:
    """The shape [groups, channels per group], computed at run time where the channels are not known."""
    if isinstance(channels, (int, np.integer)):
        return emit.constant("table", np.array([groups, channels // groups], np.int64))
    count = emit.constant("groups", np.array([groups], np.int64))
    length = emit.emit("Shape", [data], np.int64, start=1, end=2)
    return emit.emit("Concat", [count, emit.emit("Div", [length, count], np.int64)], np.int64, axis=0)


def _attention_mask(node: gs.Node, _: Scope) -> Rewrite | None:
    """A mask of one column, spread over all keys before, would be padded with -inf: spread it by hand."""
    mask = node.inputs[3] if len(node.inputs) > 3 else gs.Variable.empty()
    last = mask.shape[-1] if mask.shape else None
    if mask.is_empty() or (isinstance(last, (int, np.integer)) and last != 1):
        return None
    key, past = node.inputs[1], node.inputs[4] if len(node.inputs) > 4 else gs.Variable.empty()
    if key.shape is None:
        raise CannotConvertError(
            "the rank of K is not known, and its mask may have to be spread over the keys"
        )
    axis = len(key.shape) - 2

    def rewrite(emit: Emitter) -> None:
        length = emit.emit("Shape", [key], np.int64, start=axis, end=axis + 1)
        if not past.is_empty():
            cached = emit.emit("Shape", [past], np.int64, start=2, end=3)
            length = emit.emit("Add", [cached, length], np.int64)
        node.inputs[3] = emit.emit("Expand", [mask, length], mask.dtype)

    return rewrite


_FNUZ = (TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2FNUZ)


def _cast_infinity(node: gs.Node, scope: Scope) -> None:
    """Saturating casts of infinity to the FNUZ types gave NaN and now give the largest number."""
    target = node.attrs["to"] if node.op == "Cast" else dtype_of(node.inputs[1])
    targets = scope.get(target.name, ()) if isinstance(target, gs.Node.AttributeRef) else [target]
    if node.attrs.get("saturate", 1) != 0 and any(item in _FNUZ for item in targets):
        raise CannotConvertError("it casts to a float 8 FNUZ type, where infinity came to mean another value")


def _must_be_given(node: gs.Node, name: str, scope: Scope) -> None:
    """Raise CannotConvertError when an attribute is the function's and a caller may leave it out."""
    value = node.attrs.get(name)
    if isinstance(value, gs.Node.AttributeRef) and any(
        given is None or isinstance(given, gs.Node.AttributeRef) for given in scope.get(value.name, (None,))
    ):
        raise CannotConvertError(
            f"its {name} is the function attribute {value.name!r}, which may be left out"
        )


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

ADAPTERS: Mapping[tuple[str, int], Adapter] = {
    **older_opsets.ADAPTERS,
    **{(f"Reduce{kind}", 18): _axes_to_input for kind in _REDUCTIONS},
    ("Split", 18): _split_count,
    ("GridSample", 20): _grid_sample_mode,
    ("DFT", 20): _dft_axis,
    ("GroupNormalization", 21): _group_scale,
    ("Attention", 24): _attention_mask,
    ("Cast", 24): _cast_infinity,
    ("CastLike", 24): _cast_infinity,
}

_SATURATE = "saturate concerns float 8, which it did not have"
KEEPS: Mapping[tuple[str, int], str] = {
    **older_opsets.KEEPS,
    ("LpPool", 18): "ceil_mode 0 and dilations 1 are what it did",
    ("Pad", 18): "no axes means all axes",
    ("Resize", 18): "no antialias, all axes and policy stretch are what it did",
    ("AveragePool", 19): "dilations 1 are what it did",
    ("Cast", 19): _SATURATE,
    ("CastLike", 19): _SATURATE,
    ("QuantizeLinear", 19): _SATURATE,
    ("DequantizeLinear", 21): "block_size 0 means no blocks",
    ("QuantizeLinear", 21): "block_size 0 means no blocks; output_dtype 0 the type of the zero point",
    ("DequantizeLinear", 23): "output_dtype 0 means the type of the scale",
    ("QuantizeLinear", 23): "precision 0 means the type of the scale, which was that of the input",
    ("Attention", 25): "window sizes -1 mean no window",
    ("Range", 27): "stash_type concerns 16-bit types, which it did not have",
    ("SpaceToDepth", 28): "mode DCR is what it did",
}
