"""Patterns over random orders of operands, with captures, sole readers and nodes that may be missing."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from passes.graph.match import View
from passes.graph.pattern import Made
from tests.passes.graph_helpers import graph_of, made_by, pick

GATED = Made("Mul", "gate", Made("Add", "value", Made("Neg", "x"), name="sum", sole=True))


def names(pattern: Made, graph: gs.Graph, output: str = "y") -> list[dict[str, str]]:
    found = pattern.matches(made_by(graph, output), View(graph))
    return [{key: tensor.name for key, tensor in match.tensors.items()} for match in found]


@pytest.mark.parametrize("seed", range(40))
def test_orders_and_readers(seed: int) -> None:
    """Whatever the order of the operands, the same tensors are captured; a second reader of the sum is one too many."""
    rng = np.random.default_rng(seed)
    inner, outer = pick(rng, "v, n", "n, v"), pick(rng, "g, s", "s, g")
    op, extra, kept = (
        pick(rng, "Neg", "Neg", "Abs"),
        pick(rng, "", "", "z = Abs(s)"),
        pick(rng, False, False, True),
    )
    outputs = "float[4] y" + ", float[4] z" * bool(extra) + ", float[4] s" * kept
    body = f"n = {op}(x) s = Add({inner}) y = Mul({outer}) {extra}"
    graph = graph_of(f"g (float[4] x, float[4] v, float[4] g) => ({outputs}) {{ {body} }}")
    found = list(GATED.matches(made_by(graph, "y"), View(graph)))
    assert len(found) == (op == "Neg" and not extra and not kept)
    for match in found:
        assert {key: tensor.name for key, tensor in match.tensors.items()} == {
            "gate": "g",
            "value": "v",
            "x": "x",
            "sum": "s",
        }
        assert [node.op for node in match.nodes] == ["Mul", "Add"]
        assert match.node("sum").op == "Add"


def test_every_way_is_found() -> None:
    graph = graph_of("g (float[4] a, float[4] b) => (float[4] y) { y = Add(a, b) }")
    assert names(Made("Add", "p", "q"), graph) == [{"p": "a", "q": "b"}, {"p": "b", "q": "a"}]
    assert names(Made("Sub", "p", "q"), graph) == []


def test_a_name_stands_for_one_tensor() -> None:
    square, both = (
        Made("Mul", "x", "x"),
        Made("Add", Made("Neg", "x", name="n"), Made("Abs", Made("Neg", "x", name="n"))),
    )
    for text, count in (("Mul(a, a)", 2), ("Mul(a, b)", 0)):
        graph = graph_of(f"g (float[4] a, float[4] b) => (float[4] y) {{ y = {text} t = Neg(b) }}")
        assert len(names(square, graph)) == count
    for other, count in (("n", 1), ("m", 0)):  # two nodes that compute the same are two tensors
        graph = graph_of(
            f"g (float[4] a) => (float[4] y) {{ n = Neg(a) m = Neg(a) k = Abs({other}) y = Add(n, k) t = Neg(m) }}"
        )
        assert len(names(both, graph)) == count


def test_what_may_be_missing() -> None:
    pattern = Made("Neg", Made("Cast", "x", optional=True, name="wide"))
    graph = graph_of("g (float16[4] a) => (float[4] y) { c = Cast<to = 1>(a) y = Neg(c) }")
    assert names(pattern, graph) == [{"x": "a", "wide": "c"}, {"x": "c", "wide": "c"}]
    assert names(pattern, graph_of("g (float[4] a) => (float[4] y) { y = Neg(a) }")) == [
        {"x": "a", "wide": "a"}
    ]


def test_number_of_inputs() -> None:
    graph = graph_of(
        "g (float[4,5] a) => (float[i,5] y) <int64[1] s = {0}, int64[1] e = {1}> { y = Slice(a, s, e) }"
    )
    assert names(Made("Slice", "x", ...), graph) == [{"x": "a"}]
    assert names(Made("Slice", "x", "start", "end"), graph) == [{"x": "a", "start": "s", "end": "e"}]
    assert names(Made("Slice", "x", "start"), graph) == []
    assert names(Made("Slice", "x", "start", "end", "axes"), graph) == []


def test_other_domains_do_not_match() -> None:
    graph = graph_of("g (float[4] a) => (float[4] y) { y = com.microsoft.Gelu(a) }")
    assert names(Made("Gelu", "x"), graph) == []
