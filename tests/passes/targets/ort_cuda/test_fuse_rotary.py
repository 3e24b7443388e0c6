"""More passes of target ort-cuda: fix-size, fold-value-bias, fuse-rotary, fuse-skip-norm, join-slices."""

from typing import Any

import numpy as np
import onnx
import pytest

from passes import PassError
from passes.canonical.fix_size import FixSize
from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fold_value_bias import FoldValueBias
from passes.targets.ort_cuda.fuse_adaptive_norm import FuseAdaptiveNorm
from passes.targets.ort_cuda.fuse_rotary import FuseRotary
from passes.targets.ort_cuda.fuse_skip_norm import FuseSkipNorm
from passes.targets.ort_cuda.join_slices import JoinSlices
from tests.passes.graph_helpers import apply, check_same, error, model, ops, run_ort, typed

RNG = np.random.default_rng(12)


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def test_fixed_size() -> None:
    before = model("g (float[batch,s,4] x) => (float[batch,s,4] y) { r = Relu(x) y = Neg(r) }")
    assert apply(before, FixSize()).changed == 0
    fixed = apply(before, FixSize("batch", 2)).model
    for value in (*fixed.graph.input, *fixed.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert (dims[0].dim_value, dims[1].dim_param) == (2, "s")
    check_same(before, fixed, {"x": random(2, 3, 4)})
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        run_ort(fixed, {"x": random(3, 3, 4)})
    with pytest.raises(PassError, match="1 or more"):
        apply(before, FixSize("batch", -1))


def values(also: str = "", second: str = "o") -> str:
    """Joint attention of two heads: image and text have projections of their own, before and behind."""
    extra = ", float[b,u,8] z" if also else ""
    return f"""g (float[b,image,6] x, float[b,text,6] c, float[b,u,8] q, float[b,u,8] k)
        => (float[b,image,5] y, float[b,text,5] w{extra})
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] n = {{4}}, int64[1] end = {{9223372036854775807}},
         int64[4] heads = {{0, 0, 2, 4}}, int64[3] flat = {{0, 0, 8}}, float[8] bv, float[8] bt, float[5] bo> {{
        pv = MatMul(x, mv) sv = Add(pv, bv) rv = Reshape(sv, heads)
        pt = MatMul(c, mt) st = Add(bt, pt) rt = Reshape(st, heads)
        both = Concat<axis = 1>(rv, rt) v = Reshape(both, flat)
        o = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)
        oi = Slice(o, zero, n, one) oc = Slice({second}, n, end, one)
        yo = MatMul(oi, mo) y = Add(yo, bo)
        wo = MatMul(oc, mp) w = Add(wo, bt5)
        {also}
    }}"""


def value_weights() -> dict[str, Any]:
    shapes = {
        "mv": (6, 8),
        "mt": (6, 8),
        "mo": (8, 5),
        "mp": (8, 5),
        "bv": (8,),
        "bt": (8,),
        "bo": (5,),
        "bt5": (5,),
    }
    return {name: random(*shape) for name, shape in shapes.items()}


def microsoft(text: str, weights: dict[str, Any]) -> Any:
    made = model(text, weights)
    made.opset_import.add(domain="com.microsoft", version=1)
    for name, axis in (
        ("o", "u"),
        ("oi", "image"),
        ("oc", "text"),
    ):  # ONNX knows no shapes behind this domain
        shape = ["b", axis, 8]
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return typed(made)


def test_value_bias() -> None:
    weights = value_weights()
    before = microsoft(values(), weights)
    result = apply(before, FoldValueBias())
    assert ops(before).count("Add") == 4
    assert ops(result.model).count("Add") == 3  # text keeps the difference
    feeds = {"x": random(2, 4, 6), "c": random(2, 3, 6), "q": random(2, 7, 8), "k": random(2, 7, 8)}
    check_same(before, result.model, feeds, 1e-6, run_ort)
    other = microsoft(values(), weights | {"bv": weights["bv"] + 0.1})
    assert error(run_ort(other, feeds)[0], run_ort(result.model, feeds)[0]) > 1e-3
    assert apply(result.model, FoldValueBias()).changed == 0


def test_value_bias_must_not_fire() -> None:
    kept = values("z = Identity(o)")
    assert apply(microsoft(kept, value_weights()), FoldValueBias()).changed == 0
    computed = values().replace("mo) y", "mo) y").replace("MatMul(oi, mo)", "MatMul(oi, t)")
    computed = computed.replace("yo = ", "t = Neg(mo) yo = ")
    assert apply(microsoft(computed, value_weights()), FoldValueBias()).changed == 0


def rotary(kind: str = "float", double: str = "Expand(cu, two)", first: str = "Neg(odd)") -> str:
    """Rotary embedding as diffusers has it for FLUX, its tables made in the graph."""
    code = "1" if kind == "float" else "10"
    return f"""g ({kind}[b,s,3,8] x, float[s,4] a) => ({kind}[b,s,3,8] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] i2 = {{2}}, int64[1] last = {{-1}},
         int64[1] four = {{4}}, int64[3] two = {{1, 1, 2}}, int64[2] flat = {{-1, 8}}, int64[2] lead = {{0, 2}},
         int64[5] pairs = {{0, 0, 3, 4, 2}}, int64[4] whole = {{0, 0, 3, 8}}> {{
        c = Cos(a) cu = Unsqueeze(c, last) ce = {double} cr = Reshape(ce, flat)
        d = Sin(a) du = Unsqueeze(d, last) de = Expand(du, two) dr = Reshape(de, flat)
        ct = Unsqueeze(cr, lead) dt = Unsqueeze(dr, lead)
        p = Reshape(x, pairs)
        e1 = Slice(p, zero, one, four) even = Squeeze(e1, four)
        o1 = Slice(p, one, i2, four) odd = Squeeze(o1, four)
        n = {first} nu = Unsqueeze(n, last) eu = Unsqueeze(even, last)
        j = Concat<axis = -1>(nu, eu) t = Reshape(j, whole)
        xw = Cast<to = 1>(x) tw = Cast<to = 1>(t)
        l = Mul(xw, ct) r = Mul(tw, dt) sum = Add(l, r)
        y = Cast<to = {code}>(sum)
    }}"""


@pytest.mark.parametrize(("kind", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_rotary(kind: str, dtype: Any) -> None:
    before = typed(model(rotary(kind)))
    result = apply(before, FuseRotary(), RemoveUnused())
    assert ops(result.model).count("RotaryEmbedding") == 1
    assert not {"Neg", "Concat", "Mul", "Squeeze"} & set(ops(result.model))
    feeds = {"x": random(2, 5, 3, 8, dtype=dtype), "a": 3 * random(5, 4)}
    check_same(before, result.model, feeds, 1e-6 if kind == "float" else 1e-3, run_ort)
    turned = feeds | {"a": -feeds["a"]}
    assert error(run_ort(result.model, turned)[0], run_ort(before, feeds)[0]) > 0.1


def test_rotary_must_not_fire() -> None:
    for graph in (rotary(double="Concat<axis = -1>(cu, du0)"), rotary(first="Identity(odd)")):
        graph = graph.replace("cu = Unsqueeze(c, last)", "cu = Unsqueeze(c, last) du0 = Neg(cu)")
        assert apply(typed(model(graph)), FuseRotary()).changed == 0


def block(batch: int | str, tokens: str = "s", also: str = "") -> str:
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


STEPS = (FuseAdaptiveNorm(), RemoveUnused(), FuseSkipNorm(), RemoveUnused())


def block_feeds(batch: int) -> dict[str, Any]:
    feeds = {name: random(batch, 5, 8) for name in ("x", "v")}
    return feeds | {name: random(batch, 1, 8) for name in ("g1", "g2", "s1", "t1", "s2", "t2")}


@pytest.mark.parametrize("batch", [1, 3])
def test_skip_norm(batch: int) -> None:
    weights = {"ones": np.ones(8, np.float32), "bias": random(8), "m": random(8, 8)}
    before = typed(model(block(batch), weights))
    result = apply(before, *STEPS)
    assert ops(result.model).count("SkipLayerNormalization") == 2 * batch  # each norm makes the sum anew
    assert ops(result.model).count("LayerNormalization") == 0
    feeds = block_feeds(batch)
    check_same(before, result.model, feeds, 1e-6, run_ort)
    for name in ("g1", "g2", "s1", "t1", "x"):  # every input arrives where it did
        assert (
            error(run_ort(result.model, feeds | {name: 1.1 * feeds[name]})[0], run_ort(before, feeds)[0])
            > 1e-4
        )
    assert apply(result.model, FuseSkipNorm()).changed == 0


def test_skip_norm_must_not_fire() -> None:
    weights = {"ones": np.ones(8, np.float32), "bias": random(8), "m": random(8, 8)}
    for graph in (block("b"), block(2, "text")):
        assert apply(typed(model(graph, weights)), *STEPS).records[2].changed == 0
    assert apply(typed(model(block(1, "text"), weights)), *STEPS).records[2].changed == 2
    shared = apply(typed(model(block(1, also="z = Identity(q)"), weights)), *STEPS)
    assert ops(shared.model).count("Add") == 2  # the biased product is an output: only the residual sum goes


def joined(start: str = "n", offset: str = "zero", axis: int = 1) -> str:
    return f"""g (float[b,s,4] x, float[b,t,3] c) => (float[b,u,4] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] end = {{9223372036854775807}}> {{
        n = Shape<start = 1, end = 2>(c) m = Neg(n) m2 = Mul(n, n)
        f = Slice(x, {offset}, n, one) r = Slice(x, {start}, end, one)
        j = Concat<axis = {axis}>(f, r) y = Relu(j)
    }}"""


def test_joined_slices() -> None:
    before = model(joined())
    result = apply(before, JoinSlices(), RemoveUnused())
    assert ops(result.model) == ["Relu"]
    check_same(before, result.model, {"x": random(2, 5, 4), "c": random(2, 3, 3)})


def test_joined_slices_must_not_fire() -> None:
    for graph in (joined(start="m2"), joined(offset="one"), joined(start="m"), joined(axis=0)):
        assert apply(model(graph), JoinSlices()).changed == 0
