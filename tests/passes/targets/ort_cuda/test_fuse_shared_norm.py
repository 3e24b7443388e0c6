"""Target ort-cuda: fuse-shared-norm, fuse-residual, merge-row-products, rewrite-patches."""

from typing import Any

import numpy as np
import onnx
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fuse_adaptive_norm import FuseAdaptiveNorm
from passes.targets.ort_cuda.fuse_residual import FuseResidual
from passes.targets.ort_cuda.fuse_shared_norm import FuseSharedNorm
from passes.targets.ort_cuda.keep_float32 import KeepFloat32
from passes.targets.ort_cuda.lift_bias import LiftBias
from passes.targets.ort_cuda.merge_row_products import MergeRowProducts
from passes.targets.ort_cuda.rewrite_patches import RewritePatches
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, error, model, ops, run_ort, typed

RNG = np.random.default_rng(41)
C = 8


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def check_reaches(before: Any, after: Any, feeds: dict[str, Any], tolerance: float) -> None:
    """Both models agree, and go on doing so when any one input is another: each arrives where it did."""
    check_same(before, after, feeds, tolerance)
    want = run_ort(before, feeds)
    for name in feeds:
        moved = feeds | {name: 1.1 * feeds[name]}
        check_same(before, after, moved, tolerance)
        assert any(error(a, b) > 1e-3 for a, b in zip(run_ort(after, moved), want, strict=True)), name


def normed(inside: str, batch: str = "b", tokens: str = "s") -> Any:
    per_image = ", ".join(f"float[{batch},1,8] {name}" for name in ("g", "s1", "t1"))
    text = f"""g (float[{batch},{tokens},8] x, float[{batch},{tokens},8] v, {per_image})
        => (float[{batch},{tokens},8] y, float[{batch},{tokens},8] k) {{
        p = MatMul(v, m) q = Add(p, bias) d = Mul(g, q) {inside} k = Neg(a)
    }}"""
    weights = {"ones": np.ones(C, np.float32), "gamma": random(C), "beta": random(C)}
    return typed(model(text, weights | {"bias": random(C), "m": random(C, C)}))


ADAPTIVE = (
    "a = Add(x, d) n = LayerNormalization<axis = -1, epsilon = 0.01>(a, ones) o = Mul(n, s1) y = Add(o, t1)"
)
STEPS = (FuseAdaptiveNorm(), RemoveUnused(), FuseSharedNorm(), RemoveUnused())


@pytest.mark.parametrize("batch", ["b", "3"])
def test_norms_over_few_tokens(batch: str) -> None:
    before = normed(ADAPTIVE, batch, "text")
    result = apply(before, *STEPS)
    assert result.records[2].changed == 1
    assert ops(result.model).count("SkipLayerNormalization") == 1
    assert ops(result.model).count("LayerNormalization") == 0
    feeds = {name: random(3, 5, C) for name in ("x", "v")} | {n: random(3, 1, C) for n in ("g", "s1", "t1")}
    check_reaches(before, result.model, feeds, 1e-6)


@pytest.mark.parametrize(
    "inside",
    [
        "a = Add(x, d) y = LayerNormalization<axis = -1, epsilon = 0.01>(a, gamma, beta)",
        "a = Add(d, x) y = LayerNormalization<axis = 2, epsilon = 0.01>(a, gamma)",
        "a = Add(x, q) w = LayerNormalization(a, gamma, beta) z = Mul(w, g) u = Mul(z, s1) y = Add(u, t1)",
        "a = Add(q, x) w = LayerNormalization(a, gamma) z = Mul(w, g) u = Mul(z, s1) y = Add(u, t1)",
    ],
)
def test_norms_with_constant_scale(inside: str) -> None:
    before = normed(inside)
    result = apply(before, RemoveUnused(), FuseSharedNorm(), RemoveUnused())
    found = ops(result.model)
    assert (found.count("SkipLayerNormalization"), found.count("LayerNormalization")) == (1, 0)
    assert found.count("Add") == 1  # the bias went into the norm where nothing stands between
    feeds = {name: random(2, 5, C) for name in ("x", "v")} | {n: random(2, 1, C) for n in ("g", "s1", "t1")}
    wanted = {name: feeds[name] for name in {i.name for i in before.graph.input}}
    check_same(before, result.model, wanted, 1e-6)
    moved = wanted | {"x": 1.1 * wanted["x"]}
    assert error(run_ort(result.model, moved)[0], run_ort(before, wanted)[0]) > 1e-3


def test_norms_must_not_fire() -> None:
    for made in (
        normed(ADAPTIVE),  # many tokens: fuse-skip-norm's
        normed(ADAPTIVE.replace("x, d", "x, t1"), tokens="text"),  # one row for all tokens
        normed(
            "a = Add(x, d) z = Sqrt(a) " + ADAPTIVE.replace("a = Add(x, d) ", "").replace("o, t1", "o, z"),
            tokens="text",
        ),
        normed("a = Add(x, d) y = LayerNormalization<axis = 1>(a, m)"),
        normed("a = Mul(x, d) y = LayerNormalization(a, gamma)"),
    ):
        assert apply(made, *STEPS).records[2].changed == 0


def residual(inside: str = "p = MatMul(x, m) y = Add(r, p)", batch: str = "1") -> Any:
    text = f"""g (float[{batch},s,6] x, float[{batch},s,8] r) => (float[{batch},s,8] y) {{ {inside} }}"""
    return typed(model(text, {"m": random(6, C), "c": random(1, 5, C), "row": random(1, 1, C)}))


