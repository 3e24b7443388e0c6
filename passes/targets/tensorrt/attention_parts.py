"""What an Attention node is, and the pieces that both decompose-attention and quantize-softmax write it as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.graph.edit import Declined, Emitter
from passes.graph.match import View, input_of
from passes.weights.recipe import dtype_of


@dataclass(frozen=True)
class Site:
    """What has to be known about an Attention node. Head counts and `head_size` are None when dynamic.

    `used`: of each output, whether anything reads it. `dtype`: the onnx.TensorProto type of queries, keys and values.
    `rank`: 3 for (batch, sequence, heads * size), 4 for (batch, heads, sequence, size).
    """

    node: gs.Node
    used: list[bool]
    dtype: int
    rank: int
    q_heads: int | None
    kv_heads: int | None
    head_size: int | None

    @classmethod
    def of(cls, node: gs.Node, view: View) -> Site:
        """Look at the node. Raises Declined where it does what no pieces do, or where its shapes are not known."""
        used = [bool(t.outputs) or id(t) in view.outputs for t in node.outputs]
        _decline_unsupported(node, used)
        q, k = node.inputs[:2]
        dtype = dtype_of(q)
        if dtype not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            raise Declined(f"the type of {q.name!r} is not known or not a supported float")
        if q.shape is None or k.shape is None or len(q.shape) not in (3, 4):
            raise Declined(f"the rank of {q.name!r} or {k.name!r} is not known")
        if len(q.shape) == 3:
            heads, kv_heads = node.attrs.get("q_num_heads"), node.attrs.get("kv_num_heads")
            hidden = _number(q.shape[2])
            size = hidden // heads if hidden is not None and heads else None
        else:
            heads, kv_heads, size = _number(q.shape[1]), _number(k.shape[1]), _number(q.shape[3])
            if heads is None and kv_heads is None and q.shape[1] == k.shape[1] is not None:
                heads = kv_heads = 1  # the same symbol: equal, so nothing is repeated
        return cls(node, used, dtype, len(q.shape), heads, kv_heads, size)

    @property
    def np_dtype(self) -> np.dtype[Any]:
        """The numpy type of queries, keys and values."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.dtype))

    @property
    def repeats(self) -> bool:
        """Whether several query heads share one key head and one value head."""
        return self.q_heads != self.kv_heads

    def check_heads(self) -> None:
        """Raise Declined unless the node can be taken apart into heads, each key head repeated for its query heads."""
        if self.q_heads is None or self.kv_heads is None:
            raise Declined("its head counts are not known")
        for source in self.node.inputs[1:3] if self.repeats else ():
            if _width(source) is None or self.q_heads % self.kv_heads:
                raise Declined(f"the head size of {source.name!r} is not known, or the heads do not divide")


def _number(dim: object) -> int | None:
    return int(dim) if isinstance(dim, (int, np.integer)) and dim >= 0 else None


def _width(source: gs.Tensor) -> int | None:
    """The length of the last axis, where it is known."""
    return _number(source.shape[-1]) if source.shape else None


def _decline_unsupported(node: gs.Node, used: list[bool]) -> None:
    if any(input_of(node, index) is not None for index in (4, 5, 6)):
        raise Declined("it reads a key-value cache")
    if max(node.attrs.get("left_window_size", -1), node.attrs.get("right_window_size", -1)) >= 0:
        raise Declined("it has a sliding window")
    if len(used) > 3 and used[3]:
        raise Declined("its qk_matmul_output is used")
    mask, k = input_of(node, 3), node.inputs[1]
    if mask is None or not mask.shape or k.shape is None:
        return
    width, keys = _number(mask.shape[-1]), _number(k.shape[-2] if len(k.shape) == 4 else k.shape[1])
    if width is not None and width != keys and (keys is not None or width == 1):
        raise Declined(f"its mask has {width} columns, not one per key")


def to_heads(new: Emitter, tensor: gs.Tensor, heads: int | None, site: Site) -> gs.Tensor:
    """(batch, sequence, heads * size) -> (batch, heads, sequence, size); 4-D input as it is."""
    if site.rank == 4:
        return tensor
    shape = new.constant("shape", np.array([0, 0, heads, -1], np.int64))
    split = new.emit("Reshape", [tensor, shape], site.np_dtype)
    return new.emit("Transpose", [split], site.np_dtype, perm=[0, 2, 1, 3])


