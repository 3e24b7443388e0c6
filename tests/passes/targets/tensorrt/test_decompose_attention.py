from typing import Any

import ml_dtypes
import numpy as np
import pytest

from passes import PassError, Pipeline
from passes.targets.tensorrt.decompose_attention import DecomposeAttention
from tests.passes.graph_helpers import apply, check_same, error, model, ops, run_ort, run_reference

RNG = np.random.default_rng(6)
ALL = DecomposeAttention(dtypes=("float32", "float16", "bfloat16"))
NAMES = {
    np.dtype(np.float32): "float",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def four_d(
    attrs: str = "", mask: str = "", heads: int = 4, kv: int = 4, kind: str = "float", size: int = 8
) -> str:
    extra, name = (f", {mask} m", ", m") if mask else ("", "")
    return f"""g ({kind}[b,{heads},s,{size}] q, {kind}[b,{kv},t,{size}] k, {kind}[b,{kv},t,6] v{extra})
        => ({kind}[b,{heads},s,6] y) {{ y = Attention{attrs}(q, k, v{name}) }}"""


def feeds(
    b: int, s: int, t: int, heads: int = 4, kv: int = 4, dtype: Any = np.float32, size: int = 8
) -> dict[str, Any]:
    shapes = {"q": (b, heads, s, size), "k": (b, kv, t, size), "v": (b, kv, t, 6)}
    return {name: random(*shape, dtype=dtype) for name, shape in shapes.items()}


def check(graph: str, inputs: list[dict[str, Any]], tolerance: float = 1e-6, step: Any = ALL) -> Any:
    before = model(graph)
    result = apply(before, step)
    assert "Attention" not in ops(result.model)
    assert result.records[0].refusals == ()
    for values in inputs:
        check_same(before, result.model, values, tolerance, run_ort, run_reference)
    return result


@pytest.mark.parametrize("attrs", ["", "<scale = 0.3>", "<softcap = 1.5>", "<is_causal = 1>"])
def test_four_d(attrs: str) -> None:
    result = check(four_d(attrs), [feeds(1, 5, 5), feeds(2, 3, 7)])
    if not attrs:
        assert ops(result.model) == ["Transpose", "MatMul", "Mul", "Softmax", "MatMul"]


@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (6, 3), (4, 1)])
def test_fewer_key_heads(heads: int, kv: int) -> None:
    check(four_d("", heads=heads, kv=kv), [feeds(2, 3, 7, heads, kv), feeds(1, 5, 2, heads, kv)])