@pytest.mark.parametrize(
    "inside",
    ["p = MatMul(x, m) y = Add(r, p)", "n = Neg(m) p = MatMul(x, n) y = Add(p, r)"],
)
def test_residual_goes_into_the_product(inside: str) -> None:
    before = residual(inside)
    result = apply(before, FuseResidual(), RemoveUnused())
    assert result.changed > 0
    assert {"MatMul", "Add"}.isdisjoint(ops(result.model))
    check_reaches(before, result.model, {"x": random(1, 5, 6), "r": random(1, 5, C)}, 1e-6)


def test_residual_must_not_fire() -> None:
    for inside, batch in (
        ("p = MatMul(x, m) y = Add(r, p)", "2"),
        ("p = MatMul(x, m) y = Add(r, p)", "b"),
        ("p = MatMul(x, m) y = Add(c, p)", "1"),  # constant
        ("p = MatMul(x, m) t = Add(r, p) y = Add(t, p)", "1"),  # the product is read twice
        ("p = MatMul(x, m) y = Mul(r, p)", "1"),
        ("i = Neg(row) p = MatMul(x, m) q = Add(p, i) y = Mul(q, r)", "1"),  # one row for all tokens
    ):
        assert apply(residual(inside, batch), FuseResidual()).changed == 0, inside


PRODUCTS = "e0 = Mul(f0, b0) u2 = Unsqueeze(r2, zero) e2 = Mul(b1, u2)"


def rows(products: str = PRODUCTS, *, dtype: str = "float", vectors: Any = None) -> Any:
    text = f"""g ({dtype}[1,12] x, {dtype}[4] one) => ({dtype}[4] y0, {dtype}[1,1,4] y2)
        <int64[2] shape = {{3, 4}}, int64[1] flat = {{-1}}, int64[1] zero = {{0}}> {{
        m = Reshape(x, shape)
        r0, r1, r2 = Split<axis = 0, num_outputs = 3>(m) f0 = Reshape(r0, flat) {products}
        h0 = Add(e0, one) y0 = Mul(h0, f0) y2 = Add(e2, r1)
    }}"""
    return typed(model(text, vectors or {"b0": random(4), "b1": random(4)}))


def test_products_of_rows() -> None:
    before = rows()
    result = apply(before, MergeRowProducts(), RemoveUnused())
    assert result.records[0].changed == 2
    assert ops(result.model).count("Mul") == 1 + 1  # that of the rows, and that of two computed tensors
    check_reaches(before, result.model, {"x": random(1, 12), "one": random(4)}, 1e-6)
    for products in (
        "e0 = Mul(f0, b0) u2 = Unsqueeze(r2, zero) e2 = Neg(u2)",  # one alone
        "e0 = Mul(f0, b0) u2 = Unsqueeze(r2, zero) v2 = Neg(u2) e2 = Mul(v2, b1)",  # not the row itself
        "c0 = Neg(b0) e0 = Mul(f0, c0) u2 = Unsqueeze(r2, zero) e2 = Mul(u2, b1)",  # not a constant
    ):
        assert apply(rows(products), MergeRowProducts()).changed == 0


def test_joined_vectors_keep_their_digits() -> None:
    """Vectors that fold-value-bias computed are float32 in the file when they have been joined, too."""
    moved = Recipe.of_array(random(4, 1)).subtract_product(
        Recipe.of_array(random(4, 3)), Recipe.of_array(random(3, 1))
    )
    vector = moved.reshape((4,)).cast(int(onnx.TensorProto.FLOAT16))
    before = rows(dtype="float16", vectors={"b0": vector, "b1": random(4, dtype=np.float16)})
    merged = apply(before, MergeRowProducts(), RemoveUnused())
    kept = apply(merged.model, KeepFloat32())
    assert kept.changed == 1
    feeds = {"x": random(1, 12, dtype=np.float16), "one": random(4, dtype=np.float16)}
    check_same(before, merged.model, feeds, 0.0)
    check_same(before, kept.model, feeds, 0.0)


def patches(inside: str = "", conv: str = "strides = [2, 2]", dtype: str = "float") -> Any:
    text = f"""g ({dtype}[b,3,h,w] x) => ({dtype}[b,t,5] y, int64[1] n)
        <int64[3] shape = {{0, 5, -1}}> {{
        c = Conv<{conv}>(x, k, bias)
        r = Reshape(c, shape) y = Transpose<perm = [0, 2, 1]>(r)
        h1 = Shape<start = 2, end = 3>(c) w1 = Shape<start = 3>(c) n = Mul(h1, w1) {inside}
    }}"""
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    return typed(model(text, {"k": random(5, 3, 2, 2, dtype=kind), "bias": random(5, dtype=kind)}))


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_patches(dtype: str) -> None:
    before = patches(dtype=dtype)
    result = apply(before, RewritePatches(), LiftBias(), RemoveUnused())
    assert result.records[0].changed == result.records[1].changed == 1
    assert "Conv" not in ops(result.model)
    kind = np.float32 if dtype == "float" else np.float16
    for size in ((2, 3, 6, 4), (1, 3, 2, 10)):
        check_same(before, result.model, {"x": random(*size, dtype=kind)}, 1e-6 if dtype == "float" else 1e-3)


def test_patches_must_not_fire() -> None:
    for made in (
        patches(conv="strides = [1, 1]"),
        patches(conv="strides = [2, 2], pads = [0, 0, 1, 1]"),
        patches(conv="strides = [2, 2], dilations = [2, 2]"),
        patches(conv='strides = [2, 2], auto_pad = "SAME_UPPER"'),
        patches(inside="z = Relu(c)"),
        patches(inside="z = Shape<start = 1, end = 2>(c)"),
        patches(inside="z = Relu(r)"),
    ):
        assert apply(made, RewritePatches()).changed == 0
