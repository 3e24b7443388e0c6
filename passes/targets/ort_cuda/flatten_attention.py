"""flatten-attention: attention over (batch, tokens, heads * size), without the transposes around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, Emitter
from passes.graph.match import MICROSOFT, View, array_of, dims, is_op, producer, sole_reader
from passes.weights.recipe import dtype_of

_SWAP = [0, 2, 1, 3]
_MULTI_HEAD = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Attended:
    """An Attention over (batch, heads, tokens, size), and the Transpose and Reshape that flatten its output."""

    attention: gs.Node
    back: gs.Node
    flat: gs.Node


@register
@dataclass(frozen=True)
class FlattenAttention(Pass):
    """Write Attention over (batch, heads, tokens, size) as the one over (batch, tokens, heads * size).

        before: Reshape(Transpose(Attention(Transpose(q), Transpose(k), Transpose(v))))
        after:  Attention(Reshape(q), Reshape(k), Reshape(v))

    After the Transposes (0, 2, 1, 3), norms of the last axis and joins along the tokens may come: they then work on the
    layout that the projections give, and five copies of the tokens are saved. Exact. With `multi_head`, the operator is
    com.microsoft's MultiHeadAttention: in ONNX Runtime 1.31 that is the way to cuDNN's kernel (SD3.5-medium in float16
    on an H200: 20 ms a step for 29; one attention of FLUX.1-dev in bfloat16: 0.40 ms for 0.75).

    Declines when: there is a mask, a cache, or an output besides the first; heads and size are not known numbers;
    anything else stands between Transpose and Attention (quantizers, rotary embeddings); the output is not flattened,
    or something else reads it.
    """

    name: ClassVar[str] = "flatten-attention"
    multi_head: bool = False

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the Attention; what then has no reader is left to remove-unused."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "attentions")

    def match(self, node: gs.Node, view: View) -> Attended | str | None:
        """The node as an attention between Transposes."""
        if not is_op(node, "Attention"):
            return None
        if len(dims(node.inputs[0])) != 4:
            return "it has no four axes"
        if any(not tensor.is_empty() for tensor in node.inputs[3:]) or len(node.outputs) > 1:
            return "it has a mask, a cache or more than one output"
        sizes = [
            dims(tensor)[axis] if dims(tensor) else None for tensor in node.inputs[:3] for axis in (1, 3)
        ]
        if not all(isinstance(size, (int, np.integer)) for size in sizes) or len(set(sizes[::2])) != 1:
            return "its heads and their size are not known, or not the same for query and key"
        if not all(_is_swapped(tensor, view) for tensor in node.inputs[:3]):
            return "between a Transpose and it stands more than norms and joins"
        back = sole_reader(node.outputs[0], view)
        flat = sole_reader(back.outputs[0], view) if _swaps(back) else None
        if not is_op(flat, "Reshape", rank=3) or not _merges(flat):
            return "its output is not flattened right away"
        return Attended(node, back, flat)

    def rewrite(self, found: Attended, edit: Edit) -> None:
        """One node on flat tensors in place of Attention, Transpose and Reshape."""
        node, new = found.attention, edit.at(found.attention)
        heads = int(node.inputs[0].shape[1])
        # (batch, tokens, heads, size) -> (batch, tokens, heads * size)
        shape, inputs = new.ints("flat", 0, 0, -1), []
        for tensor in node.inputs[:3]:
            batch, heads_of, tokens, size = tensor.shape
            flat = [batch, tokens, int(heads_of) * int(size)]
            inputs.append(new.emit("Reshape", [_tokens_first(new, tensor), shape], tensor.dtype, flat))
        outputs = edit.release(found.flat)
        edit.remove(node, found.back)
        if self.multi_head and _has_multi_head(node):
            scale = {key: value for key, value in node.attrs.items() if key == "scale"}
            new.emit_to("MultiHeadAttention", inputs, outputs, domain=MICROSOFT, num_heads=heads, **scale)
        else:
            new.emit_to("Attention", inputs, outputs, **node.attrs, q_num_heads=heads, kv_num_heads=heads)


def _swaps(node: gs.Node | None) -> TypeGuard[gs.Node]:
    """Whether a node swaps heads and tokens."""
    return is_op(node, "Transpose") and bool(list(node.attrs.get("perm", [])) == _SWAP)


def _is_swapped(tensor: gs.Tensor, view: View) -> bool:
    """Whether the tensor is such a Transpose, or norms and joins of several."""
    node = producer(tensor)
    if node is None or id(tensor) in view.outputs:
        return False
    if _swaps(node) or not view.is_sole(tensor):
        return _swaps(node)
    if is_op(node, "RMSNormalization"):
        return node.attrs.get("axis", -1) in (-1, 3) and _is_swapped(node.inputs[0], view)
    joins = is_op(node, "Concat") and node.attrs.get("axis") in (2, -2)
    return bool(joins) and all(_is_swapped(item, view) for item in node.inputs)


def _merges(flat: gs.Node) -> bool:
    """Whether a Reshape joins the last two of four axes: its last size is their product."""
    before, target = dims(flat.inputs[0]), array_of(flat.inputs[1])
    if len(before) != 4 or not all(isinstance(size, (int, np.integer)) for size in before[2:]):
        return False
    width = int(before[2]) * int(before[3])
    return dims(flat.outputs[0])[2] == width or (target is not None and int(target[-1]) == width)


def _has_multi_head(node: gs.Node) -> bool:
    """Whether MultiHeadAttention does what the node asks for, in its type."""
    plain = not any(node.attrs.get(key) for key in ("is_causal", "softcap", "softmax_precision"))
    return plain and dtype_of(node.inputs[0]) in _MULTI_HEAD


def _tokens_first(new: Emitter, tensor: gs.Tensor) -> gs.Tensor:
    """The tensor as (batch, tokens, heads, size): norms and joins anew, on what the Transposes read."""
    node = tensor.inputs[0]
    if node.op == "Transpose":
        read: gs.Tensor = node.inputs[0]
        return read
    shape = [tensor.shape[axis] for axis in _SWAP]
    if node.op == "Concat":
        parts = [_tokens_first(new, item) for item in node.inputs]
        return new.emit("Concat", parts, tensor.dtype, shape, axis=1)
    inputs, attrs = [_tokens_first(new, node.inputs[0]), node.inputs[1]], {**node.attrs, "axis": -1}
    return new.emit("RMSNormalization", inputs, tensor.dtype, shape, **attrs)
