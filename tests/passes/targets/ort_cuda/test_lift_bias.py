"""lift-bias: which biases get three axes."""

import pytest

from passes.targets.ort_cuda.lift_bias import LiftBias
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, model, refused
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(16)


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


@pytest.mark.parametrize(
    ("graph", "bias", "reason"),
    [
        (
            "p = MatMul(x, m) y = Add(p, w) r = MatMul(z, m) u = Add(r, w)",
            (6,),
            "others read the bias as well",
        ),
        ("p = MatMul(x, m) y = Add(p, w) u = MatMul(z, m)", (1,), None),
        ("n = Neg(w) p = MatMul(x, m) y = Add(p, n) u = MatMul(z, m)", (6,), None),
        ("p = MatMul(x, m) n = Neg(p) y = Add(n, w) u = MatMul(z, m)", (6,), None),
    ],
)
def test_must_not_fire(graph: str, bias: tuple[int, ...], reason: str | None) -> None:
    text = f"g (float[b,s,4] x, float[b,4] z) => (float[b,s,6] y, float[b,6] u) {{ {graph} }}"
    made = model(text, {"w": random(*bias), "m": random(4, 6)})
    assert refused(made, LiftBias()) == ({reason} if reason else set())
