"""quantize-softmax: attention of quantized queries, keys and values multiplies in FP8 on both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, Emitter
from passes.graph.grids import grid_of, small_values
from passes.graph.match import View, is_constant, is_op, producer
from passes.targets.tensorrt.attention_parts import (
    Site,
    from_heads,
    largest_above,
    mask_of,
    masked_scores,
    repeat_heads,
    to_heads,
)

# A probability is at most 1, and the largest number of FLOAT8E4M3FN is 448: no calibration is needed. This is the first
# number from 1 / 448 on that float16 and bfloat16 both hold: rounded down, it would cut off probabilities near 1.
_SCALE = 147 * 2.0**-16


@register
@dataclass(frozen=True)
class QuantizeSoftmax(Pass):
    """Write Attention on FP8 as the pattern that TensorRT fuses into one FP8 kernel. Changes numbers.

    Fires on Attention (opset 23) whose queries, keys and values come from QuantizeLinear - DequantizeLinear pairs
    to FLOAT8E4M3FN with one scale each. As one node, TensorRT computes it in 16 bits. The pieces, in order:

    1. 3-D inputs to heads, fewer key than query heads repeated, keys transposed: all before quantization, so
       that each pair stands right at its MatMul.
    2. The factor of the scores (1 / sqrt(head size)) goes into the scale that dequantizes the queries: their
       grid stays that of calibration, and nothing comes between the pair and the MatMul.
    3. Mask and is_causal as in decompose-attention: floats are added, what is masked becomes -inf.
    4. Softmax, then a pair with scale 1 / 448, rounded up: this is what changes numbers, as in ModelOpt's FP8
       attention.
    5. MatMul with the values. Rows with everything masked are set to zero here, not after the Softmax: a node
       between Softmax and its pair keeps TensorRT from fusing.

    TensorRT-RTX 1.7 fuses this for SM 89 and 120, float16 and bfloat16, head sizes 8 to 256, where the profile's
    usual sequence is long enough to gain by it (128 tokens are, 80 are not).

        before: Attention(DQ(Q(q)), DQ(Q(k)), DQ(Q(v)))
        after:  MatMul(DQ(Q(Softmax(MatMul(DQ(Q(q)), DQ(Q(k transposed)))))), DQ(Q(v)))

    Declines when: there is softcap, softmax_precision or a second output; a head is larger than `max_head_dim`; only
    some of q, k, v are quantized; decompose-attention would decline.
    """

    name: ClassVar[str] = "quantize-softmax"
    tolerance: ClassVar[float] = 0.06
    max_head_dim: int = 256

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace each node where it stands, then drop the pairs that only Attention read."""
        result = Edit(graph).rewrite_each(self.match, self.rewrite, "Attention nodes in FP8")
        if result.changed:
            _drop_unread(graph)
        return result

    def match(self, node: gs.Node, view: View) -> _Found | str | None:
        """An Attention node whose queries, keys and values are FP8. Raises Declined where it must stay."""
        if not is_op(node, "Attention"):
            return None
        pairs = [pair for pair in map(_Pair.of, node.inputs[:3]) if pair is not None]
        if not pairs:
            return None
        site = Site.of(node, view)
        reason = self._reason(site, len(pairs))
        if reason is None:
            site.check_heads()
        return reason or _Found(site, *pairs)

    def _reason(self, site: Site, pairs: int) -> str | None:
        attrs = site.node.attrs
        if pairs < 3:
            return "only some of queries, keys and values are quantized to FP8 with one scale"
        if attrs.get("softcap", 0.0) or attrs.get("softmax_precision", 0) not in (0, site.dtype):
            return "it has softcap or softmax_precision"
        if any(site.used[1:]):
            return "more than its first output is used"
        if site.head_size is None or site.head_size > self.max_head_dim:
            return f"its head size is not known to be at most {self.max_head_dim}"
        return None

    def rewrite(self, found: _Found, edit: Edit) -> None:
        """Attention(DQ(Q(q)), DQ(Q(k)), DQ(Q(v)))  ->  MatMul(DQ(Q(Softmax(MatMul(DQ(Q(q)), DQ(Q(k)))))), DQ(Q(v)))"""
        site, kind = found.site, found.site.np_dtype
        node, new = site.node, edit.at(site.node)
        # 1. to heads, before quantization; keys transposed
        q = to_heads(new, found.q.source, site.q_heads, site)
        k = repeat_heads(new, to_heads(new, found.k.source, site.kv_heads, site), node.inputs[1], site)
        v = repeat_heads(new, to_heads(new, found.v.source, site.kv_heads, site), node.inputs[2], site)
        for index, pair in enumerate((found.q, found.k, found.v)):
            node.inputs[index] = (
                pair.source
            )  # from here on no shape is read from a pair, and the pairs may go
        k = new.emit("Transpose", [k], kind, perm=[0, 1, 3, 2])
        # 2. the factor of the scores goes into the scale that dequantizes the queries
        factor = node.attrs.get("scale")
        factor = 1.0 / math.sqrt(site.head_size or 1) if factor is None else factor
        scores = new.emit(
            "MatMul", [found.q.written(new, q, kind, factor), found.k.written(new, k, kind)], kind
        )
        # 3. masked, 4. Softmax and its pair, 5. MatMul with the values
        scores, open_rows = _masked(new, scores, site)
        rows = _quantized(new, new.emit("Softmax", [scores], kind, axis=-1), kind)
        _finish(new, [rows, found.v.written(new, v, kind)], open_rows, site, edit.release(node)[0])


