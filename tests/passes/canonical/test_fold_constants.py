import numpy as np
import pytest
from onnx import numpy_helper

from passes.canonical.fold_constants import FoldConstants
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, model, ops, recipes

RNG = np.random.default_rng(1)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_constant_chain_becomes_one_initializer() -> None:
    before = model(
        """g (float[b,6] x) => (float[b,6] y) {
            a = Constant<value_ints = [2, 3]>()
            c = Constant<value = int64 {4}>()
            s = Mul(a, c)
            f = Cast<to = 1>(s)
            t = ReduceSum<keepdims = 0>(f)
            r = Sqrt(t)
            y = Mul(x, r)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Mul"]
    assert result.changed == 6
    for batch in (1, 5):
        check_same(before, result.model, {"x": random(batch, 6)})


def test_static_dimensions_of_a_dynamic_tensor_fold() -> None:
    before = model(
        """g (float[b,6,n] x) => (float[m,k] y) {
            whole = Shape(x)
            one = Constant<value_ints = [1]>()
            channels = Gather(whole, one)
            last = Shape<start = 1, end = 2>(x)
            both = Mul(channels, last)
            minus = Constant<value_ints = [-1]>()
            root = Constant<value_ints = [6]>()
            six = Div(both, root)
            shape = Concat<axis = 0>(minus, six)
            y = Reshape(x, shape)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Shape", "Reshape"]  # the Shape is unused now; remove-unused drops it
    for b, n in ((1, 2), (3, 5)):
        check_same(before, result.model, {"x": random(b, 6, n)})


def test_slice_of_static_dimensions_folds_and_of_dynamic_ones_stays() -> None:
    before = model(
        """g (float[b,4,6] x, float[k] z) => (int64[2] static, int64[2] dynamic) {
            whole = Shape(x)
            zero = Constant<value_ints = [0]>()
            one = Constant<value_ints = [1]>()
            two = Constant<value_ints = [2]>()
            three = Constant<value_ints = [3]>()
            tail = Slice(whole, one, three)
            static = Add(tail, tail)
            head = Slice(whole, zero, two)
            dynamic = Add(head, head)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Shape", "Add", "Slice", "Add"]
    check_same(before, result.model, {"x": random(3, 4, 6), "z": random(2)})


def test_dynamic_shapes_stay() -> None:
    before = model(
        """g (float[b,n] x) => (float[m] y) {
            shape = Shape(x)
            axes = Constant<value_ints = [0]>()
            count = ReduceProd<keepdims = 1>(shape, axes)
            y = Reshape(x, count)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Shape", "ReduceProd", "Reshape"]


def test_no_ops_become_wires() -> None:
    before = model(
        """g (float[2,3] x, float16[b] h) => (float[2,3] y, float16[b] z) {
            a = Identity(x)
            b2 = Cast<to = 1>(a)
            c = Transpose<perm = [0, 1]>(b2)
            s = Constant<value_ints = [2, 3]>()
            d = Reshape(c, s)
            e = Concat<axis = 1>(d)
            y = Neg(e)
            k = CastLike(h, h)
            z = Neg(k)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Neg", "Neg"]
    check_same(before, result.model, {"x": random(2, 3), "h": random(4).astype(np.float16)})


def test_what_is_no_no_op_stays() -> None:
    before = model(
        """g (float[2,3] x, float[b,3] h) => (float[3,2] y, float16[2,3] w, float[k,3] z) {
            s = Constant<value_ints = [3, 2]>()
            a = Reshape(x, s)
            y = Neg(a)
            c = Cast<to = 10>(x)
            w = Neg(c)
            t = Constant<value_ints = [-1, 3]>()
            d = Reshape(h, t)
            z = Neg(d)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Reshape", "Neg", "Cast", "Neg", "Reshape", "Neg"]
    check_same(before, result.model, {"x": random(2, 3), "h": random(4, 3)})


def test_cast_like_becomes_cast() -> None:
    before = model(
        """g (float[n] x, float16[m] like) => (float16[n] y) {
            h = CastLike(x, like)
            y = Neg(h)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Cast", "Neg"]
    check_same(before, result.model, {"x": random(5), "like": random(2).astype(np.float16)})


def test_integer_division_truncates_like_the_runtime() -> None:
    before = model(
        """g (int64[1] x) => (int64[1] y) {
            a = Constant<value_ints = [-7]>()
            b = Constant<value_ints = [2]>()
            c = Div(a, b)
            y = Mul(x, c)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Mul"]
    check_same(before, result.model, {"x": np.array([5])})


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_folded_values_keep_their_type(kind: str) -> None:
    number = {"float16": 10, "bfloat16": 16}[kind]
    before = model(
        f"""g ({kind}[n] x) => ({kind}[n] y) {{
            a = Constant<value = float {{0.3}}>()
            b = Cast<to = {number}>(a)
            y = Mul(x, b)
        }}"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Mul"]
    assert [t.data_type for t in result.model.graph.initializer] == [number]


def test_frequencies_of_an_embedding_are_rounded_once() -> None:
    before = model(
        """g (float[b,128] x) => (float[b,128] y) {
            zero = Constant<value_float = 0.0>()
            end = Constant<value_float = 128.0>()
            one = Constant<value_float = 1.0>()
            steps = Range(zero, end, one)
            rate = Constant<value_float = -0.071955785>()
            exponents = Mul(steps, rate)
            frequencies = Exp(exponents)
            y = Mul(x, frequencies)
        }"""
    )
    (held,) = apply(before, FoldConstants()).model.graph.initializer
    exponents = np.arange(128, dtype=np.float32) * np.float32(-0.071955785)
    exact = np.exp(exponents.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(numpy_helper.to_array(held), exact)
    assert np.any(np.exp(exponents) != exact), "numpy's own is off in some"


def test_recipes_quantizers_and_graph_outputs_stay() -> None:
    weight = Recipe.of_array(random(4, 4))
    before = model(
        """g (float[b,4] x) => (float[b,4] y, float[1] fixed, float[4] d) {
            t = Transpose<perm = [1, 0]>(w)
            y = MatMul(x, t)
            fixed = Constant<value_floats = [2.5]>()
            q = QuantizeLinear(v, scale, zero)
            d = DequantizeLinear(q, scale, zero)
        }""",
        {"w": weight, "v": random(4), "scale": np.float32(0.02), "zero": np.int8(0)},
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Transpose", "MatMul", "Constant", "QuantizeLinear", "DequantizeLinear"]
    assert result.changed == 0
    assert recipes(result.model) == {"w": weight}


def test_large_results_stay_in_the_graph() -> None:
    before = model(
        """g (float[1] x) => (float[300, 300] y) {
            shape = Constant<value_ints = [300, 300]>()
            big = ConstantOfShape<value = float[1] {1.5}>(shape)
            y = Mul(big, x)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["ConstantOfShape", "Mul"]
    small = apply(before, FoldConstants(max_elements=100_000))
    assert ops(small.model) == ["Mul"]
    check_same(before, small.model, {"x": random(1)})


def test_folds_inside_a_subgraph() -> None:
    before = model(
        """g (bool c, float[n] x) => (float[n] y) {
            two = Constant<value = float {2.0}>()
            y = If<then_branch = then () => (float[n] a) {
                    one = Constant<value = float {1.0}>()
                    three = Add(one, two)
                    a = Mul(x, three)
                }, else_branch = other () => (float[n] b) { b = Neg(x) }>(c)
        }"""
    )
    result = apply(before, FoldConstants())
    branch = result.model.graph.node[-1].attribute[0].g
    assert [node.op_type for node in branch.node] == ["Mul"]
    for choice in (True, False):
        check_same(before, result.model, {"c": np.array(choice), "x": random(3)})


def test_a_dimension_that_folding_made_static_folds_too() -> None:
    before = model(
        """g (float[1] x, float[2,3] z) => (float[6] y) {
            dims = Constant<value_ints = [2, 3]>()
            axes = Constant<value_ints = [0]>()
            count = ReduceProd(dims, axes)
            wide = Expand(x, count)
            shape = Shape(wide)
            flat = Reshape(z, shape)
            y = Add(wide, flat)
        }"""
    )
    result = apply(before, FoldConstants())
    assert ops(result.model) == ["Expand", "Reshape", "Add"]
    check_same(before, result.model, {"x": random(1), "z": random(2, 3)})
