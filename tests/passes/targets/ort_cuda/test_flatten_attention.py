"""flatten-attention: no transposes around an attention."""

from typing import Any

import numpy as np
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.flatten_attention import FlattenAttention
from tests.passes.graph_helpers import (
    apply,
    check_same,
    error,
    model,
    ops,
    refused,
    run_ort,
)
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(15)


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


_BETWEEN = "between a Transpose and it stands more than norms and joins"


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            attention(perm="1, 2, 0, 3").replace("[b,u,", "[n,u,"),
            _BETWEEN,
        ),
        (attention(last=12), "its output is not flattened right away"),
        (
            attention().replace("(q, k, v)", "(q, k, v, mask)"),
            "it has a mask, a cache or more than one output",
        ),
        (
            attention().replace("an = RMSNormalization<axis = -1>(at, w)", "an = Neg(at)"),
            _BETWEEN,
        ),
    ],
)
def test_must_not_fire(graph: str, reason: str) -> None:
    weights = {"w": random(6)} | ({"mask": random(1, 1)} if "mask" in graph else {})
    assert refused(model(graph, weights), FlattenAttention()) == {reason}


def test_flat_inputs_are_left() -> None:
    flat = """g (float[b,s,24] q, float[b,s,24] k, float[b,s,24] v) => (float[b,s,24] y)
        { y = Attention<q_num_heads = 4, kv_num_heads = 4>(q, k, v) }"""
    assert refused(model(flat), FlattenAttention()) == {"it has no four axes"}


def test_a_causal_mask_keeps_the_operator() -> None:
    """MultiHeadAttention's mask is another."""
    causal = apply(
        model(attention(attrs="is_causal = 1"), {"w": random(6)}), FlattenAttention(multi_head=True)
    )
    assert ops(causal.model)[-1] == "Attention"
