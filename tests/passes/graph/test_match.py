"""Each question of graph/match.py against variants that a seeded generator varies, and what they must answer."""

from typing import Any

import numpy as np
import pytest

from passes.graph.from_onnx import import_graph
from passes.graph.match import (
    View,
    bias_add,
    constant_value,
    cut_of,
    held_values,
    input_of,
    is_channel_norm,
    is_constant,
    is_op,
    is_per_image,
    number_of,
    permutation,
    producer,
    projection,
    sole_producer,
    sole_reader,
)
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import graph_of, made_by, model, pick, run_ort

K = 3


def values_of(rng: np.random.Generator, shape: list[int]) -> Any:
    """A weight in memory, or as a recipe."""
    array = rng.standard_normal(shape).astype(np.float32)
    return pick(rng, array, Recipe.of_array(array))


@pytest.mark.parametrize("seed", range(120))
def test_projection(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank, n = pick(rng, 2, 3, 3, 4), pick(rng, 1, 5)
    bias_shape = pick(rng, [n], [n], [1], [], [1, n], [1, 1, n])
    weight, bias = pick(rng, "w", "w", "w", "computed"), pick(rng, "b", "b", "computed")
    reader, as_output = pick(rng, "", "", "z = Neg(p)"), pick(rng, False, False, True)
    lead = ",".join("bcd"[: rank - 1])
    outputs = (
        [f"float[{lead},{n}] y"]
        + [f"float[{lead},{n}] z"] * bool(reader)
        + [f"float[{lead},{n}] p"] * as_output
    )
    operands = pick(rng, "p, added", "added, p")
    graph = graph_of(
        f"""g (float[{lead},{K}] x) => ({", ".join(outputs)}) {{
            matrix = {"Neg(w)" if weight == "computed" else "Identity(w)"}
            added = {"Neg(b)" if bias == "computed" else "Identity(b)"}
            p = MatMul(x, matrix) y = Add({operands}) {reader} }}""",
        {"w": values_of(rng, [K, n]), "b": values_of(rng, bias_shape)},
    )
    for node in list(graph.nodes):  # an Identity stands for the constant itself
        if node.op == "Identity":
            for user in list(node.outputs[0].outputs):
                user.inputs[[t.name for t in user.inputs].index(node.outputs[0].name)] = node.inputs[0]
    view, product, total = View(graph), made_by(graph, "p"), made_by(graph, "y")

    is_bias = bias == "b" and bias_shape == [n]
    assert (bias_add(total) is not None) == is_bias
    plain = projection(product, view)
    assert (plain is not None) == (rank == 3 and weight == "w")
    if plain is not None:
        assert (plain.product, plain.total, plain.bias) == (product, None, None)

    found = projection(total, view)
    assert (found is not None) == (plain is not None and is_bias and not reader and not as_output)
    if found is not None:
        assert found.nodes == (total, product)
        assert found.bias is not None
        assert (found.x.name, found.weight.name, found.bias.name) == ("x", "w", "b")


@pytest.mark.parametrize("seed", range(80))
def test_gemm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, turned, x_turned = pick(rng, 1, 5), pick(rng, 0, 1, 1), pick(rng, 0, 0, 1)
    alpha, beta = pick(rng, 1.0, 1.0, 0.5), pick(rng, 1.0, 1.0, 2.0)
    bias_shape, given = pick(rng, [n], [n], [1], [1, n]), pick(rng, True, True, False)
    shape = [n, K] if turned else [K, n]
    attrs = f"transA = {x_turned}, transB = {turned}, alpha = {alpha}, beta = {beta}"
    graph = graph_of(
        f"""g (float[{"3,r" if x_turned else "r,3"}] x) => (float[r,{n}] y)
            {{ y = Gemm<{attrs}>(x, w{", b" if given else ""}) }}""",
        {"w": values_of(rng, shape)} | ({"b": values_of(rng, bias_shape)} if given else {}),
    )
    found = projection(made_by(graph, "y"), View(graph), "Gemm")
    plain = turned and not x_turned and alpha == beta == 1.0
    assert (found is not None) == bool(plain and given and bias_shape == [n])
    assert projection(made_by(graph, "y"), View(graph)) is None
    if found is not None:
        assert (found.x.name, found.weight.name, found.nodes) == ("x", "w", (found.product,))


@pytest.mark.parametrize("seed", range(30))
def test_readers(seed: int) -> None:
    """Sole readers and producers of a random graph, against a count of every use."""
    rng = np.random.default_rng(seed)
    names, lines = ["x"], []
    for index in range(12):
        a, b = rng.choice(names, 2)
        lines.append(f"t{index} = Add({a}, {b})")
        names.append(f"t{index}")
    outputs = sorted({*rng.choice(names[1:], 2), "t11"})
    given = ", ".join(f"float[4] {name}" for name in outputs)
    graph = graph_of(f"g (float[4] x) => ({given}) {{ {' '.join(lines)} }}")
    view = View(graph)
    for name in names:
        uses = [node for node in graph.nodes for tensor in node.inputs if tensor.name == name]
        tensor = next(t for t in (*graph.inputs, *(n.outputs[0] for n in graph.nodes)) if t.name == name)
        alone = len(uses) == 1 and name not in outputs
        assert sole_reader(tensor, view) is (uses[0] if alone else None)
        assert sole_producer(tensor, view) is (producer(tensor) if alone else None)
    order = list(graph.nodes)
    for i, j in rng.integers(12, size=(20, 2)):
        assert view.is_later(order[i], order[j]) == (i >= j)


def test_a_reader_in_a_body_is_not_later() -> None:
    graph = graph_of(
        """g (float[4] x, bool c) => (float[4] y) {
            n = Neg(x)
            y = If (c) <then_branch = t () => (float[4] a) { a = Abs(n) },
                        else_branch = e () => (float[4] b) { b = Relu(n) }>
        }"""
    )
    view, (negated, branch) = View(graph), graph.nodes
    inside = branch.attrs["then_branch"].nodes[0]
    assert view.is_later(branch, negated)
    assert not view.is_later(inside, negated)
    assert id(inside.outputs[0]) in view.outputs


@pytest.mark.parametrize("seed", range(60))
def test_cut(seed: int) -> None:
    """A cut takes what it says; whatever is not along one axis in steps of one is none."""
    rng = np.random.default_rng(seed)
    axes = pick(rng, [0], [1], [2], [-1], [-3], [0, 1], None)
    count = 1 if axes is None else len(axes)
    step = pick(rng, None, 1, 1, 2, -1) if axes is not None else None
    starts = [int(pick(rng, 0, 0, 1, -2)) for _ in range(count)]
    ends = [int(pick(rng, 2, -1, 2**31 - 1, 2**63 - 1)) for _ in range(count)]
    inputs = {"starts": starts, "ends": ends}
    if axes is not None:
        inputs["axes"] = axes
    if step is not None:
        inputs["steps"] = [step] * count
    text = f"g (float[4,5,6] x) => (float[i,j,k] y) {{ y = Slice(x, {', '.join(inputs)}) }}"
    made = model(text, {name: np.array(value, np.int64) for name, value in inputs.items()})
    cut = cut_of(made_by(import_graph(made), "y"))
    assert (cut is not None) == (count == 1 and step in (None, 1))
    if cut is not None:
        x = rng.standard_normal((4, 5, 6)).astype(np.float32)
        index: list[Any] = [slice(None)] * 3
        index[cut.axis] = slice(int(number_of(cut.start) or 0), int(number_of(cut.end) or 0))
        (got,) = run_ort(made, {"x": x})
        assert np.array_equal(got, x[tuple(index)])
        assert cut.takes_all == (starts == [0] and ends[0] >= 2**31 - 1)


@pytest.mark.parametrize("seed", range(40))
def test_norms_and_vectors_of_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank, axis = pick(rng, 2, 3, 3, 4), pick(rng, -1, -1, 2, 1)
    shape = ["b", "s", "t"][: rank - 1]
    axis = min(axis, rank - 1)
    scale = pick(rng, ["b", 1, 8], ["b", 1, 8], [1, 1, 8], ["b", "s", 8], [8])
    text = f"""g (float[{",".join(map(str, [*shape, 8]))}] x, float[{",".join(map(str, scale))}] v)
        => (float[n] y, float[m] w) {{ y = LayerNormalization<axis = {axis}>(x, g) w = Neg(v) }}"""
    graph = import_graph(model(text, {"g": np.ones(8, np.float32)}))
    norm, (x, vector) = made_by(graph, "y"), graph.inputs
    assert is_channel_norm(norm) == (rank == 3 and axis in (-1, 2))
    assert is_per_image(vector, x) == (rank == 3 and scale == ["b", 1, 8])


def test_operators_and_numbers() -> None:
    graph = graph_of(
        """g (float[b,4] x) => (float[b,4] y, float[b,4] z) <float[1,1] one = {1}, float[2] two = {1, 2}>
        { y = Add(x, one) z = com.microsoft.Gelu(x) t = Add(one, two) }"""
    )
    add, gelu = made_by(graph, "y"), made_by(graph, "z")
    asked = [(add, None, True), (add, 2, True), (add, 3, False), (gelu, None, False), (None, None, False)]
    assert [is_op(node, "Add", rank) for node, rank, _ in asked] == [answer for *_, answer in asked]
    assert not is_op(gelu, "Gelu")
    assert is_op(gelu, "Gelu", domain=("com.microsoft",))
    x, one = add.inputs
    two = made_by(graph, "t").inputs[1]
    assert (number_of(one), number_of(two), number_of(x)) == (1.0, None, None)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value = float[2] {1.5, -2}", np.array([1.5, -2], np.float32)),
        ("value_int = 3", np.array(3)),
        ("value_ints = [3, 4]", np.array([3, 4])),
        ("value_float = 0.5", np.array(0.5, np.float32)),
        ("value_floats = [0.5, 1.5]", np.array([0.5, 1.5], np.float32)),
    ],
)
def test_values_of_a_constant_node(attribute: str, expected: Any) -> None:
    graph = graph_of(f"g (float[1] x) => (float y) {{ c = Constant<{attribute}>() y = Identity(c) }}")
    node, tensor = made_by(graph, "c"), made_by(graph, "y").inputs[0]
    for found in (constant_value(node), held_values(tensor)):
        assert found is not None
        assert (found.dtype, found.shape, found.tolist()) == (
            expected.dtype,
            expected.shape,
            expected.tolist(),
        )
    assert is_constant(tensor)


def test_values_that_are_held_or_computed() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Add(x, w) z = Mul(x, r) }"
    array = np.array([1, 2], np.float32)
    graph = graph_of(text, {"w": array, "r": Recipe.of_array(array)})
    (x, w), r = made_by(graph, "y").inputs, made_by(graph, "z").inputs[1]
    held = held_values(w)
    assert held is not None
    assert np.array_equal(held, array)
    assert held_values(x) is held_values(r) is None
    assert [is_constant(t) for t in (x, w, r)] == [False, True, True]


def test_optional_inputs_and_orders_of_axes() -> None:
    text = """g (float[2,3,4] x, float m) => (float y, float z, float t) {
        y = Clip(x, , m) z = Transpose(x) t = Transpose<perm = [1, 0, 2]>(x)
    }"""
    graph = graph_of(text)
    clip = made_by(graph, "y")
    assert input_of(clip, 1) is input_of(clip, 3) is None
    assert input_of(clip, 2) is graph.inputs[1]
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    ran = run_ort(model(text), {"x": x, "m": np.array(50, np.float32)})
    for name, got in zip("zt", ran[1:], strict=True):
        assert np.array_equal(x.transpose(permutation(made_by(graph, name), 3)), got)