@dataclass(frozen=True)
class _Pair:
    """A QuantizeLinear to FP8 and the DequantizeLinear that Attention reads; `scale` as a number."""

    quantizer: gs.Node
    dequantizer: gs.Node
    scale: float

    @classmethod
    def of(cls, tensor: gs.Tensor) -> _Pair | None:
        """The pair that makes a tensor, or None."""
        dq = producer(tensor)
        q = producer(dq.inputs[0]) if is_op(dq, "DequantizeLinear") else None
        if dq is None or not is_op(q, "QuantizeLinear") or is_constant(q.inputs[0]):
            return None
        grid, values = grid_of(q), small_values(q.inputs[1])
        if grid is None or grid != grid_of(dq) or grid.axis is not None or grid.zero or values is None:
            return None
        return cls(q, dq, float(values.reshape(()))) if grid.dtype == TensorProto.FLOAT8E4M3FN else None

    @property
    def source(self) -> gs.Tensor:
        """What is quantized."""
        return self.quantizer.inputs[0]

    def written(self, new: Emitter, tensor: gs.Tensor, kind: np.dtype[Any], factor: float = 1.0) -> gs.Tensor:
        """`tensor` quantized as the pair does, and dequantized `factor` times larger."""
        q, dq = self.quantizer, self.dequantizer
        narrow = new.emit("QuantizeLinear", [tensor, *q.inputs[1:]], TensorProto.FLOAT8E4M3FN, **q.attrs)
        scale = dq.inputs[1]
        if factor != 1.0:
            scale = new.constant("query_scale", np.array(self.scale * factor, kind))
        return new.emit("DequantizeLinear", [narrow, scale, *dq.inputs[2:]], kind, **dq.attrs)


@dataclass(frozen=True)
class _Found:
    """An Attention node and the pairs of its queries, keys and values."""

    site: Site
    q: _Pair
    k: _Pair
    v: _Pair


def _quantized(new: Emitter, rows: gs.Tensor, kind: np.dtype[Any]) -> gs.Tensor:
    """rows  ->  DQ(Q(rows)) with the scale of probabilities"""
    scale = new.constant("softmax_scale", np.array(_SCALE, kind))
    zero = new.constant("softmax_zero_point", np.array(0, ml_dtypes.float8_e4m3fn))
    narrow = new.emit("QuantizeLinear", [rows, scale, zero], TensorProto.FLOAT8E4M3FN)
    return new.emit("DequantizeLinear", [narrow, scale, zero], kind)


def _masked(new: Emitter, scores: gs.Tensor, site: Site) -> tuple[gs.Tensor, gs.Tensor | None]:
    """Scores with -inf where masked, and which rows have anything left, (..., queries, 1); None: all have."""
    mask = mask_of(new, site)
    if mask is None:
        return scores, None
    scores = masked_scores(new, scores, mask, site)
    if not mask.given:  # is_causal alone: every query sees the first key
        return scores, None
    if mask.bias is not None:
        return scores, largest_above(new, mask.bias, mask.least, site)
    ones = new.emit("Cast", [mask.allowed], site.np_dtype, to=site.dtype)
    return scores, largest_above(new, ones, new.constant("none", np.array(0, site.np_dtype)), site)


def _finish(
    new: Emitter, factors: list[gs.Tensor], open_rows: gs.Tensor | None, site: Site, output: gs.Tensor
) -> None:
    """MatMul(weights, values), zeros in rows where everything is masked, and the layout of the output."""
    kind = site.np_dtype
    if site.rank == 4 and open_rows is None:
        new.emit_to("MatMul", factors, [output])
        return
    y = new.emit("MatMul", factors, kind)
    if open_rows is not None:
        zero = new.constant("zero", np.array(0, kind))
        if site.rank == 4:
            new.emit_to("Where", [open_rows, y, zero], [output])
            return
        y = new.emit("Where", [open_rows, y, zero], kind)
    from_heads(new, y, output, site)


def _drop_unread(graph: gs.Graph) -> None:
    """Remove the pairs that only Attention read."""
    for op in ("DequantizeLinear", "QuantizeLinear"):
        edit = Edit(graph)
        nodes = (node for part in edit.view.parts for node in part.nodes if node.op == op)
        edit.remove(
            *(n for n in nodes if not n.outputs[0].outputs and id(n.outputs[0]) not in edit.view.outputs)
        )
        edit.apply()
