from typing import Any

import ml_dtypes
import numpy as np
import pytest

from passes.canonical.fold_weight_layout import FoldWeightLayout
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, model, ops, recipes

RNG = np.random.default_rng(5)


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def quantized(*shape: int) -> Recipe:
    scale = Recipe.of_array(np.array(0.02, np.float32))
    return Recipe.of_array(random(*shape)).quantize(scale, 17)


def positive(*shape: int) -> np.ndarray:
    return (0.01 + 0.02 * RNG.random(shape)).astype(np.float32)


def test_a_chain_goes_into_the_recipe() -> None:
    before = model(
        """g (float16[b,4] x) => (float16[b,6] y) {
            a = Identity(w)
            r = Reshape(a, shape)
            t = Transpose<perm = [2, 0, 1]>(r)
            f = Reshape(t, flat)
            h = Cast<to = 10>(f)
            y = MatMul(x, h)
        }""",
        {"w": Recipe.of_array(random(6, 4)), "shape": np.array([2, 3, -1]), "flat": np.array([0, -1])},
    )
    result = apply(before, FoldWeightLayout())
    assert ops(result.model) == ["MatMul"]
    assert recipes(result.model)["w"].shape == (4, 6)
    assert [op.name for op in recipes(result.model)["w"].ops] == ["reshape", "transpose", "reshape", "cast"]
    for batch in (1, 3):  # float16 MatMul adds in another order when an operand is transposed
        check_same(before, result.model, {"x": random(batch, 4, dtype=np.float16)}, 1e-3)


def test_transpose_without_perm_reverses() -> None:
    before = model(
        "g (float[b,4] x) => (float[b,6] y) { t = Transpose(w)  y = MatMul(x, t) }",
        {"w": Recipe.of_array(random(6, 4))},
    )
    result = apply(before, FoldWeightLayout())
    assert ops(result.model) == ["MatMul"]
    check_same(before, result.model, {"x": random(2, 4)})


@pytest.mark.parametrize("axis", [None, 0, 1, -2])
def test_through_dequantize_the_axis_moves_along(axis: int | None) -> None:
    shape = () if axis is None else ((6, 4)[axis],)
    before = model(
        f"""g (float[b,4] x) => (float[b,6] y) {{
            d = DequantizeLinear<axis = {1 if axis is None else axis}>(w, scale, zero)
            t = Transpose<perm = [1, 0]>(d)
            y = MatMul(x, t)
        }}""",
        {"w": quantized(6, 4), "scale": positive(*shape), "zero": np.zeros(shape, ml_dtypes.float8_e4m3fn)},
    )
    result = apply(before, FoldWeightLayout())
    assert ops(result.model) == ["DequantizeLinear", "MatMul"]
    assert recipes(result.model)["w"].shape == (4, 6)
    check_same(before, result.model, {"x": random(3, 4)})


@pytest.mark.parametrize("axis", [0, 1])
def test_block_scales_are_transposed(axis: int) -> None:
    scale = positive(2, 4) if axis == 0 else positive(8, 2)
    weight = Recipe.of_array(random(8, 4)).quantize(Recipe.of_array(scale + 0.1), 22, axis, (4, 2)[axis])
    before = model(
        f"""g (float[b,4] x) => (float[b,8] y) {{
            d = DequantizeLinear<axis = {axis}, block_size = {(4, 2)[axis]}>(w, scale, zero)
            t = Transpose<perm = [1, 0]>(d)
            y = MatMul(x, t)
        }}""",
        {"w": weight, "scale": scale, "zero": np.zeros(scale.shape, ml_dtypes.int4)},
    )
    result = apply(before, FoldWeightLayout())
    assert ops(result.model) == ["DequantizeLinear", "MatMul"]
    check_same(before, result.model, {"x": random(3, 4)})


def test_reshape_keeps_the_quantized_axis() -> None:
    before = model(
        """g (float[b,4,5,5] x) => (float[b,6,5,5] y) {
            d = DequantizeLinear<axis = 0>(w, scale)
            r = Reshape(d, shape)
            y = Conv(x, r)
        }""",
        {"w": quantized(6, 4), "scale": positive(6), "shape": np.array([6, 4, 1, 1])},
    )
    result = apply(before, FoldWeightLayout())
    assert ops(result.model) == ["DequantizeLinear", "Conv"]
    check_same(before, result.model, {"x": random(2, 4, 5, 5)}, 1e-6)


def test_readers_that_agree_share_one_layout() -> None:
    before = model(
        """g (float[b,4] x) => (float[b,6] y, float[b,6] z) {
            d = DequantizeLinear(w, scale)   t = Transpose<perm = [1, 0]>(d)   y = MatMul(x, t)
            e = DequantizeLinear(w, other)   u = Transpose<perm = [1, 0]>(e)   z = MatMul(x, u)
        }""",
        {"w": quantized(6, 4), "scale": positive(), "other": positive()},
    )
    result = apply(before, FoldWeightLayout())
    assert ops(result.model).count("Transpose") == 0
    assert len(recipes(result.model)) == 1
    check_same(before, result.model, {"x": random(3, 4)})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)  z = MatMul(x, w)", "different layouts"),
        (
            "t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)  r = Reshape(w, s)  z = MatMul(x, r)",
            "different layouts",
        ),
        ("t = Cast<to = 11>(w)  y = Cast<to = 1>(t)  z = MatMul(x, y)", "more bytes"),
        ("y = Transpose<perm = [1, 0]>(w)  z = MatMul(x, y)", "graph output"),
    ],
)
def test_refuses(body: str, reason: str) -> None:
    before = model(
        f"g (float[4,4] x) => (float[4,4] y, float[4,4] z) {{ {body} }}",
        {"w": Recipe.of_array(random(4, 4)), "s": np.array([4, 4])},
    )
    result = apply(before, FoldWeightLayout())
    assert result.changed == 0
    (refusal,) = result.records[0].refusals
    assert reason in refusal.reason
    assert "'w'" in refusal.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("t = Cast<to = 10>(d)  y = MatMul(x, t)", "rounds differently"),
        ("t = Reshape(d, s)  u = Transpose<perm = [1, 0]>(t)  y = MatMul(x, u)", "another"),
        ("t = Reshape(d, n)  y = MatMul(x, t)", "not constant"),
    ],
)
def test_refuses_behind_dequantize(body: str, reason: str) -> None:
    kind = "float16" if "Cast" in body else "float"
    before = model(
        f"""g ({kind}[b,k] x, int64[2] n) => ({kind}[b,m] y) {{
            d = DequantizeLinear<axis = 0>(w, scale)  {body} }}""",
        {"w": quantized(6, 4), "scale": positive(6), "s": np.array([4, 6])},
    )
    result = apply(before, FoldWeightLayout())
    assert result.changed == 0
    assert reason in result.records[0].refusals[0].reason


def test_inline_constants_and_plain_readers_are_left_alone() -> None:
    before = model(
        """g (float[b,4] x) => (float[b,6] y) {
            t = Transpose<perm = [1, 0]>(v)  h = MatMul(x, t)  y = Add(h, w) }""",
        {"v": random(6, 4), "w": Recipe.of_array(random(6))},
    )
    result = apply(before, FoldWeightLayout())
    assert result.changed == 0
    assert result.records[0].refusals == ()
