"""The passes of target ort-cuda: fuse-rms-norm, fuse-adaptive-norm, fuse-bias-gelu, flatten-attention, lift-bias."""

from typing import Any

import numpy as np
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.flatten_attention import FlattenAttention
from passes.targets.ort_cuda.fuse_adaptive_norm import FuseAdaptiveNorm
from passes.targets.ort_cuda.fuse_bias_gelu import FuseBiasGelu
from passes.targets.ort_cuda.fuse_rms_norm import FuseRmsNorm
from passes.targets.ort_cuda.lift_bias import LiftBias
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, error, model, ops, run_ort, run_reference

RNG = np.random.default_rng(11)


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def rms_norm(kind: str = "float", axis: int = -1, exponent: float = 2.0, also: str = "") -> str:
    code, extra = ("1" if kind == "float" else "10"), (f", {kind}[b,s,8] z" if also else "")
    return f"""g ({kind}[b,s,8] x) => ({kind}[b,s,8] y{extra})
        <float two = {{{exponent}}}, float eps = {{0.001}}, int64[1] last = {{{axis}}}, {kind}[8] w> {{
        wide = Cast<to = 1>(x)
        power = Pow(wide, two)
        mean = ReduceMean(power, last)
        total = Add(mean, eps)
        root = Sqrt(total)
        inverse = Reciprocal(root)
        again = Cast<to = 1>(x)
        product = Mul(again, inverse)
        back = Cast<to = {code}>(product)
        y = Mul(back, w)
        {also}
    }}"""


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"), [("float", np.float32, 1e-6), ("float16", np.float16, 1e-3)]
)
def test_rms_norm(kind: str, dtype: Any, bound: float) -> None:
    before = model(rms_norm(kind), {"w": random(8, dtype=dtype)})
    result = apply(before, FuseRmsNorm(), RemoveUnused())
    assert ops(result.model) == ["RMSNormalization"]
    x = {"x": 3 * random(2, 5, 8, dtype=dtype)}
    check_same(before, result.model, x, bound, run_ort)
    (got,) = run_ort(result.model, x)
    assert error(got, run_ort(before, {"x": 2 * x["x"]})[0]) > 1e-5  # eps matters: the comparison can fail


def test_rms_norm_must_not_fire() -> None:
    weight = {"w": random(8)}
    for graph in (rms_norm(axis=1), rms_norm(exponent=3.0), rms_norm(also="z = Identity(back)")):
        assert apply(model(graph, weight), FuseRmsNorm()).changed == 0
    assert apply(model(rms_norm(), weight, opset=22), FuseRmsNorm()).changed == 0


def adaptive(shape: str = "b,1,16", gamma: str = "ones", kind: str = "float", also: str = "") -> str:
    extra = f", {kind}[b,s,16] z" if also else ""
    return f"""g ({kind}[b,s,16] x, {kind}[{shape}] scale, {kind}[{shape}] shift) => ({kind}[b,s,16] y{extra})
        <{kind}[16] {gamma}> {{
        n = LayerNormalization<axis = -1, epsilon = 0.01>(x, {gamma})
        p = Mul(n, scale)
        y = Add(shift, p)
        {also}
    }}"""


@pytest.mark.parametrize("also", ["", "q = Mul(scale, n) z = Add(q, scale)"])
@pytest.mark.parametrize(
    ("kind", "dtype", "bound"), [("float", np.float32, 1e-6), ("float16", np.float16, 2e-3)]
)
def test_adaptive_norm(kind: str, dtype: Any, bound: float, also: str) -> None:
    before = model(adaptive(kind=kind, also=also), {"ones": np.ones(16, dtype)})
    result = apply(before, FuseAdaptiveNorm(), RemoveUnused())
    assert ops(result.model) == ["LayerNormalization"] * (2 if also else 1)
    for batch, tokens in ((3, 5), (1, 7), (2, 2)):
        feeds = {"x": random(batch, tokens, 16, dtype=dtype)}
        feeds |= {name: random(batch, 1, 16, dtype=dtype) for name in ("scale", "shift")}
        check_same(before, result.model, feeds, bound, run_ort)
        swapped = feeds | {"scale": feeds["shift"], "shift": feeds["scale"]}
        assert error(run_ort(result.model, swapped)[0], run_ort(before, feeds)[0]) > 0.1


def test_adaptive_norm_must_not_fire() -> None:
    ones, others = {"ones": np.ones(16, np.float32)}, {"w": random(16)}
    for graph, values in (
        (adaptive("b,s,16"), ones),
        (adaptive("1,1,16"), ones),
        (adaptive(gamma="w"), others),
        (adaptive(also="z = Identity(p)"), ones),
    ):
        assert apply(model(graph, values), FuseAdaptiveNorm()).changed == 0


