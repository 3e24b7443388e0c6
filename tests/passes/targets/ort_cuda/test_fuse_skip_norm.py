"""Target ort-cuda image by image: fold-gates, what fuse-skip-norm takes apart with many tokens, keep-float32."""

from typing import Any

import numpy as np
import onnx
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fold_gates import FoldGates
from passes.targets.ort_cuda.fold_value_bias import FoldValueBias
from passes.targets.ort_cuda.fuse_adaptive_norm import FuseAdaptiveNorm
from passes.targets.ort_cuda.fuse_skip_norm import FuseSkipNorm
from passes.targets.ort_cuda.keep_float32 import KeepFloat32
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, error, model, ops, run_ort, run_reference, typed

RNG = np.random.default_rng(26)
C = 8
MANY = 1 << 20


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def gated(inside: str = "p = MatMul(x, m) q = Add(p, bias) y = Mul(g, q)", tokens: str = "s") -> str:
    return f"""g (float[b,{tokens},6] x, float[b,1,8] g) => (float[b,{tokens},8] y) <float[8] bias> {{
        {inside}
    }}"""


def gate_weights() -> dict[str, Any]:
    return {"m": random(6, C), "bias": random(C)}


@pytest.mark.parametrize(
    ("inside", "adds"),
    [
        ("p = MatMul(x, m) q = Add(p, bias) y = Mul(g, q)", 1),
        ("p = MatMul(x, m) q = Add(bias, p) y = Mul(q, g)", 1),
        ("p = MatMul(x, m) y = Mul(g, p)", 0),
    ],
)
def test_gates_go_into_weights(inside: str, adds: int) -> None:
    weights = gate_weights()
    before = typed(model(gated(inside), weights))
    result = apply(before, FoldGates(tokens=7))
    assert result.changed == 1
    assert sorted(ops(result.model)) == sorted(["Mul", "MatMul", *["Mul", "Add"] * adds])
    product = next(node for node in result.model.graph.node if node.op_type == "MatMul")
    assert product.input[0] == "x"  # no token is multiplied by a gate
    feeds = {"x": random(3, 9, 6), "g": random(3, 1, C)}
    check_same(before, result.model, feeds, 1e-6)
    for name in feeds:
        other = feeds | {name: np.roll(feeds[name], 1, axis=0)}
        assert error(run_ort(result.model, other)[0], run_ort(before, feeds)[0]) > 1e-2
    assert apply(result.model, FoldGates(tokens=7)).changed == 0


def test_gates_must_not_fire() -> None:
    plain = gated()
    for graph, tokens in (
        (plain, 0),  # not known
        (plain, 6),  # as many weights to multiply as tokens
        (gated(tokens="text"), 7),
        (gated("p = MatMul(x, m) q = Add(p, bias) t = Mul(g, q) y = Add(t, q)"), 7),  # read twice
        (gated("n = Neg(m) p = MatMul(x, n) q = Add(p, bias) y = Mul(g, q)"), 7),  # weights that are computed
        (gated("p = MatMul(x, m) q = Add(p, g) y = Mul(q, bias)"), 7),  # a constant gate
        (gated("p = MatMul(x, m) q = Add(p, bias) h = Neg(x) h8 = MatMul(h, m) y = Mul(h8, q)"), 7),
    ):
        result = apply(typed(model(graph, gate_weights())), FoldGates(tokens=tokens))
        wanted = int(
            "h8" in graph
        )  # of that, the plain product may take the other as a gate only if it were one
        assert result.changed == 0, (graph, wanted)