def repeat_heads(new: Emitter, tensor: gs.Tensor, source: gs.Tensor, site: Site) -> gs.Tensor:
    """Repeat each key or value head for the query heads that share it: h0 h0 h1 h1. `source`: the node's own input."""
    width = _width(source)
    if not site.repeats or site.q_heads is None or site.kv_heads is None or width is None:
        return tensor
    size = width if site.rank == 4 else width // site.kv_heads
    # before: (batch, kv heads, sequence, size)      after: (batch, query heads, sequence, size)
    axes, times = new.ints("axes", 2), new.ints("times", 1, 1, site.q_heads // site.kv_heads, 1, 1)
    shape = new.ints("shape", 0, site.q_heads, -1, size)
    apart = new.emit("Unsqueeze", [tensor, axes], site.np_dtype)
    return new.emit("Reshape", [new.emit("Expand", [apart, times], site.np_dtype), shape], site.np_dtype)


def from_heads(new: Emitter, y: gs.Tensor, output: gs.Tensor, site: Site) -> None:
    """(batch, heads, sequence, size) -> (batch, sequence, heads * size), as the `output` of a node of rank 3."""
    turned = new.emit("Transpose", [y], site.np_dtype, perm=[0, 2, 1, 3])
    new.emit_to("Reshape", [turned, new.ints("shape", 0, 0, -1)], [output])


@dataclass(frozen=True)
class Mask:
    """What Attention may look at: a float `bias` to add to the scores, or a boolean `allowed`; `least` is -inf.

    `given`: the node has a mask of its own, so that a row of it may allow nothing.
    """

    least: gs.Tensor
    bias: gs.Tensor | None = None
    allowed: gs.Tensor | None = None
    given: bool = False


def mask_of(new: Emitter, site: Site) -> Mask | None:
    """The mask of the node, and is_causal, as one; None where every query sees every key."""
    kind, mask = site.np_dtype, input_of(site.node, 3)
    causal = _causal(new, site) if site.node.attrs.get("is_causal", 0) else None
    if causal is None and mask is None:
        return None
    least = new.constant("masked", np.array(-np.inf, kind))
    if mask is not None and dtype_of(mask) != TensorProto.BOOL:
        bias = mask if causal is None else new.emit("Where", [causal, mask, least], kind)
        return Mask(least, bias=bias, given=True)
    masks = [tensor for tensor in (mask, causal) if tensor is not None]
    allowed = masks[0] if len(masks) == 1 else new.emit("And", masks, np.bool_)
    return Mask(least, allowed=allowed, given=mask is not None)


def masked_scores(new: Emitter, scores: gs.Tensor, mask: Mask, site: Site) -> gs.Tensor:
    """Scores with the bias added, or -inf where nothing may be looked at."""
    if mask.bias is not None:
        return new.emit("Add", [scores, mask.bias], site.np_dtype)
    return new.emit("Where", [mask.allowed, scores, mask.least], site.np_dtype)


def largest_above(new: Emitter, tensor: gs.Tensor, limit: gs.Tensor, site: Site) -> gs.Tensor:
    """Boolean (..., 1): whether the largest number of each row is above `limit`."""
    axes = new.ints("axes", -1)
    best = new.emit("ReduceMax", [tensor, axes], site.np_dtype, keepdims=1)
    return new.emit("Greater", [best, limit], np.bool_)


def or_zero(new: Emitter, keep: gs.Tensor, values: gs.Tensor, site: Site) -> gs.Tensor:
    """The values where `keep` is true, else zero."""
    zero = new.constant("zero", np.array(0, site.np_dtype))
    return new.emit("Where", [keep, values, zero], site.np_dtype)


def _causal(new: Emitter, site: Site) -> gs.Tensor:
    """Boolean (queries, keys): query i may see key j when j <= i."""
    axis = 2 if site.rank == 4 else 1
    zero, one = (new.constant(name, np.array(value, np.int64)) for name, value in (("from", 0), ("step", 1)))
    sides = []
    for tensor, unit in ((site.node.inputs[0], 1), (site.node.inputs[1], 0)):
        length = new.emit("Shape", [tensor], np.int64, start=axis, end=axis + 1)
        count = new.emit("Squeeze", [length], np.int64)
        axes = new.ints("axes", unit)
        positions = new.emit("Range", [zero, count, one], np.int64)
        sides.append(new.emit("Unsqueeze", [positions, axes], np.int64))
    return new.emit("LessOrEqual", [sides[1], sides[0]], np.bool_)
