"""fold-gates: which gates go into weights."""

from typing import Any

import numpy as np
import pytest

from passes.targets.ort_cuda.fold_gates import FoldGates
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

random, C = seeded(26), 8


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


_ROWS = "the weights have 6 rows, and an image has {} tokens"
_FORM = "the gate is not (batch, 1, channels) in the type of the weights"


@pytest.mark.parametrize(
    ("graph", "tokens", "reason"),
    [
        (gated(), 0, _ROWS.format("unknown")),
        (gated(), 6, _ROWS.format(6)),  # as many weights to multiply as tokens
        (gated(tokens="text"), 7, "the projection is over the short axis 'text'"),
        (gated("p = MatMul(x, m) q = Add(p, bias) t = Mul(g, q) y = Add(t, q)"), 7, None),  # read twice
        (
            gated("n = Neg(m) p = MatMul(x, n) q = Add(p, bias) y = Mul(g, q)"),
            7,
            None,
        ),  # weights that are computed
        (gated("p = MatMul(x, m) q = Add(p, g) y = Mul(q, bias)"), 7, None),  # a constant gate
        (gated("p = MatMul(x, m) q = Add(p, bias) h = Neg(x) r = MatMul(h, m) y = Mul(r, q)"), 7, _FORM),
    ],
)
def test_must_not_fire(graph: str, tokens: int, reason: str | None) -> None:
    made = typed(model(graph, gate_weights()))
    assert refused(made, FoldGates(tokens=tokens)) == ({reason} if reason else set())


def test_a_bias_of_one_element_stays() -> None:
    made = typed(
        model(gated().replace("float[8] bias", "float[1] bias"), gate_weights() | {"bias": random(1)})
    )
    assert refused(made, FoldGates(tokens=7)) == set()