def block(batch: int | str, feed: str = "u = Gelu(e)") -> str:
    """Two attentions' projections, gated and added; two norms; a feed-forward behind one; the next block's norm."""
    b = batch
    gates = ", ".join(f"float[{b},1,8] {n}" for n in ("g1", "g2", "g3", "s1", "t1", "s2", "t2", "s3", "t3"))
    return f"""g (float[{b},s,8] x0, float[{b},s,8] xr, float[{b},j,8] o1, float[{b},s,8] o2, int64[1] n, {gates})
        => (float[{b},s,8] y, float[{b},s,8] w, float[{b},s,8] k)
        <float[8] ones, int64[1] zero = {{0}}, int64[1] one = {{1}}, float[{b},s,8] i1,
         float[8] b1, float[8] b2, float[16] b3, float[8] b4> {{
        x = Add(x0, xr) nx = LayerNormalization<axis = -1>(x, ones) mx = Mul(nx, s3) ax = Add(mx, t3)
        i1 = Slice(o1, zero, n, one, one)
        p1 = MatMul(i1, m1) q1 = Add(p1, b1) d1 = Mul(g1, q1) a1 = Add(x, d1)
        o2x = Add(o2, ax)
        p2 = MatMul(o2x, m2) q2 = Add(p2, b2) d2 = Mul(g2, q2) a2 = Add(a1, d2)
        n1 = LayerNormalization<axis = -1, epsilon = 0.01>(a2, ones) c1 = Mul(n1, s1) f0 = Add(c1, t1)
        n2 = LayerNormalization<axis = -1, epsilon = 0.01>(a2, ones) c2 = Mul(n2, s2) w = Add(c2, t2)
        h = MatMul(f0, m3) e = Add(h, b3) {feed} r = MatMul(u, m4) rb = Add(r, b4) d3 = Mul(g3, rb)
        k = Add(a2, d3)
        n3 = LayerNormalization<axis = -1>(k, ones) c3 = Mul(n3, s3) y = Add(c3, t3)
    }}"""


def block_weights() -> dict[str, Any]:
    shapes = {
        "m1": (C, C),
        "m2": (C, C),
        "m3": (C, 16),
        "m4": (16, C),
        "b1": (C,),
        "b2": (C,),
        "b3": (16,),
        "b4": (C,),
    }
    return {name: random(*shape) for name, shape in shapes.items()} | {"ones": np.ones(C, np.float32)}


def block_feeds(batch: int) -> dict[str, Any]:
    feeds = {name: random(batch, 5, C) for name in ("x0", "xr", "o2")} | {"o1": random(batch, 7, C)}
    names = ("g1", "g2", "g3", "s1", "t1", "s2", "t2", "s3", "t3")
    return feeds | {"n": np.array([5])} | {name: random(batch, 1, C) for name in names}


def steps(tokens: int) -> tuple[Any, ...]:
    fused = FuseAdaptiveNorm(), RemoveUnused(), FoldGates(tokens=tokens), FuseSkipNorm(tokens=tokens)
    return (*fused, RemoveUnused())


@pytest.mark.parametrize("tokens", [0, MANY])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_of_two_attentions(batch: int, tokens: int) -> None:
    before = typed(model(block(batch), block_weights()))
    result = apply(before, *steps(tokens))
    found = ops(result.model)
    # The sum of x, the two norms of a2; that of k stays, for k is an output.
    assert found.count("SkipLayerNormalization") == 3 * batch
    assert found.count("LayerNormalization") == 1
    apart = batch > 1 and tokens
    products = [node for node in result.model.graph.node if node.op_type == "MatMul"]
    assert len(products) == (2 * (batch - 1) + 4 if apart else 4)
    feeds = block_feeds(batch)
    check_same(before, result.model, feeds, 2e-6)
    want = run_ort(before, feeds)
    for name in feeds.keys() - {"n"}:  # every input arrives where it did, image by image
        moved = feeds | {name: 1.1 * feeds[name]}
        for got, expected, other in zip(
            run_ort(result.model, moved), run_ort(before, moved), want, strict=True
        ):
            assert error(got, expected) < 2e-6
            assert error(got, other) > 1e-4 or error(expected, other) == 0


def test_two_gated_biases_are_one_vector() -> None:
    """No sum over all tokens has a gated bias any more."""
    before = typed(model(block(2), block_weights()))
    made = apply(before, *steps(MANY)).model
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in typed(made).graph.value_info
    }
    wide = [n for n in made.graph.node if n.op_type == "Add" and len(shapes.get(n.output[0], [1, 1, 1])) == 3]
    biases = {"b1", "b2", "b4"}
    assert not any(biases & set(node.input) for node in wide if node.output[0] != "rb")
    vectors = [n for n in made.graph.node if n.op_type == "Mul" and {"b1", "b2"} & set(n.input)]
    assert len(vectors) == 4  # two biases, two images


