"""quantize-softmax: attention of quantized queries, keys and values multiplies in FP8 on both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import Emitter, Names, drop_nodes, insert_before
from passes.graph.grids import grid_of, input_of, is_weight, small_values
from passes.graph.match import STANDARD, output_ids, producer
from passes.targets.tensorrt.decompose_attention import CannotError, Site, causal_mask, repeat_heads, to_heads
from passes.weights.recipe import dtype_of

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
        """Replace each node where it stands."""
        names, outputs = Names(graph), output_ids(graph)
        dead: set[int] = set()
        refusals: list[Refusal] = []
        for part in walk(graph):
            new: dict[int, list[gs.Node]] = {}
            for node in part.nodes:
                if node.op != "Attention" or node.domain not in STANDARD:
                    continue
                pairs = [_Pair.of(tensor) for tensor in node.inputs[:3]]
                found = [pair for pair in pairs if pair is not None]
                if not found:
                    continue
                used = [bool(t.outputs) or id(t) in outputs for t in node.outputs]
                try:
                    site = Site.of(node, used)
                    self._reject(site, len(found))
                    new[id(node)] = _Writer(site, Emitter(node, names), found).write()
                    dead.add(id(node))
                except CannotError as reason:
                    refusals.append(Refusal(node.name, str(reason)))
            insert_before(part, new)
        drop_nodes(graph, dead)
        if dead:
            _drop_unread(graph, outputs)
        notes = (f"{len(dead)} Attention nodes in FP8",) if dead else ()
        return PassResult(len(dead), notes, tuple(refusals))

    def _reject(self, site: Site, pairs: int) -> None:
        attrs = site.node.attrs
        if pairs < 3:
            raise CannotError("only some of queries, keys and values are quantized to FP8 with one scale")
        if attrs.get("softcap", 0.0) or attrs.get("softmax_precision", 0) not in (0, site.dtype):
            raise CannotError("it has softcap or softmax_precision")
        if any(site.used[1:]):
            raise CannotError("more than its first output is used")
        if site.head_size is None or site.head_size > self.max_head_dim:
            raise CannotError(f"its head size is not known to be at most {self.max_head_dim}")


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
        if dq is None or dq.op != "DequantizeLinear" or (q := producer(dq.inputs[0])) is None:
            return None
        if q.op != "QuantizeLinear" or is_weight(q.inputs[0]):
            return None
        grid, values = grid_of(q), small_values(q.inputs[1])
        if grid is None or grid != grid_of(dq) or grid.axis is not None or grid.zero or values is None:
            return None
        return cls(q, dq, float(values.reshape(()))) if grid.dtype == TensorProto.FLOAT8E4M3FN else None

    @property
    def source(self) -> gs.Tensor:
        """What is quantized."""
        return self.quantizer.inputs[0]


@dataclass(frozen=True)
class _Writer:
    """The nodes that take the place of one Attention node."""

    site: Site
    new: Emitter
    pairs: list[_Pair]

    def write(self) -> list[gs.Node]:
        """All nodes, in order. Raises CannotError."""
        site, new, kind = self.site, self.new, self.site.np_dtype
        q, k, v = self.pairs
        if site.q_heads is None or site.kv_heads is None:
            raise CannotError("its head counts are not known")
        queries = to_heads(new, q.source, site.q_heads, site)
        keys = repeat_heads(new, to_heads(new, k.source, site.kv_heads, site), site.node.inputs[1], site)
        values = repeat_heads(new, to_heads(new, v.source, site.kv_heads, site), site.node.inputs[2], site)
        for index, pair in enumerate(
            self.pairs
        ):  # nothing raises from here on, and no shape is read from a pair
            site.node.inputs[index] = pair.source
        keys = new.emit("Transpose", [keys], kind, perm=[0, 1, 3, 2])
        factor = site.node.attrs.get("scale")
        factor = 1.0 / math.sqrt(site.head_size or 1) if factor is None else factor
        scores = new.emit("MatMul", [self._pair(q, queries, factor), self._pair(k, keys)], kind)
        scores, open_rows = self._masked(scores)
        rows = self._probabilities(new.emit("Softmax", [scores], kind, axis=-1))
        self._finish([rows, self._pair(v, values)], open_rows)
        return new.nodes

    def _pair(self, pair: _Pair, tensor: gs.Tensor, factor: float = 1.0) -> gs.Tensor:
        """`tensor` quantized as the pair does, and dequantized `factor` times larger."""
        new, q, dq = self.new, pair.quantizer, pair.dequantizer
        narrow = new.emit("QuantizeLinear", [tensor, *q.inputs[1:]], TensorProto.FLOAT8E4M3FN, **q.attrs)
        scale = dq.inputs[1]
        if factor != 1.0:
            scale = new.constant("query_scale", np.array(pair.scale * factor, self.site.np_dtype))
        return new.emit("DequantizeLinear", [narrow, scale, *dq.inputs[2:]], self.site.np_dtype, **dq.attrs)

    def _probabilities(self, rows: gs.Tensor) -> gs.Tensor:
        new, kind = self.new, self.site.np_dtype
        scale = new.constant("softmax_scale", np.array(_SCALE, kind))
        zero = new.constant("softmax_zero_point", np.array(0, ml_dtypes.float8_e4m3fn))
        narrow = new.emit("QuantizeLinear", [rows, scale, zero], TensorProto.FLOAT8E4M3FN)
        return new.emit("DequantizeLinear", [narrow, scale, zero], kind)

    def _masked(self, scores: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor | None]:
        """Scores with -inf where masked, and which rows have anything left, (..., queries, 1); None: all have."""
        new, kind, mask = self.new, self.site.np_dtype, input_of(self.site.node, 3)
        causal = causal_mask(new, self.site) if self.site.node.attrs.get("is_causal", 0) else None
        if causal is None and mask is None:
            return scores, None
        least = new.constant("masked", np.array(-np.inf, kind))
        if mask is not None and dtype_of(mask) != TensorProto.BOOL:
            bias = mask if causal is None else new.emit("Where", [causal, mask, least], kind)
            return new.emit("Add", [scores, bias], kind), self._above(bias, least)
        masks = [tensor for tensor in (mask, causal) if tensor is not None]
        allowed = masks[0] if len(masks) == 1 else new.emit("And", masks, np.bool_)
        scores = new.emit("Where", [allowed, scores, least], kind)
        if mask is None:  # every query sees the first key
            return scores, None
        ones = new.emit("Cast", [allowed], kind, to=self.site.dtype)
        return scores, self._above(ones, new.constant("none", np.array(0, kind)))

    def _above(self, tensor: gs.Tensor, limit: gs.Tensor) -> gs.Tensor:
        """Whether the largest number of each row is above `limit`."""
        axes = self.new.constant("axes", np.array([-1], np.int64))
        best = self.new.emit("ReduceMax", [tensor, axes], self.site.np_dtype, keepdims=1)
        return self.new.emit("Greater", [best, limit], np.bool_)

    def _finish(self, factors: list[gs.Tensor], open_rows: gs.Tensor | None) -> None:
        """The product, zeros in rows where everything is masked, and the layout of the output."""
        new, kind, output = self.new, self.site.np_dtype, self.site.node.outputs[0]
        y = new.emit("MatMul", factors, kind)
        if open_rows is not None:
            y = new.emit("Where", [open_rows, y, new.constant("zero", np.array(0, kind))], kind)
        if self.site.rank == 4:
            new.nodes[-1].outputs[0] = output
            return
        y = new.emit("Transpose", [y], kind, perm=[0, 2, 1, 3])
        new.emit_to("Reshape", [y, new.constant("shape", np.array([0, 0, -1], np.int64))], [output])


def _drop_unread(graph: gs.Graph, outputs: set[int]) -> None:
    """Remove the pairs that only Attention read."""
    for op in ("DequantizeLinear", "QuantizeLinear"):
        dead = {
            id(node)
            for part in walk(graph)
            for node in part.nodes
            if node.op == op and not node.outputs[0].outputs and id(node.outputs[0]) not in outputs
        }
        drop_nodes(graph, dead)
