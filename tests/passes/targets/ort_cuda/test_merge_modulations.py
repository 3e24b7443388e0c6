"""merge-modulations, and recipes that join rows."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from passes import PassError
from passes.canonical.remove_unused import RemoveUnused
from passes.storage import load, save, save_all
from passes.targets.ort_cuda.merge_modulations import MergeModulations
from passes.weights.evaluate import evaluate, tasks, to_bytes
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, error, model, ops, recipes, run_ort

RNG = np.random.default_rng(21)
END = np.iinfo(np.int64).max


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


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


@pytest.mark.parametrize(
    "other",
    [
        block(1, "2", gemm="transB = 1, alpha = 0.5"),
        block(1, "2", also="z1 = Neg(m1)"),
        block(1, "2").replace("Sigmoid(temb)", "Tanh(temb)"),
        block(1, "2").replace("<axis = 1, num_outputs = 3>(m1)", "<axis = 1>(m1, sizes)"),
    ],
)
def test_must_not_fire(other: str) -> None:
    sizes = "sizes = Constant<value = int64[3] {2, 4, 6}>()" if "sizes" in other else ""
    if sizes:
        other = other.replace("p1s = Slice(p1, zero, end, zero, ones)", "p1s = Concat<axis = 1>(p1, p1)")
        other = other.replace("Unsqueeze(r1, at)", "Unsqueeze(q1, at)")
    before = network(block(0, "2"), f"{sizes} {other}", outputs="x2")
    assert apply(before, MergeModulations()).changed == 0


def test_joined_rows_are_written_part_by_part(tmp_path: Path) -> None:
    parts = [random(n, 300, dtype=np.float16) for n in (700, 1, 33)]
    whole = Recipe.of_array(parts[0]).append([Recipe.of_array(part) for part in parts[1:]])
    wanted = np.concatenate(parts)
    assert whole.shape == wanted.shape
    assert np.array_equal(evaluate(whole), wanted)
    assert b"".join(bytes(to_bytes(task())) for task in tasks(whole)) == wanted.tobytes()
    turned = whole.transpose((1, 0)).cast(onnx.TensorProto.FLOAT)
    assert np.array_equal(evaluate(turned), wanted.T.astype(np.float32))
    made = model(
        "g (float16[n,300] x) => (float16[n,m] y) { t = Transpose(w) y = MatMul(x, t) }", {"w": whole}
    )
    save(made, tmp_path / "m.onnx")
    read = recipes(load(tmp_path / "m.onnx"))["w"]
    assert np.array_equal(evaluate(read), wanted)


def test_what_is_joined_in_one_model_and_single_in_another_is_stored_once(tmp_path: Path) -> None:
    parts = [Recipe.of_array(random(64, 256)) for _ in range(3)]  # 64 KiB each: a multiple of a page
    odd = [Recipe.of_array(random(n, 256)) for n in (3, 64)]  # the second would not lie on a page
    single = "g (float[n,256] x) => (float[n,m] y) { t = Transpose(w) y = MatMul(x, t) }"
    also = "u = Transpose(v) z = MatMul(x, u)"
    both = single.replace(" y)", " y, float[n,k] z)").replace("}", f"{also} }}")
    models = {
        tmp_path / "single.onnx": model(both, {"w": parts[1], "v": odd[1]}),
        tmp_path / "joined.onnx": model(both, {"w": parts[0].append(parts[1:]), "v": odd[0].append(odd[1:])}),
        tmp_path / "twice.onnx": model(single, {"w": parts[0].append(parts[1:2]).append(parts[2:])}),
    }
    written = save_all(models)
    data = next(file for file in written if file.path.name.endswith("_data"))
    once = sum(recipe.nbytes for recipe in (*parts, *odd))
    assert (
        once + odd[1].nbytes <= data.nbytes - sum(p.nbytes for p in parts) < once + odd[1].nbytes + 3 * 4096
    )
    values = {"x": random(5, 256)}
    for path, made in models.items():
        for got, want in zip(run_ort(load(path), values), run_ort(made, values), strict=True):
            assert np.array_equal(got, want)


def test_rows_that_do_not_fit() -> None:
    first = Recipe.of_array(random(2, 3))
    for other in (random(2, 4), random(2, 3, dtype=np.float16), random(3)):
        with pytest.raises(PassError, match="no rows in common"):
            first.append([Recipe.of_array(other)])