def test_what_is_read_elsewhere_stays_whole() -> None:
    """A feed-forward of an operator that works on whole batches only is not taken apart."""
    strange = block(2, feed="u = Softmax<axis = 0>(e)")
    before = typed(model(strange, block_weights()))
    result = apply(before, *steps(MANY))
    check_same(before, result.model, block_feeds(2), 2e-6)
    assert ops(result.model).count("Softmax") == 1


def biased(kind: str) -> Any:
    """An attention whose values have a bias, and a projection behind."""
    graph = f"""g ({kind}[b,s,6] x, {kind}[b,s,8] q, {kind}[b,s,8] k) => ({kind}[b,s,5] y) {{
        pv = MatMul(x, mv) v = Add(pv, bv)
        o = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)
        yo = MatMul(o, mo) y = Add(yo, bo)
    }}"""
    dtype = np.float16 if kind == "float16" else np.float32
    shapes = {"mv": (6, 8), "bv": (8,), "mo": (8, 5), "bo": (5,)}
    made = model(graph, {name: random(*shape, dtype=dtype) for name, shape in shapes.items()})
    made.opset_import.add(domain="com.microsoft", version=1)
    code = onnx.TensorProto.FLOAT16 if kind == "float16" else onnx.TensorProto.FLOAT
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("o", code, ["b", "s", 8]))
    return typed(made)


def test_digits_of_a_moved_bias() -> None:
    before = biased("float16")
    rounded = apply(before, FoldValueBias()).model
    result = apply(before, FoldValueBias(), KeepFloat32())
    (kept,) = [t for t in result.model.graph.initializer if t.name.endswith("/float32")]
    assert kept.data_type == onnx.TensorProto.FLOAT
    (cast,) = [n for n in result.model.graph.node if n.op_type == "Cast"]
    assert cast.input[0] == kept.name
    feeds = {n: random(2, 4, c, dtype=np.float16) for n, c in (("x", 6), ("q", 8), ("k", 8))}
    check_same(before, result.model, feeds, 3e-3, run_ort)
    arrays = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in before.graph.initializer}
    wanted = arrays["bo"] + arrays["bv"] @ arrays["mo"]
    recipe = Recipe.of_tensor(kept)
    assert recipe is not None
    (old,) = [t for t in rounded.graph.initializer if t.name.endswith("/with_values")]
    assert np.array_equal(
        evaluate(recipe).astype(np.float16), evaluate(Recipe.of_tensor(old))
    )  # the same bits
    assert np.abs(evaluate(recipe) - wanted).max() < 1e-6
    assert np.abs(wanted.astype(np.float16) - wanted).max() > 1e-5  # which the rounded one could not
    assert apply(result.model, KeepFloat32()).changed == 0
    assert apply(apply(biased("float"), FoldValueBias()).model, KeepFloat32()).changed == 0


def test_digits_of_joined_vectors() -> None:
    """Joined and reshaped, as merge-projections and lift-bias leave them; a plain matrix stays as it is."""
    start = Recipe.of_array(random(8, 1))
    moved = start.subtract_product(Recipe.of_array(random(8, 3)), Recipe.of_array(random(3, 1))).reshape((8,))
    half = int(onnx.TensorProto.FLOAT16)
    plain = Recipe.of_array(random(4, dtype=np.float16))
    joined = plain.append([moved.cast(half)]).reshape((1, 1, 12))
    matrix = start.subtract_product(Recipe.of_array(random(8, 3)), Recipe.of_array(random(3, 1))).cast(half)
    weights = {
        "v": joined,
        "alone": moved.cast(half),
        "w": matrix.append([matrix]).reshape((4, 4)),
        "p": plain,
    }
    before = model(
        """g (float16[b,s,12] x, float16[b,s,8] z, float16[b,s,4] u)
        => (float16[b,s,12] y, float16[b,s,8] a, float16[b,s,4] t) {
        y = Add(x, v) a = Add(z, alone) l = MatMul(u, w) t = Add(l, p)
    }""",
        weights,
    )
    result = apply(before, KeepFloat32())
    assert result.changed == 2
    feeds = {n: random(2, 3, c, dtype=np.float16) for n, c in (("x", 12), ("z", 8), ("u", 4))}
    check_same(before, result.model, feeds, 0.0, run_reference)
