"""decompose-attention: Attention nodes that a target has no kernel for become MatMul - Softmax - MatMul."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Declined, Edit, Emitter
from passes.graph.match import View, is_op
from passes.graph.types import float_type
from passes.targets.tensorrt.attention_parts import (
    Mask,
    Site,
    from_heads,
    largest_above,
    mask_of,
    masked_scores,
    or_zero,
    repeat_heads,
    to_heads,
)


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
        return Edit(graph).rewrite_each(self.match, self.rewrite, "Attention nodes decomposed")

    def match(self, node: gs.Node, view: View) -> Site | None:
        """An Attention node that has to go. Raises Declined where it cannot."""
        if not is_op(node, "Attention"):
            return None
        site = Site.of(node, view)
        if not self._wants(site):
            return None
        site.check_heads()
        if site.head_size is None and node.attrs.get("scale") is None:
            raise Declined("it has no scale and its head size is not known")
        return site

    def _wants(self, site: Site) -> bool:
        attrs = site.node.attrs
        return (
            site.dtype in {float_type(name) for name in self.dtypes}
            or (site.head_size or 0) > self.max_head_dim
            or bool(attrs.get("softcap", 0.0))
            or bool(attrs.get("softmax_precision", 0))
            or any(site.used[1:])
        )

    def rewrite(self, found: Site, edit: Edit) -> None:
        """Attention(q, k, v)  ->  MatMul(Softmax(scores), v), and Identity for the keys and values that it gives."""
        node, new = found.node, edit.at(found.node)
        (q, k, v), outputs = node.inputs[:3], edit.release(node)
        # 1. (batch, sequence, heads * size)  ->  (batch, heads, sequence, size)
        q = to_heads(new, q, found.q_heads, found)
        k, v = (to_heads(new, tensor, found.kv_heads, found) for tensor in (k, v))
        # second and third output: keys and values before heads are repeated; without a cache there is nothing to join
        for index, tensor in ((1, k), (2, v)):
            if len(found.used) > index and found.used[index]:
                new.emit_to("Identity", [tensor], [outputs[index]])
        # 2. to 6. Softmax(Mul(MatMul(q, k transposed), scale) + mask)
        k, v = (repeat_heads(new, t, node.inputs[i], found) for t, i in ((k, 1), (v, 2)))
        weights = _softmax(new, _scores(new, q, k, found), found)
        # 7. MatMul(weights, v), and for rank 3 back to (batch, sequence, heads * size)
        if found.rank == 4:
            new.emit_to("MatMul", [weights, v], [outputs[0]])
        else:
            from_heads(new, new.emit("MatMul", [weights, v], found.np_dtype), outputs[0], found)


def _scores(new: Emitter, q: gs.Tensor, k: gs.Tensor, site: Site) -> gs.Tensor:
    """Scaled and capped products of queries and keys, (batch, heads, queries, keys)."""
    attrs, kind, factor = site.node.attrs, site.np_dtype, site.node.attrs.get("scale")
    value = 1.0 / math.sqrt(site.head_size or 1) if factor is None else factor
    scale = new.constant("scale", np.array(value, kind))
    keys = new.emit("Transpose", [k], kind, perm=[0, 1, 3, 2])
    if site.dtype == TensorProto.FLOAT16:
        # MatMul(Mul(q, scale), keys): the products alone could pass the largest float16
        scores = new.emit("MatMul", [new.emit("Mul", [q, scale], kind), keys], kind)
    else:
        # Mul(MatMul(q, keys), scale): the range is wide enough, and a DequantizeLinear stays next to its MatMul
        scores = new.emit("Mul", [new.emit("MatMul", [q, keys], kind), scale], kind)
    if cap := attrs.get("softcap", 0.0):
        # scores  ->  cap * Tanh(scores / cap)
        limit = new.constant("softcap", np.array(cap, kind))
        scores = new.emit("Tanh", [new.emit("Div", [scores, limit], kind)], kind)
        scores = new.emit("Mul", [scores, limit], kind)
    return scores


def _softmax(new: Emitter, scores: gs.Tensor, site: Site) -> gs.Tensor:
    """Mask, softmax over keys, zeros in rows where everything is masked."""
    mask = mask_of(new, site)
    if mask is None:
        return _probabilities(new, scores, site)
    open_rows = _open_rows(new, mask, site)
    rows = _probabilities(new, masked_scores(new, scores, mask, site), site)
    return rows if open_rows is None else or_zero(new, open_rows, rows, site)


def _open_rows(new: Emitter, mask: Mask, site: Site) -> gs.Tensor | None:
    """Where probabilities hold; None when every query sees a key. A boolean mask says it for each key by itself."""
    if mask.bias is not None:
        return largest_above(new, mask.bias, mask.least, site)
    return mask.allowed if mask.given else None


def _probabilities(new: Emitter, scores: gs.Tensor, site: Site) -> gs.Tensor:
    """Softmax over keys, in softmax_precision where that is another type."""
    precision = site.node.attrs.get("softmax_precision", 0)
    if not precision or precision == site.dtype:
        return new.emit("Softmax", [scores], site.np_dtype, axis=-1)
    wide = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(precision))
    rows = new.emit("Softmax", [new.emit("Cast", [scores], wide, to=precision)], wide, axis=-1)
    return new.emit("Cast", [rows], site.np_dtype, to=site.dtype)
