"""merge-modulations: which products become one, and what is done at once after it."""

from typing import Any

import numpy as np
import onnx
import pytest

from passes.canonical.fold_constants import FoldConstants
from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.merge_modulations import MergeModulations
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, error, model, ops, refused, run_ort
from tests.passes.targets.ort_cuda.graphs import seeded

random, END = seeded(21), np.iinfo(np.int64).max


def block(n: int, batch: str, gemm: str = "transB = 1", scale: str = "one", also: str = "") -> str:
    """A block that modulates x twice: three parts of its own product of the embedding, cut by image once."""
    images = ", ".join(f"g{n}_{i}" for i in range(int(batch))) if batch.isdigit() else ""
    cut = f"{images} = Split<axis = 0, num_outputs = {batch}>(g{n}u) g{n} = Concat<axis = 0>({images})"
    cut2 = cut.replace(f"g{n}", f"b{n}")
    return f"""
        s{n} = Sigmoid(temb) e{n} = Mul(temb, s{n})
        m{n} = Gemm<{gemm}>(e{n}, w{n}, c{n})
        p{n}, q{n}, r{n} = Split<axis = 1, num_outputs = 3>(m{n})
        p{n}s = Slice(p{n}, zero, end, zero, ones) p{n}u = Unsqueeze(p{n}s, at)
        a{n} = Add(p{n}u, {scale}) {also}
        b{n}u = Unsqueeze(q{n}, at) g{n}u = Unsqueeze(r{n}, at)
        {cut + cut2 if images else f"g{n} = Identity(g{n}u) b{n} = Identity(b{n}u)"}
        t{n} = Mul(x{n}, a{n}) u{n} = Add(t{n}, b{n}) x{n + 1} = Mul(u{n}, g{n})"""


def network(*blocks: str, batch: str = "2", outputs: str = "x2") -> onnx.ModelProto:
    named = ", ".join(
        f"float[{batch},{'5' if name.startswith('x') else '1'},4] {name}" for name in outputs.split()
    )
    text = f"""g (float[{batch},5,4] x0, float[{batch},6] temb) => ({named})
        <int64[1] zero = {{0}}, int64[1] ones = {{1}}, int64[1] at = {{1}}, int64[1] end = {{{END}}},
         float one = {{1}}, float two = {{2}}> {{ {" ".join(blocks)} }}"""
    weights = {f"w{n}": Recipe.of_array(random(12, 6)) for n in range(2)}
    made = model(text, weights | {f"c{n}": random(12) for n in range(2)})
    return onnx.shape_inference.infer_shapes(made, data_prop=True)


def feeds(batch: int = 2) -> dict[str, Any]:
    return {"x0": random(batch, 5, 4), "temb": random(batch, 6)}


@pytest.mark.parametrize("batch", ["2", "3", "b"])
def test_one_product_one_sum_and_one_split_an_image(batch: str) -> None:
    before = network(block(0, batch), block(1, batch), batch=batch)
    result = apply(before, MergeModulations(), RemoveUnused())
    kinds = ops(result.model)
    assert kinds.count("Gemm") == 1
    assert kinds.count("Sigmoid") == 1
    assert kinds.count("Add") == 1 + 2  # of 1 + scale; the shifts
    if batch != "b":
        assert (
            kinds.count("Split") == 1 + 2 + 2
        )  # the blocks; of each its parts as they are, and those of all images
        assert ops(before).count("Split") == 2 + 4
    values = feeds(2 if batch == "b" else int(batch))
    check_same(before, result.model, values, 1e-6, run_ort)
    for name in ("w0", "w1", "c0", "c1"):  # all of them arrive where they did
        other = onnx.ModelProto()
        other.CopyFrom(before)
        tensor = next(t for t in other.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(random(*tensor.dims), name))
        assert error(run_ort(other, values)[0], run_ort(result.model, values)[0]) > 1e-2
    assert apply(result.model, MergeModulations()).changed == 0


def test_numbers_of_their_own_and_sums_that_must_stay() -> None:
    read_twice = "z1 = Neg(p1u)"
    before = network(block(0, "2"), block(1, "2", scale="two", also=read_twice), outputs="x2 z1")
    result = apply(before, MergeModulations(), RemoveUnused())
    assert ops(result.model).count("Gemm") == 1
    assert ops(result.model).count("Add") == 1 + 2 + 1
    check_same(before, result.model, feeds(), 1e-6, run_ort)
    both = network(block(0, "2"), block(1, "2", scale="two"))
    result = apply(both, MergeModulations(), RemoveUnused())
    assert ops(result.model).count("Add") == 1 + 2
    check_same(both, result.model, feeds(), 1e-6, run_ort)


def test_bounded() -> None:
    before = network(block(0, "2"), block(1, "2"))
    assert apply(before, MergeModulations(most=143)).changed == 0
    assert apply(before, MergeModulations(most=144)).changed == 2


_PLAIN = "it is not a plain product with constant weights [N, K] and a constant bias [N]"
_UNEQUAL = """
    sizes = Constant<value = int64[3] {2, 4, 6}>() s1 = Sigmoid(temb) e1 = Mul(temb, s1)
    m1 = Gemm<transB = 1>(e1, w1, c1) p1, q1, r1 = Split<axis = 1>(m1, sizes)
    a1 = Concat<axis = 1>(p1, p1) d1 = Unsqueeze(a1, at) x2 = Mul(x1, d1)"""


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (block(1, "2", gemm="transB = 1, alpha = 0.5"), _PLAIN),
        (_UNEQUAL, "it is not split into equal parts"),
        (block(1, "2", also="z1 = Neg(m1)"), None),
        (block(1, "2").replace("Sigmoid(temb)", "Tanh(temb)"), None),
    ],
)
def test_must_not_fire(other: str, reason: str | None) -> None:
    before = network(block(0, "2"), other)
    assert refused(before, FoldConstants(), MergeModulations()) == ({reason} if reason else set())


def test_a_bias_of_one_element_is_refused() -> None:
    before = network(block(0, "2"), block(1, "2"))
    tensor = next(t for t in before.graph.initializer if t.name == "c1")
    tensor.CopyFrom(onnx.numpy_helper.from_array(random(1), "c1"))
    assert refused(before, MergeModulations()) == {_PLAIN}