@pytest.mark.parametrize("shape", [(), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("causal", ["", "<is_causal = 1>"])
def test_float_mask(shape: tuple[int, ...], causal: str) -> None:
    dims = ",".join([*map(str, shape), "s", "t"])
    masks = [{"m": random(*shape, s, t)} for s, t in ((5, 5), (3, 7))]
    for mask in masks:
        mask["m"][..., 0, 1] = -np.inf
    check(four_d(causal, f"float[{dims}]"), [feeds(2, 5, 5) | masks[0], feeds(2, 3, 7) | masks[1]])


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("causal", ["", "<is_causal = 1>"])
def test_fully_masked_rows_are_zero(kind: str, causal: str) -> None:
    allowed = RNG.random((2, 1, 5, 7)) > 0.4
    allowed[:, :, 2] = False
    allowed[1, 0, 0, 0] = False  # with is_causal the only key of the first query
    mask = allowed if kind == "bool" else np.where(allowed, random(2, 1, 5, 7), np.float32(-np.inf))
    result = check(four_d(causal, f"{kind}[2,1,s,t]"), [feeds(2, 5, 7) | {"m": mask}])
    (y,) = run_ort(result.model, feeds(2, 5, 7) | {"m": mask})
    assert not np.any(y[:, :, 2])
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize("causal", ["", ", is_causal = 1"])
@pytest.mark.parametrize("kv", [4, 2])
def test_three_d(kv: int, causal: str) -> None:
    graph = f"""g (float[b,s,32] q, float[b,t,{8 * kv}] k, float[b,t,{6 * kv}] v, bool[s,t] m)
        => (float[b,s,24] y) {{ y = Attention<q_num_heads = 4, kv_num_heads = {kv}{causal}>(q, k, v, m) }}"""

    def values(b: int, s: int, t: int) -> dict[str, Any]:
        mask = RNG.random((s, t)) > 0.3
        return {"q": random(b, s, 32), "k": random(b, t, 8 * kv), "v": random(b, t, 6 * kv), "m": mask}

    check(graph, [values(1, 4, 4), values(2, 3, 9)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2)])
def test_sixteen_bits(dtype: Any, tolerance: float) -> None:
    kind = NAMES[np.dtype(dtype)]
    before = model(four_d("", f"{kind}[s,t]", kind=kind))
    result = apply(before, ALL)
    values = feeds(2, 5, 7, dtype=dtype) | {"m": random(5, 7, dtype=dtype)}
    check_same(before, result.model, values, tolerance, run_reference)


def test_float16_products_do_not_overflow() -> None:
    before = model(four_d("", kind="float16", size=64))
    values = feeds(1, 4, 4, dtype=np.float16, size=64)
    values["q"] = values["q"] * np.float16(100)
    values["k"] = values["k"] * np.float16(100)  # products near 1e5, scaled ones near 1e4
    (y,) = run_ort(apply(before, ALL).model, values)
    assert np.all(np.isfinite(y))
    assert error(y, run_reference(before, values)[0]) < 5e-3


def test_softmax_precision() -> None:
    result = check(
        four_d("<softmax_precision = 1>", kind="float16"),
        [feeds(2, 5, 7, dtype=np.float16)],
        2e-3,
        DecomposeAttention(),
    )
    assert ops(result.model).count("Cast") == 2


def test_present_outputs() -> None:
    before = model(
        """g (float16[b,s,32] q, float16[b,t,16] k, float16[b,t,16] v)
            => (float16[b,s,32] y, float16[b,2,t,8] pk, float16[b,2,t,8] pv) {
            y, pk, pv = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v) }"""
    )
    result = apply(before, DecomposeAttention())
    assert "Attention" not in ops(result.model)
    values = {n: random(2, 3, w, dtype=np.float16) for n, w in (("q", 32), ("k", 16), ("v", 16))}
    check_same(before, result.model, values, 2e-3, run_ort, run_reference)


def test_fires_only_where_the_target_has_no_kernel() -> None:
    half = model(four_d(kind="float16"))
    assert apply(half, DecomposeAttention()).changed == 0
    assert apply(half, DecomposeAttention(dtypes=("float16",))).changed == 1
    assert apply(half, DecomposeAttention(max_head_dim=7)).changed == 1
    assert apply(half, DecomposeAttention(max_head_dim=8)).changed == 0
    assert apply(model(four_d("<softcap = 2.0>", kind="float16")), DecomposeAttention()).changed == 1
    assert apply(model(four_d()), DecomposeAttention()).changed == 1


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            """g (float[b,4,s,8] q, float[b,4,t,8] k, float[b,4,p,8] pk, float[b,4,p,8] pv)
                => (float[b,4,s,8] y) { y = Attention(q, k, k, , pk, pv) }""",
            "cache",
        ),
        (
            """g (float[b,4,s,8] q, float[b,4,t,8] k) => (float[b,4,s,8] y, float[b,4,s,t] qk) {
                y, pk, pv, qk = Attention(q, k, k) }""",
            "qk_matmul_output",
        ),
        ("g (double[b,4,s,8] q) => (double[b,4,s,8] y) { y = Attention(q, q, q) }", "type of 'q'"),
        ("g (float[b,4,8,n] q) => (float[b,4,8,n] y) { y = Attention(q, q, q) }", "head size"),
        (
            "g (float[b,h,8,8] q, float[b,g,8,8] k) => (float[b,h,8,8] y) { y = Attention(q, k, k) }",
            "head counts",
        ),
        (four_d("", "float[s,5]").replace("t,8] k", "7,8] k").replace("t,6] v", "7,6] v"), "columns"),
    ],
)
def test_refuses(graph: str, reason: str) -> None:
    before = model(graph)
    result = apply(before, DecomposeAttention())
    assert result.changed == 0
    assert ops(result.model) == ops(before)
    (refusal,) = result.records[0].refusals
    assert reason in refusal.reason


def test_unknown_type_names_the_known_ones() -> None:
    with pytest.raises(PassError, match="float32, float16, bfloat16"):
        Pipeline.parse("decompose-attention{dtypes=half}").run(model(four_d()))
