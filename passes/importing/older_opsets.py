"""What opsets 8 to 17 changed in an operator, where the schemas alone do not say that a node stands as it is.

The tables are parts of those of `passes.importing.opset_adapters`, which says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.graph.edit import Emitter
from passes.graph.match import array_of
from passes.weights.recipe import dtype_of

Rewrite = Callable[[Emitter], None]


class CannotConvertError(Exception):
    """Why a node has no exact form in the wanted opset."""


def _number(node: gs.Node, name: str, default: Any = None) -> Any:
    """An attribute that is a value. Raises CannotConvertError for one of the function around the node."""
    value = node.attrs.get(name, default)
    if isinstance(value, gs.Node.AttributeRef):
        raise CannotConvertError(f"its {name} is the function attribute {value.name!r}")
    return value


def _dtype(tensor: gs.Tensor) -> Any:
    """The numpy type of a tensor. Raises CannotConvertError where it is not known."""
    found = dtype_of(tensor)
    if found is None:
        raise CannotConvertError(f"the element type of {tensor.name!r} is not known")
    return onnx.helper.tensor_dtype_to_np_dtype(found)


def integers_to_input(name: str) -> Callable[[gs.Node, Any], Rewrite | None]:
    """Op<name=[...]>(x) -> Op(x, [...])"""

    def adapter(node: gs.Node, _: Any) -> Rewrite | None:
        """A list of integers became an input."""
        given = _number(node, name)
        if given is None:
            return None

        def rewrite(emit: Emitter) -> None:
            del node.attrs[name]
            node.inputs = [node.inputs[0], emit.constant(name, np.array(given, np.int64))]

        return rewrite

    return adapter


def _clip(node: gs.Node, _: Any) -> Rewrite | None:
    """Clip<min, max>(x) -> Clip(x, min, max), bounds in the type of the data."""
    bounds = {name: _number(node, name) for name in ("min", "max")}
    dtype = _dtype(node.inputs[0]) if any(bound is not None for bound in bounds.values()) else None

    def rewrite(emit: Emitter) -> None:
        for name, bound in bounds.items():
            node.attrs.pop(name, None)
            node.inputs.append(
                gs.Variable.empty() if bound is None else emit.constant(name, np.array(bound, dtype))
            )

    return None if dtype is None else rewrite


def _dropout(node: gs.Node, _: Any) -> Rewrite | None:
    """Dropout<ratio>(x) -> Dropout(x): both leave x as it is when a model is run and not trained."""

    def rewrite(_: Emitter) -> None:
        node.attrs.pop("ratio", None)

    return rewrite


def _pad(node: gs.Node, _: Any) -> Rewrite | None:
    """Pad<pads, value>(x) -> Pad(x, pads, value), the value in the type of the data."""
    pads, value = _number(node, "pads"), _number(node, "value", 0.0)
    dtype = _dtype(node.inputs[0])

    def rewrite(emit: Emitter) -> None:
        for name in ("pads", "value"):
            node.attrs.pop(name, None)
        node.inputs += [
            emit.constant("pads", np.array(pads, np.int64)),
            emit.constant("value", np.array(value, dtype)),
        ]

    return rewrite


def _slice(node: gs.Node, _: Any) -> Rewrite | None:
    """Slice<starts, ends, axes>(x) -> Slice(x, starts, ends, axes)"""
    given = {name: _number(node, name) for name in ("starts", "ends", "axes")}

    def rewrite(emit: Emitter) -> None:
        for name, values in given.items():
            node.attrs.pop(name, None)
            if values is not None:
                node.inputs.append(emit.constant(name, np.array(values, np.int64)))

    return rewrite


def _softmax(node: gs.Node, _: Any) -> Rewrite | None:
    """Softmax<axis=a>(x) -> Reshape(Softmax<axis=-1>(Flatten<axis=a>(x)), Shape(x)); for the last axis, <axis=-1> only.

    Before opset 13, `axis` (1 when absent) said from which axis on all elements are normalized together.
    """
    axis, data = _number(node, "axis", 1), node.inputs[0]
    last = axis == -1 or (data.shape is not None and axis % max(1, len(data.shape)) == len(data.shape) - 1)

    def rewrite(emit: Emitter) -> None:
        node.attrs["axis"] = -1
        if last:
            return
        flat = emit.emit("Flatten", [data], data.dtype, axis=axis)
        shape = emit.emit("Shape", [data], np.int64)
        inner = gs.Variable(emit.names.fresh(f"{node.name}/flat_out"), dtype=data.dtype)
        emit.emit_to(node.op, [flat], [inner], axis=-1)
        node.op, node.attrs, node.inputs = "Reshape", {}, [inner, shape]

    return rewrite


def _topk(node: gs.Node, _: Any) -> Rewrite | None:
    """TopK<k>(x) -> TopK(x, [k])"""
    count = _number(node, "k")

    def rewrite(emit: Emitter) -> None:
        del node.attrs["k"]
        node.inputs.append(emit.constant("k", np.array([count], np.int64)))

    return rewrite


def _one_output(node: gs.Node, _: Any) -> None:
    """The outputs for training went."""
    if any(not output.is_empty() for output in node.outputs[1:]):
        raise CannotConvertError("it has the outputs that it had for training")


def _spatial(node: gs.Node, _: Any) -> Rewrite | None:
    """The attribute `spatial` went; 1, its default, is what is left."""
    if _number(node, "spatial", 1) != 1:
        raise CannotConvertError("it normalizes every position by itself (spatial=0)")

    def rewrite(_: Emitter) -> None:
        node.attrs.pop("spatial", None)

    return rewrite if "spatial" in node.attrs else None


def _upsample_scales(node: gs.Node, _: Any) -> Rewrite | None:
    """Upsample<scales>(x) -> Upsample(x, scales)"""
    scales = _number(node, "scales")

    def rewrite(emit: Emitter) -> None:
        del node.attrs["scales"]
        node.inputs.append(emit.constant("scales", np.array(scales, np.float32)))

    return rewrite


def _upsample(node: gs.Node, _: Any) -> Rewrite | None:
    """Upsample(x, scales) -> Resize<asymmetric, floor>(x, "", scales)"""

    def rewrite(_: Emitter) -> None:
        node.op = "Resize"
        _resized(node)

    return rewrite


def _resize(node: gs.Node, _: Any) -> Rewrite | None:
    """Resize(x, scales) -> Resize<asymmetric, floor>(x, "", scales): opset 10 had no other coordinates."""
    held = array_of(node.inputs[1]) if isinstance(node.inputs[1], gs.Constant) else None
    if held is None or np.any(held < 1):
        raise CannotConvertError("its scales are computed or below 1, where opset 10 left the rounding open")

    def rewrite(_: Emitter) -> None:
        _resized(node)

    return rewrite


def _resized(node: gs.Node) -> None:
    node.inputs = [node.inputs[0], gs.Variable.empty(), node.inputs[1]]
    node.attrs |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def _resize_mode(node: gs.Node, _: Any) -> None:
    """The coordinates "tf_half_pixel_for_nn" went."""
    if _number(node, "coordinate_transformation_mode", "") == "tf_half_pixel_for_nn":
        raise CannotConvertError('its coordinates are "tf_half_pixel_for_nn", which went')


def _scatter(node: gs.Node, _: Any) -> Rewrite | None:
    """Scatter -> ScatterElements: the name changed."""

    def rewrite(_: Emitter) -> None:
        node.op = "ScatterElements"

    return rewrite


def _roi_align(node: gs.Node, _: Any) -> Rewrite | None:
    """The default coordinates became others; those of before get their name."""

    def rewrite(_: Emitter) -> None:
        node.attrs["coordinate_transformation_mode"] = "output_half_pixel"

    return rewrite


SUCCESSORS: Mapping[str, tuple[str, int]] = {"Upsample": ("Resize", 11), "Scatter": ("ScatterElements", 11)}
"""Operators that went -> what their adapter makes of them, as of which opset."""

ADAPTERS: Mapping[tuple[str, int], Callable[[gs.Node, Any], Rewrite | None]] = {
    ("BatchNormalization", 9): _spatial,
    ("BatchNormalization", 14): _one_output,
    ("Clip", 11): _clip,
    ("Dropout", 12): _dropout,
    **{(op, 13): _softmax for op in ("Hardmax", "LogSoftmax", "Softmax")},
    ("Pad", 11): _pad,
    **{(op, 13): integers_to_input("axes") for op in ("ReduceSum", "Squeeze", "Unsqueeze")},
    ("Resize", 11): _resize,
    ("Resize", 13): _resize_mode,
    ("RoiAlign", 16): _roi_align,
    ("Scatter", 11): _scatter,
    ("Slice", 10): _slice,
    ("Split", 13): integers_to_input("split"),
    ("TopK", 10): _topk,
    ("Upsample", 9): _upsample_scales,
    ("Upsample", 10): _upsample,
}

_ONE_SCALE = "one scale for the whole tensor, for which axis means nothing"
KEEPS: Mapping[tuple[str, int], str] = {
    **{(op, 12): "select_last_index 0 is what it did" for op in ("ArgMax", "ArgMin")},
    ("AveragePool", 10): "ceil_mode 0 is what it did",
    ("Constant", 11): "what it may hold instead was added",
    ("Constant", 12): "what it may hold instead was added",
    ("DepthToSpace", 11): "mode DCR is what it did",
    ("DequantizeLinear", 13): _ONE_SCALE,
    ("QuantizeLinear", 13): _ONE_SCALE,
    **{(op, 14): "layout 0 is what it did" for op in ("GRU", "LSTM", "RNN")},
    ("GatherND", 12): "batch_dims 0 is what it did",
    ("MaxPool", 8): "the second output may be left out",
    ("MaxPool", 10): "ceil_mode 0 and dilations 1 are what it did",
    ("Reshape", 14): "allowzero 0 is what it did",
    ("ScatterElements", 16): "reduction none is what it did",
    ("ScatterND", 16): "reduction none is what it did",
    ("Shape", 15): "start 0 and no end mean the whole shape",
    ("TopK", 11): "largest 1 and sorted 1 are what it did",
}
