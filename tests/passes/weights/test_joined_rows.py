"""Recipes that join rows: what they are, how they are written, and that the parts are stored once."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from passes import PassError
from passes.storage import load, save, save_all
from passes.weights.evaluate import evaluate, tasks, to_bytes
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import model, recipes, run_ort
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(21)


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
