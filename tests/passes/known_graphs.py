"""Small graphs of the kinds that exporters write, each with inputs: where every pass that can fire at all does fire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto

from tests.passes.graph_helpers import model
from tests.passes.qdq_networks import INT8, every_move
from tests.passes.trt_helpers import trt_model

Known = tuple[ModelProto, dict[str, Any]]
SEED = 21


def _values(**shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(SEED)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def unet() -> Known:
    """Convolutions down and up again with a skip, group norms, and the time added to every pixel."""
    weights = _values(
        k1=(8, 4, 3, 3), k2=(8, 8, 3, 3), k3=(4, 16, 3, 3), kb=(8,), s=(8,), d=(8,), wt=(8, 6), bt=(8,)
    )
    text = """g (float[b,4,h,w] x, float[b,6] t) => (float[b,4,h,w] y) {
        axes = Constant<value = int64[2] {2, 3}>()
        scales = Constant<value = float[4] {1.0, 1.0, 2.0, 2.0}>()
        c1 = Conv<pads = [1, 1, 1, 1]>(x, k1, kb)
        n1 = GroupNormalization<num_groups = 2>(c1, s, d)
        q1 = Sigmoid(n1)
        a1 = Mul(n1, q1)
        e1 = Gemm<transB = 1>(t, wt, bt)
        e4 = Unsqueeze(e1, axes)
        m1 = Add(a1, e4)
        d1 = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(m1, k2)
        u1 = Resize<mode = "nearest">(d1, , scales)
        j1 = Concat<axis = 1>(u1, m1)
        y = Conv<pads = [1, 1, 1, 1]>(j1, k3)
    }"""
    return model(text, weights), _values(x=(2, 4, 8, 6), t=(2, 6))


def transformer() -> Known:
    """A block of a diffusion transformer: modulated norms, attention with rotations left out, gates, residuals."""
    shapes = dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8)) | dict.fromkeys(("bq", "bk", "bv", "bo"), (8,))
    weights = _values(**shapes, wm=(32, 6), bm=(32,), w1=(8, 16), b1=(16,), w2=(16, 8), b2=(8,))
    weights = {name: value / 3 for name, value in weights.items()} | {
        "ones": np.ones(8, np.float32),
        "one": np.float32(1),
    }
    heads = " ".join(
        f"""{n}0 = MatMul(a, w{n}) {n}1 = Add({n}0, b{n}) {n}2 = Reshape({n}1, split)
        {n}3 = Transpose<perm = [0, 2, 1, 3]>({n}2)"""
        for n in "qkv"
    )
    text = f"""g (float[b,s,8] x, float[b,6] t) => (float[b,s,8] y, float[b,s,8] z) {{
        split = Constant<value_ints = [0, 0, 2, 4]>()
        merge = Constant<value_ints = [0, 0, 8]>()
        middle = Constant<value_ints = [1]>()
        m0 = Gemm<transB = 1>(t, wm, bm)
        m1 = Unsqueeze(m0, middle)
        scale0, shift, gate, other = Split<axis = 2, num_outputs = 4>(m1)
        scale = Add(scale0, one)
        n = LayerNormalization<axis = -1>(x, ones)
        c = Mul(n, scale)
        a = Add(c, shift)
        {heads}
        o0 = Attention(q3, k3, v3)
        o1 = Transpose<perm = [0, 2, 1, 3]>(o0)
        o2 = Reshape(o1, merge)
        o3 = MatMul(o2, wo)
        o4 = Add(o3, bo)
        o5 = Mul(gate, o4)
        r = Add(x, o5)
        n2 = LayerNormalization<axis = -1>(r, ones)
        c2 = Mul(n2, scale)
        z = Add(c2, other)
        f0 = MatMul(z, w1)
        f1 = Add(f0, b1)
        f2 = Gelu(f1)
        f3 = MatMul(f2, w2)
        f4 = Add(f3, b2)
        y = Add(r, f4)
    }}"""
    return model(text, weights), _values(x=(2, 5, 8), t=(2, 6))


def quantized() -> Known:
    """Quantized data that is moved in every way."""
    net = every_move(INT8)
    return net.model(), net.feeds()


def weights_quantized() -> Known:
    """A weight that the graph quantizes, transposed, and sequences."""
    weights = _values(w=(8, 8)) | {"scale": np.float32(0.02), "zero": np.int8(0)}
    text = """g (float[b,s,8] x) => (float[b,s,8] y) {
        q = QuantizeLinear(w, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        t = Transpose<perm = [1, 0]>(d)
        m = MatMul(x, t)
        four = Constant<value_int = 4>()
        parts = SplitToSequence<axis = 2>(m, four)
        first = Constant<value_int = 0>()
        second = Constant<value_int = 1>()
        g = SequenceAt(parts, first)
        k = SequenceAt(parts, second)
        j = Concat<axis = 2>(k, g)
        i = Identity(j)
        unused = Exp(m)
        y = Exp(i)
    }"""
    return model(text, weights), _values(x=(2, 3, 8))


def fp4() -> Known:
    """NVFP4 on both sides of a product, by TensorRT's operators."""
    values = "<axis = -1, block_size = 16, scale_type = 17>"
    text = f"""g (float[b,t,32] x) => (float[b,t,8] y) {{
        xq, xb = trt.TRT_FP4DynamicQuantize{values}(x, s)
        xs = DequantizeLinear(xb, s)
        xd = DequantizeLinear<axis = -1, block_size = 16>(xq, xs)
        wq, wb = trt.TRT_FP4DynamicQuantize{values}(w, s)
        ws = DequantizeLinear(wb, s)
        wd = DequantizeLinear<axis = -1, block_size = 16>(wq, ws)
        wt = Transpose<perm = [1, 0]>(wd)
        y = MatMul(xd, wt)
    }}"""
    return trt_model(text, _values(w=(8, 32)) | {"s": np.float32(3 / 2688)}), _values(x=(2, 3, 32))


def old() -> Known:
    """Operators that changed since opset 17."""
    text = """g (float[b,6,4] x) => (float[b,6,1] y) {
        u, v = Split<axis = 1>(x)
        s = Add(u, v)
        j = Concat<axis = 1>(s, u)
        y = ReduceMean<axes = [-1]>(j)
    }"""
    return model(text, opset=17), _values(x=(2, 6, 4))


KNOWN: Mapping[str, Callable[[], Known]] = {
    f.__name__: f for f in (unet, transformer, quantized, weights_quantized, fp4, old)
}
