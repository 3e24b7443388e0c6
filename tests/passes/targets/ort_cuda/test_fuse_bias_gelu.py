"""fuse-bias-gelu: a Gelu takes in the bias before it."""

from typing import Any

import pytest

from passes.targets.ort_cuda.fuse_bias_gelu import FuseBiasGelu
from tests.passes.graph_helpers import (
    apply,
    check_same,
    model,
    refused,
    run_ort,
    run_reference,
)
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(14)


@pytest.mark.parametrize(("approximate", "op"), [("tanh", "FastGelu"), ("none", "BiasGelu")])
@pytest.mark.parametrize("order", ["x, w", "w, x"])
def test_bias_gelu(approximate: str, op: str, order: str) -> None:
    graph = f"""g (float[b,s,8] x) => (float[b,s,8] y) <float[8] w> {{
        t = Add({order}) y = Gelu<approximate = "{approximate}">(t) }}"""
    before = model(graph, {"w": random(8)})
    result = apply(before, FuseBiasGelu())
    assert [(n.op_type, n.domain) for n in result.model.graph.node] == [(op, "com.microsoft")]
    check_same(before, result.model, {"x": random(2, 3, 8)}, 1e-6, run_ort, run_reference)


@pytest.mark.parametrize(
    ("inputs", "outputs", "bias", "reason"),
    [
        ("", ", float[b,s,8] t", (8,), "something else reads the sum before it"),
        (", float[8] w", "", None, "what is added before it is not a constant bias [channels]"),
        ("", "", (1,), "what is added before it is not a constant bias [channels]"),
        ("", "", (1, 1, 8), "what is added before it is not a constant bias [channels]"),
    ],
)
def test_must_not_fire(inputs: str, outputs: str, bias: Any, reason: str) -> None:
    graph = f"g (float[b,s,8] x{inputs}) => (float[b,s,8] y{outputs}) {{ t = Add(x, w) y = Gelu(t) }}"
    made = model(graph, {} if bias is None else {"w": random(*bias)})
    assert refused(made, FuseBiasGelu()) == {reason}


def test_a_gelu_without_a_sum_is_no_refusal() -> None:
    assert (
        refused(model("g (float[b,8] x) => (float[b,8] y) { t = Neg(x) y = Gelu(t) }"), FuseBiasGelu())
        == set()
    )