@pytest.mark.parametrize(("approximate", "op"), [("tanh", "FastGelu"), ("none", "BiasGelu")])
@pytest.mark.parametrize("order", ["x, w", "w, x"])
def test_bias_gelu(approximate: str, op: str, order: str) -> None:
    graph = f"""g (float[b,s,8] x) => (float[b,s,8] y) <float[8] w> {{
        t = Add({order}) y = Gelu<approximate = "{approximate}">(t) }}"""
    before = model(graph, {"w": random(8)})
    result = apply(before, FuseBiasGelu())
    assert [(n.op_type, n.domain) for n in result.model.graph.node] == [(op, "com.microsoft")]
    check_same(before, result.model, {"x": random(2, 3, 8)}, 1e-6, run_ort, run_reference)


def test_bias_gelu_must_not_fire() -> None:
    kept = """g (float[b,s,8] x) => (float[b,s,8] y, float[b,s,8] t) <float[8] w> { t = Add(x, w) y = Gelu(t) }"""
    computed = """g (float[b,s,8] x, float[8] w) => (float[b,s,8] y) { t = Add(x, w) y = Gelu(t) }"""
    assert apply(model(kept, {"w": random(8)}), FuseBiasGelu()).changed == 0
    assert apply(model(computed), FuseBiasGelu()).changed == 0


def attention(
    kind: str = "float", perm: str = "0, 2, 1, 3", last: int = 24, attrs: str = "scale = 0.3"
) -> str:
    """Joint attention as SD3 has it: text after the image, queries and keys normed."""
    return f"""g ({kind}[b,s,4,6] a, {kind}[b,t,4,6] c, {kind}[b,s,4,6] v1, {kind}[b,t,4,6] v2)
        => ({kind}[b,u,{last}] y)
        <{kind}[6] w, int64[3] flat = {{0, 0, {last}}}> {{
        at = Transpose<perm = [{perm}]>(a)
        ct = Transpose<perm = [{perm}]>(c)
        an = RMSNormalization<axis = -1>(at, w)
        q = Concat<axis = 2>(an, ct)
        k = Concat<axis = -2>(at, ct)
        v1t = Transpose<perm = [{perm}]>(v1)
        v2t = Transpose<perm = [{perm}]>(v2)
        v = Concat<axis = 2>(v1t, v2t)
        o = Attention<{attrs}>(q, k, v)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        y = Reshape(ot, flat)
    }}"""


def attention_feeds(dtype: Any = np.float32) -> dict[str, Any]:
    shapes = {"a": (2, 5, 4, 6), "c": (2, 3, 4, 6), "v1": (2, 5, 4, 6), "v2": (2, 3, 4, 6)}
    return {name: random(*shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("multi_head", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype", "bound"), [("float", np.float32, 1e-6), ("float16", np.float16, 2e-3)]
)
def test_attention(multi_head: bool, kind: str, dtype: Any, bound: float) -> None:
    before = model(attention(kind), {"w": random(6, dtype=dtype)})
    result = apply(before, FlattenAttention(multi_head=multi_head), RemoveUnused())
    last = ops(result.model)[-1]
    assert last == ("MultiHeadAttention" if multi_head else "Attention")
    assert "Transpose" not in ops(result.model)
    wide, feeds = model(attention(), {"w": np.ones(6, np.float32)}), attention_feeds(dtype)
    if kind == "float" or not multi_head:
        check_same(before, result.model, feeds, bound, run_ort)
    changed = apply(wide, FlattenAttention(multi_head=multi_head)).model
    other = attention_feeds()
    assert error(run_ort(changed, other)[0], run_ort(wide, other | {"c": other["v2"]})[0]) > 0.01


def test_attention_must_not_fire() -> None:
    weight = {"w": random(6)}
    result = apply(model(attention(perm="1, 2, 0, 3").replace("[b,u,", "[n,u,"), weight), FlattenAttention())
    assert result.changed == 0
    assert result.records[0].refusals
    split = apply(model(attention(last=12), weight), FlattenAttention())
    assert split.changed == 0
    causal = apply(model(attention(attrs="is_causal = 1"), weight), FlattenAttention(multi_head=True))
    assert ops(causal.model)[-1] == "Attention"  # MultiHeadAttention's mask is another


def test_bias_of_a_product_of_tokens() -> None:
    graph = """g (float[b,s,4] x, float[b,4] z) => (float[b,s,6] y, float[b,6] u)
        { p = MatMul(x, m) y = Add(p, w) r = MatMul(z, m) u = Add(r, w2) }"""
    weights = {name: Recipe.of_array(random(6)) for name in ("w", "w2")}
    before = model(graph, {**weights, "m": random(4, 6)})
    result = apply(before, LiftBias())
    shapes = {tensor.name: tuple(tensor.dims) for tensor in result.model.graph.initializer}
    assert shapes["w"] == (1, 1, 6)
    assert shapes["w2"] == (6,)
    check_same(before, result.model, {"x": random(2, 3, 4), "z": random(2, 4)})
    shared = model(graph.replace("w2", "w"), {"w": weights["w"], "m": random(4, 6)})
    assert apply(shared, LiftBias()).changed == 0
