"""decompose-attention: Attention nodes that a target has no kernel for become MatMul - Softmax - MatMul."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import Emitter, Names, drop_nodes, insert_before
from passes.graph.match import STANDARD, output_ids
from passes.graph.types import float_type
from passes.weights.recipe import dtype_of


@register
@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Write Attention (opset 23 and later) as the operators it stands for.

    Fires on a node whose type is in `dtypes`, whose head size is above `max_head_dim`, which has softcap or
    softmax_precision, or of which more than the first output is used. The pieces, in order:

    1. 3-D inputs: Reshape and Transpose to (batch, heads, sequence, head size), and back at the end.
    2. Fewer key than query heads: each key and value head repeated (Unsqueeze, Expand, Reshape).
    3. scores = MatMul(Q, transposed K) * scale; in float16 the scale goes on Q first, against overflow.
    4. softcap * tanh(scores / softcap).
    5. Float mask: added. Boolean mask and is_causal: scores of what is masked become -inf.
    6. Softmax, in softmax_precision when given; a row with everything masked gives zeros, as ONNX says.
    7. MatMul with V.

        before: Attention(q, k, v, mask)      after: MatMul(Softmax(Add(Mul(MatMul(q, k transposed), scale), mask)), v)

    Declines when: there is a cache (past_key, past_value, nonpad_kv_seqlen) or a sliding window; qk_matmul_output is
    read; the mask is shorter than the keys; type, rank, head counts or sizes that are needed are not known.
    """

    name: ClassVar[str] = "decompose-attention"
    dtypes: tuple[str, ...] = ("float32",)
    max_head_dim: int = 256

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace each node where it stands."""
        types = {float_type(name) for name in self.dtypes}
        names, outputs = Names(graph), output_ids(graph)
        dead: set[int] = set()
        refusals: list[Refusal] = []
        for part in walk(graph):
            new: dict[int, list[gs.Node]] = {}
            for node in part.nodes:
                if node.op != "Attention" or node.domain not in STANDARD:
                    continue
                used = [bool(t.outputs) or id(t) in outputs for t in node.outputs]
                try:
                    site = Site.of(node, used)
                    if self._wants(site, types):
                        new[id(node)] = _decompose(site, Emitter(node, names))
                        dead.add(id(node))
                except CannotError as reason:
                    refusals.append(Refusal(node.name, str(reason)))
            insert_before(part, new)
        drop_nodes(graph, dead)
        notes = (f"{len(dead)} Attention nodes decomposed",) if dead else ()
        return PassResult(len(dead), notes, tuple(refusals))

    def _wants(self, site: Site, types: set[int]) -> bool:
        attrs = site.node.attrs
        return (
            site.dtype in types
            or (site.head_size or 0) > self.max_head_dim
            or bool(attrs.get("softcap", 0.0))
            or bool(attrs.get("softmax_precision", 0))
            or any(site.used[1:])
        )


class CannotError(Exception):
    """Why a node must stay."""


@dataclass(frozen=True)
class Site:
    """What has to be known about an Attention node. Head counts and `head_size` are None when dynamic."""

    node: gs.Node
    used: list[bool]
    dtype: int
    rank: int
    q_heads: int | None
    kv_heads: int | None
    head_size: int | None

    @classmethod
    def of(cls, node: gs.Node, used: list[bool]) -> Site:
        """Look at the node. Raises CannotError."""
        _reject_unsupported(node, used)
        q, k = node.inputs[:2]
        dtype = dtype_of(q)
        if dtype not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            raise CannotError(f"the type of {q.name!r} is not known or not a supported float")
        if q.shape is None or k.shape is None or len(q.shape) not in (3, 4):
            raise CannotError(f"the rank of {q.name!r} or {k.name!r} is not known")
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


def _number(dim: object) -> int | None:
    return int(dim) if isinstance(dim, (int, np.integer)) and dim >= 0 else None


def _input(node: gs.Node, index: int) -> gs.Tensor | None:
    """An optional input, or None when it is left out."""
    return node.inputs[index] if index < len(node.inputs) and not node.inputs[index].is_empty() else None


def _reject_unsupported(node: gs.Node, used: list[bool]) -> None:
    if any(_input(node, index) is not None for index in (4, 5, 6)):
        raise CannotError("it reads a key-value cache")
    if max(node.attrs.get("left_window_size", -1), node.attrs.get("right_window_size", -1)) >= 0:
        raise CannotError("it has a sliding window")
    if len(used) > 3 and used[3]:
        raise CannotError("its qk_matmul_output is used")
    mask, k = _input(node, 3), node.inputs[1]
    if mask is None or not mask.shape or k.shape is None:
        return
    width, keys = _number(mask.shape[-1]), _number(k.shape[-2] if len(k.shape) == 4 else k.shape[1])
    if width is not None and width != keys and (keys is not None or width == 1):
        raise CannotError(f"its mask has {width} columns, not one per key")


def _decompose(site: Site, new: Emitter) -> list[gs.Node]:
    """The nodes that compute what the Attention node does. Raises CannotError."""
    node, kind = site.node, site.np_dtype
    if site.q_heads is None or site.kv_heads is None:
        raise CannotError("its head counts are not known")
    q, k, v = (
        to_heads(new, tensor, heads, site)
        for tensor, heads in zip(node.inputs[:3], (site.q_heads, site.kv_heads, site.kv_heads), strict=True)
    )
    for tensor, index in ((k, 1), (v, 2)):
        if len(site.used) > index and site.used[index]:
            new.emit_to("Identity", [tensor], [node.outputs[index]])
    k, v = repeat_heads(new, k, node.inputs[1], site), repeat_heads(new, v, node.inputs[2], site)
    scores = _scores(new, q, k, site)
    weights = _softmax(new, scores, site)
    if site.rank == 4:
        new.emit_to("MatMul", [weights, v], [node.outputs[0]])
        return new.nodes
    y = new.emit("Transpose", [new.emit("MatMul", [weights, v], kind)], kind, perm=[0, 2, 1, 3])
    new.emit_to("Reshape", [y, new.constant("shape", np.array([0, 0, -1], np.int64))], [node.outputs[0]])
    return new.nodes


def to_heads(new: Emitter, tensor: gs.Tensor, heads: int, site: Site) -> gs.Tensor:
    """(batch, sequence, heads * size) -> (batch, heads, sequence, size); 4-D input as it is."""
    if site.rank == 4:
        return tensor
    shape = new.constant("shape", np.array([0, 0, heads, -1], np.int64))
    split = new.emit("Reshape", [tensor, shape], site.np_dtype)
    return new.emit("Transpose", [split], site.np_dtype, perm=[0, 2, 1, 3])


def repeat_heads(new: Emitter, tensor: gs.Tensor, source: gs.Tensor, site: Site) -> gs.Tensor:
    """Repeat each key or value head for the query heads that share it: h0 h0 h1 h1. Raises CannotError."""
    if site.q_heads is None or site.kv_heads is None or site.q_heads == site.kv_heads:
        return tensor
    width = _number(source.shape[-1]) if source.shape else None
    if width is None or site.q_heads % site.kv_heads:
        raise CannotError(f"the head size of {source.name!r} is not known, or the heads do not divide")
    size = width if site.rank == 4 else width // site.kv_heads
    axes = new.constant("axes", np.array([2], np.int64))
    times = new.constant("times", np.array([1, 1, site.q_heads // site.kv_heads, 1, 1], np.int64))
    shape = new.constant("shape", np.array([0, site.q_heads, -1, size], np.int64))
    apart = new.emit("Unsqueeze", [tensor, axes], site.np_dtype)
    return new.emit("Reshape", [new.emit("Expand", [apart, times], site.np_dtype), shape], site.np_dtype)


def _scores(new: Emitter, q: gs.Tensor, k: gs.Tensor, site: Site) -> gs.Tensor:
    """Scaled and capped products of queries and keys, (batch, heads, queries, keys)."""
    attrs, kind = site.node.attrs, site.np_dtype
    factor = attrs.get("scale")
    if factor is None and site.head_size is None:
        raise CannotError("it has no scale and its head size is not known")
    value = 1.0 / math.sqrt(site.head_size or 1) if factor is None else factor
    scale = new.constant("scale", np.array(value, kind))
    keys = new.emit("Transpose", [k], kind, perm=[0, 1, 3, 2])
    if site.dtype == TensorProto.FLOAT16:
        scores = new.emit("MatMul", [new.emit("Mul", [q, scale], kind), keys], kind)
    else:  # the range is wide enough, and a DequantizeLinear stays next to its MatMul
        scores = new.emit("Mul", [new.emit("MatMul", [q, keys], kind), scale], kind)
    if cap := attrs.get("softcap", 0.0):
        limit = new.constant("softcap", np.array(cap, kind))
        scores = new.emit("Tanh", [new.emit("Div", [scores, limit], kind)], kind)
        scores = new.emit("Mul", [scores, limit], kind)
    return scores


def _softmax(new: Emitter, scores: gs.Tensor, site: Site) -> gs.Tensor:
    """Mask, softmax over keys, zeros in rows where everything is masked."""
    kind, mask = site.np_dtype, _input(site.node, 3)
    causal = causal_mask(new, site) if site.node.attrs.get("is_causal", 0) else None
    if causal is None and mask is None:
        return _probabilities(new, scores, site)
    least = new.constant("masked", np.array(-np.inf, kind))
    if mask is not None and dtype_of(mask) != TensorProto.BOOL:
        bias = mask if causal is None else new.emit("Where", [causal, mask, least], kind)
        axes = new.constant("axes", np.array([-1], np.int64))
        best = new.emit("ReduceMax", [bias, axes], kind, keepdims=1)
        open_rows = new.emit("Greater", [best, least], np.bool_)
        rows = _probabilities(new, new.emit("Add", [scores, bias], kind), site)
        return _or_zero(new, open_rows, rows, kind)
    masks = [tensor for tensor in (mask, causal) if tensor is not None]
    allowed = masks[0] if len(masks) == 1 else new.emit("And", masks, np.bool_)
    rows = _probabilities(new, new.emit("Where", [allowed, scores, least], kind), site)
    return rows if mask is None else _or_zero(new, allowed, rows, kind)


def _or_zero(new: Emitter, keep: gs.Tensor, rows: gs.Tensor, kind: np.dtype[Any]) -> gs.Tensor:
    return new.emit("Where", [keep, rows, new.constant("zero", np.array(0, kind))], kind)


def _probabilities(new: Emitter, scores: gs.Tensor, site: Site) -> gs.Tensor:
    precision = site.node.attrs.get("softmax_precision", 0)
    if not precision or precision == site.dtype:
        return new.emit("Softmax", [scores], site.np_dtype, axis=-1)
    wide = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(precision))
    rows = new.emit("Softmax", [new.emit("Cast", [scores], wide, to=precision)], wide, axis=-1)
    return new.emit("Cast", [rows], site.np_dtype, to=site.dtype)


def causal_mask(new: Emitter, site: Site) -> gs.Tensor:
    """Boolean (queries, keys): query i may see key j when j <= i."""
    axis = 2 if site.rank == 4 else 1
    zero, one = (new.constant(name, np.array(value, np.int64)) for name, value in (("from", 0), ("step", 1)))
    sides = []
    for tensor, unit in ((site.node.inputs[0], 1), (site.node.inputs[1], 0)):
        length = new.emit("Shape", [tensor], np.int64, start=axis, end=axis + 1)
        count = new.emit("Squeeze", [length], np.int64)
        axes = new.constant("axes", np.array([unit], np.int64))
        positions = new.emit("Range", [zero, count, one], np.int64)
        sides.append(new.emit("Unsqueeze", [positions, axes], np.int64))
    return new.emit("LessOrEqual", [sides[1], sides[0]], np.bool_)
