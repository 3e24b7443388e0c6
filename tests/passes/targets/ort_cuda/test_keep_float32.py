"""keep-float32: vectors that were computed keep their digits."""

import numpy as np
import onnx

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fold_value_bias import FoldValueBias
from passes.targets.ort_cuda.keep_float32 import KeepFloat32
from passes.targets.ort_cuda.merge_row_products import MergeRowProducts
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, model, refused, run_ort, run_reference
from tests.passes.targets.ort_cuda.graphs import biased_values, rows, seeded

random = seeded(28)


def test_digits_of_a_moved_bias() -> None:
    before = biased_values("float16", random)
    rounded = apply(before, FoldValueBias()).model
    result = apply(before, FoldValueBias(), KeepFloat32())
    (kept,) = [t for t in result.model.graph.initializer if t.name.endswith("/float32")]
    assert kept.data_type == onnx.TensorProto.FLOAT
    (cast,) = [n for n in result.model.graph.node if n.op_type == "Cast"]
    assert cast.input[0] == kept.name
    feeds = {n: random(2, 4, c, dtype=np.float16) for n, c in (("x", 6), ("q", 8), ("k", 8))}
    check_same(before, result.model, feeds, 3e-3, run_ort)
    arrays = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in before.graph.initializer}
    wanted = arrays["bo"] + arrays["bv"] @ arrays["mo"]
    recipe = Recipe.of_tensor(kept)
    assert recipe is not None
    (old,) = [t for t in rounded.graph.initializer if t.name.endswith("/with_values")]
    assert np.array_equal(
        evaluate(recipe).astype(np.float16), evaluate(Recipe.of_tensor(old))
    )  # the same bits
    assert np.abs(evaluate(recipe) - wanted).max() < 1e-6
    assert np.abs(wanted.astype(np.float16) - wanted).max() > 1e-5  # which the rounded one could not
    assert apply(result.model, KeepFloat32()).changed == 0
    assert apply(apply(biased_values("float", random), FoldValueBias()).model, KeepFloat32()).changed == 0


def test_digits_of_joined_vectors() -> None:
    """Joined and reshaped, as merge-projections and lift-bias leave them; a plain matrix stays as it is."""
    start = Recipe.of_array(random(8, 1))
    moved = start.subtract_product(Recipe.of_array(random(8, 3)), Recipe.of_array(random(3, 1))).reshape((8,))
    half = int(onnx.TensorProto.FLOAT16)
    plain = Recipe.of_array(random(4, dtype=np.float16))
    joined = plain.append([moved.cast(half)]).reshape((1, 1, 12))
    matrix = start.subtract_product(Recipe.of_array(random(8, 3)), Recipe.of_array(random(3, 1))).cast(half)
    weights = {
        "v": joined,
        "alone": moved.cast(half),
        "w": matrix.append([matrix]).reshape((4, 4)),
        "p": plain,
    }
    before = model(
        """g (float16[b,s,12] x, float16[b,s,8] z, float16[b,s,4] u)
        => (float16[b,s,12] y, float16[b,s,8] a, float16[b,s,4] t) {
        y = Add(x, v) a = Add(z, alone) l = MatMul(u, w) t = Add(l, p)
    }""",
        weights,
    )
    result = apply(before, KeepFloat32())
    assert result.changed == 2
    feeds = {n: random(2, 3, c, dtype=np.float16) for n, c in (("x", 12), ("z", 8), ("u", 4))}
    check_same(before, result.model, feeds, 0.0, run_reference)


def test_joined_vectors_keep_their_digits() -> None:
    """Vectors that fold-value-bias computed are float32 in the file when they have been joined, too."""
    moved = Recipe.of_array(random(4, 1)).subtract_product(
        Recipe.of_array(random(4, 3)), Recipe.of_array(random(3, 1))
    )
    vector = moved.reshape((4,)).cast(int(onnx.TensorProto.FLOAT16))
    before = rows({"b0": vector, "b1": random(4, dtype=np.float16)}, dtype="float16")
    merged = apply(before, MergeRowProducts(), RemoveUnused())
    kept = apply(merged.model, KeepFloat32())
    assert kept.changed == 1
    feeds = {"x": random(1, 12, dtype=np.float16), "one": random(4, dtype=np.float16)}
    check_same(before, merged.model, feeds, 0.0, run_reference)
    check_same(before, kept.model, feeds, 0.0, run_reference)


def test_a_matrix_is_refused() -> None:
    half = int(onnx.TensorProto.FLOAT16)
    moved = Recipe.of_array(random(8, 4)).subtract_product(
        Recipe.of_array(random(8, 3)), Recipe.of_array(random(3, 4))
    )
    made = model("g (float16[b,8] x) => (float16[b,4] y) { y = MatMul(x, w) }", {"w": moved.cast(half)})
    assert refused(made, KeepFloat32()) == {"it was computed and rounded, but is not a vector"}
