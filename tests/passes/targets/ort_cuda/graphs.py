"""Graphs and numbers that the tests of several ort-cuda passes share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from tests.passes.graph_helpers import check_same, error, model, run_ort, typed


def seeded(seed: int) -> Callable[..., Any]:
    """What gives normal numbers of a shape and dtype, other ones at each call."""
    rng = np.random.default_rng(seed)

    def random(*shape: int, dtype: Any = np.float32) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    return random


def check_reaches(
    before: Any, after: Any, feeds: dict[str, Any], tolerance: float, moves: float = 1e-3
) -> None:
    """Both models agree, and go on doing so when any one input is another: each arrives where it did."""
    check_same(before, after, feeds, tolerance)
    want = run_ort(before, feeds)
    for name in feeds:
        moved = feeds | {name: 1.1 * feeds[name]}
        check_same(before, after, moved, tolerance)
        assert any(error(a, b) > moves for a, b in zip(run_ort(after, moved), want, strict=True)), name


def microsoft(
    text: str, weights: dict[str, Any], shapes: dict[str, list[Any]], code: int = 1
) -> onnx.ModelProto:
    """A typed model with operators of com.microsoft, behind which ONNX knows no shapes: `shapes` says them."""
    made = model(text, weights)
    made.opset_import.add(domain="com.microsoft", version=1)
    for name, shape in shapes.items():
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(name, code, shape))
    return typed(made)


def biased_values(kind: str, random: Callable[..., Any], *, bias: int = 8, after: int = 5) -> onnx.ModelProto:
    """An attention whose values have a bias, and the projection of its output, with biases of so many elements."""
    graph = f"""g ({kind}[b,s,6] x, {kind}[b,s,8] q, {kind}[b,s,8] k) => ({kind}[b,s,5] y) {{
        pv = MatMul(x, mv) v = Add(pv, bv)
        o = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)
        yo = MatMul(o, mo) y = Add(yo, bo)
    }}"""
    dtype = np.float16 if kind == "float16" else np.float32
    shapes = {"mv": (6, 8), "bv": (bias,), "mo": (8, 5), "bo": (after,)}
    weights = {name: random(*shape, dtype=dtype) for name, shape in shapes.items()}
    code = onnx.TensorProto.FLOAT16 if kind == "float16" else onnx.TensorProto.FLOAT
    return microsoft(graph, weights, {"o": ["b", "s", 8]}, code)


PRODUCTS = "e0 = Mul(f0, b0) u2 = Unsqueeze(r2, zero) e2 = Mul(b1, u2)"


def rows(vectors: dict[str, Any], products: str = PRODUCTS, *, dtype: str = "float") -> onnx.ModelProto:
    """A tensor of three rows, two of which are multiplied by the constants b0 and b1."""
    text = f"""g ({dtype}[1,12] x, {dtype}[4] one) => ({dtype}[4] y0, {dtype}[1,1,4] y2)
        <int64[2] shape = {{3, 4}}, int64[1] flat = {{-1}}, int64[1] zero = {{0}}> {{
        m = Reshape(x, shape)
        r0, r1, r2 = Split<axis = 0, num_outputs = 3>(m) f0 = Reshape(r0, flat) {products}
        h0 = Add(e0, one) y0 = Mul(h0, f0) y2 = Add(e2, r1)
    }}"""
    return typed(model(text, vectors))
