"""fold-value-bias: which biases of values move into the output projection."""

from typing import Any

import pytest

from passes.targets.ort_cuda.fold_value_bias import FoldValueBias
from tests.passes.graph_helpers import (
    apply,
    check_same,
    error,
    ops,
    refused,
    run_ort,
)
from tests.passes.targets.ort_cuda.graphs import biased_values, microsoft, seeded

random = seeded(12)


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


def with_shapes(text: str, weights: dict[str, Any]) -> Any:
    shapes = {name: ["b", axis, 8] for name, axis in (("o", "u"), ("oi", "image"), ("oc", "text"))}
    return microsoft(text, weights, shapes)


def test_value_bias() -> None:
    weights = value_weights()
    before = with_shapes(values(), weights)
    result = apply(before, FoldValueBias())
    assert ops(before).count("Add") == 4
    assert ops(result.model).count("Add") == 3  # text keeps the difference
    feeds = {"x": random(2, 4, 6), "c": random(2, 3, 6), "q": random(2, 7, 8), "k": random(2, 7, 8)}
    check_same(before, result.model, feeds, 1e-6, run_ort)
    other = with_shapes(values(), weights | {"bv": weights["bv"] + 0.1})
    assert error(run_ort(other, feeds)[0], run_ort(result.model, feeds)[0]) > 1e-3
    assert apply(result.model, FoldValueBias()).changed == 0


_READERS = "something else reads its output than projections with a constant bias [channels]"
_SOURCES = "its values are not sums of products and constant biases [channels]"


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (values("z = Identity(o)"), _READERS),
        (values().replace("MatMul(oi, mo)", "MatMul(oi, t)").replace("yo = ", "t = Neg(mo) yo = "), _READERS),
        (values().replace("sv = Add(pv, bv)", "sv = Sub(pv, bv)"), _SOURCES),
    ],
)
def test_must_not_fire(graph: str, reason: str) -> None:
    assert refused(with_shapes(graph, value_weights()), FoldValueBias()) == {reason}


def test_a_bias_of_one_element_is_no_bias_of_all_channels() -> None:
    """It broadcasts: its one number belongs to every channel, and no vector of them can be made in its place."""
    assert refused(biased_values("float", random, after=1), FoldValueBias()) == {_READERS}
    assert refused(biased_values("float", random, bias=1), FoldValueBias()) == {_SOURCES}
    assert apply(biased_values("float", random), FoldValueBias()).changed == 1
