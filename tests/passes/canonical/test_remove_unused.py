import numpy as np

from passes.canonical.remove_unused import RemoveUnused
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, model, ops, recipes

RNG = np.random.default_rng(2)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_dead_nodes_and_their_weights_go() -> None:
    before = model(
        """g (float[b,4] x, float[2] unused) => (float[b,4] y) {
            dead = MatMul(x, w)
            deader = Neg(dead)
            y = MatMul(x, v)
        }""",
        {"w": Recipe.of_array(random(4, 4)), "v": Recipe.of_array(random(4, 4)), "n": random(3)},
    )
    result = apply(before, RemoveUnused())
    assert ops(result.model) == ["MatMul"]
    assert set(recipes(result.model)) == {"v"}
    assert [t.name for t in result.model.graph.initializer] == ["v"]
    assert [i.name for i in result.model.graph.input] == ["x", "unused"]
    check_same(before, result.model, {"x": random(3, 4), "unused": random(2)})


def test_equal_inline_constants_merge_and_others_do_not() -> None:
    shape, other = np.array([-1, 2]), np.array([2, -1])
    before = model(
        """g (float[4] x) => (float[2,2] y, float[2,2] z, float[2,2] w) {
            y = Reshape(x, a)
            n = Neg(x)
            z = Reshape(n, b)
            w = Reshape(n, c)
        }""",
        {"a": shape, "b": shape.copy(), "c": other},
    )
    result = apply(before, RemoveUnused())
    assert result.changed == 1
    assert [node.input[1] for node in result.model.graph.node if node.op_type == "Reshape"] == ["a", "a", "c"]
    check_same(before, result.model, {"x": random(4)})


def test_same_bytes_of_another_type_or_shape_do_not_merge() -> None:
    before = model(
        """g (float[1] x, int32[1] i) => (float[1] y, float[1] z, int32[1] j) {
            y = Add(x, a)
            z = Add(x, b)
            j = Add(i, c)
        }""",
        {"a": np.float32([1.5]), "b": np.float32(1.5), "c": np.float32([1.5]).view(np.int32)},
    )
    assert apply(before, RemoveUnused()).changed == 0


def test_recipes_with_equal_content_keep_their_names() -> None:
    weight = random(4, 4)
    before = model(
        "g (float[b,4] x) => (float[b,4] y) { h = MatMul(x, w)  y = MatMul(h, v) }",
        {"w": Recipe.of_array(weight), "v": Recipe.of_array(weight)},
    )
    result = apply(before, RemoveUnused())
    assert result.changed == 0
    assert set(recipes(result.model)) == {"w", "v"}


def test_what_only_a_subgraph_reads_is_used() -> None:
    before = model(
        """g (bool c, float[n] x) => (float[n] y) {
            used = Mul(x, two)
            unused = Neg(used)
            y = If<then_branch = then () => (float[n] a) { dead = Neg(used)  a = Exp(used) },
                   else_branch = other () => (float[n] b) { b = Neg(x) }>(c)
        }""",
        {"two": np.float32(2.0)},
    )
    result = apply(before, RemoveUnused())
    assert ops(result.model) == ["Mul", "If"]
    assert [node.op_type for node in result.model.graph.node[1].attribute[0].g.node] == ["Exp"]
    for choice in (True, False):
        check_same(before, result.model, {"c": np.array(choice), "x": random(3)})
