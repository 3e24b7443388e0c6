"""fuse-skip-norm: residual sums and their norms, and what is taken apart image by image with many tokens."""

from typing import Any

import numpy as np
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fold_gates import FoldGates
from passes.targets.ort_cuda.fuse_adaptive_norm import FuseAdaptiveNorm
from passes.targets.ort_cuda.fuse_skip_norm import FuseSkipNorm
from tests.passes.graph_helpers import (
    apply,
    check_same,
    error,
    model,
    ops,
    refused,
    run_ort,
    typed,
)
from tests.passes.targets.ort_cuda.graphs import seeded

random, C, MANY = seeded(27), 8, 1 << 20


def small_block(batch: int | str, tokens: str = "s", also: str = "") -> str:
    """Two residual sums, the second of a gated product with a bias, and two adaptive norms of what that leaves."""
    b, extra = batch, ", float[b0,s0,8] z".replace("b0", str(batch)).replace("s0", tokens) if also else ""
    inputs = ", ".join(f"float[{b},1,8] {name}" for name in ("g1", "g2", "s1", "t1", "s2", "t2"))
    return f"""g (float[{b},{tokens},8] x, float[{b},{tokens},8] v, {inputs})
        => (float[{b},{tokens},8] y, float[{b},{tokens},8] w, float[{b},{tokens},8] k{extra}) <float[8] ones> {{
        d1 = Mul(g1, v) a1 = Add(x, d1)
        p = MatMul(v, m) q = Add(p, bias) d2 = Mul(g2, q)
        {also}
        a2 = Add(a1, d2)
        n1 = LayerNormalization<axis = -1, epsilon = 0.01>(a2, ones)
        o1 = Mul(n1, s1) y = Add(o1, t1)
        n2 = LayerNormalization<axis = -1, epsilon = 0.01>(a2, ones)
        o2 = Mul(n2, s2) w = Add(o2, t2)
        k = Neg(a2)
    }}"""


SMALL_STEPS = (FuseAdaptiveNorm(), RemoveUnused(), FuseSkipNorm(), RemoveUnused())


def small_feeds(batch: int) -> dict[str, Any]:
    feeds = {name: random(batch, 5, 8) for name in ("x", "v")}
    return feeds | {name: random(batch, 1, 8) for name in ("g1", "g2", "s1", "t1", "s2", "t2")}


@pytest.mark.parametrize("batch", [1, 3])
def test_skip_norm(batch: int) -> None:
    weights = {"ones": np.ones(8, np.float32), "bias": random(8), "m": random(8, 8)}
    before = typed(model(small_block(batch), weights))
    result = apply(before, *SMALL_STEPS)
    assert ops(result.model).count("SkipLayerNormalization") == 2 * batch  # each norm makes the sum anew
    assert ops(result.model).count("LayerNormalization") == 0
    feeds = small_feeds(batch)
    check_same(before, result.model, feeds, 1e-6, run_ort)
    for name in ("g1", "g2", "s1", "t1", "x"):  # every input arrives where it did
        assert (
            error(run_ort(result.model, feeds | {name: 1.1 * feeds[name]})[0], run_ort(before, feeds)[0])
            > 1e-4
        )
    assert apply(result.model, FuseSkipNorm()).changed == 0


_SHORT, _READ = "several images over the short axis 'text'", "the sum before it is read before the norm"
SMALL_WEIGHTS = {"ones": np.ones(8, np.float32), "bias": random(8), "m": random(8, 8)}


@pytest.mark.parametrize(
    ("graph", "reasons"),
    [
        (small_block("b"), {"the batch is not a number (see fix-size)"}),
        (
            small_block(2, "text"),
            {_SHORT, _READ},
        ),
        (
            small_block(1).replace("a2 = Add(a1, d2)", "a2 = Sub(a1, d2)"),
            {"its input is not a sum of two tensors (batch, tokens, channels)"},
        ),
        (
            small_block(1)
            .replace("a2 = Add(a1, d2)", "a2 = Add(a1, d2) e = Abs(a2)")
            .replace("Neg(a2)", "Neg(e)"),
            {_READ},
        ),
    ],
)
def test_must_not_fire(graph: str, reasons: set[str]) -> None:
    assert refused(typed(model(graph, SMALL_WEIGHTS)), *SMALL_STEPS[:3]) == reasons


def test_one_image_over_few_tokens() -> None:
    assert apply(typed(model(small_block(1, "text"), SMALL_WEIGHTS)), *SMALL_STEPS).records[2].changed == 2
    shared = apply(typed(model(small_block(1, also="z = Identity(q)"), SMALL_WEIGHTS)), *SMALL_STEPS)
    assert ops(shared.model).count("Add") == 2  # the biased product is an output: only the residual sum goes


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
