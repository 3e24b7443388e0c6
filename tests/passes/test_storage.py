"""Recipes, kernels and the writer: results equal ONNX Runtime's operators; files are atomic and repeatable."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.base import PassError
from passes.graph.from_onnx import import_graph
from passes.graph.to_onnx import export_graph
from passes.storage import INLINE_BYTES, initializers, load, materialize, save, save_all, weight_bytes
from passes.weights.evaluate import evaluate, to_bytes
from passes.weights.recipe import Op, Recipe, constant, recipe_of
from passes.weights.sources import keep, np_dtype, safetensors_source

RNG = np.random.default_rng(7)


def _run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), sess_options=options).run(None, feed)[0]


@pytest.mark.parametrize("to", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_quantize_equals_onnx_runtime(to: int, axis: int | None, dtype: int) -> None:
    x = (RNG.standard_normal((48, 32)) * 3).astype(np_dtype(dtype))
    x[0, 0], x[1, 1] = 1000, -1000  # saturates
    scale = RNG.uniform(0.01, 0.05, () if axis is None else x.shape[axis]).astype(x.dtype)
    zero = np.zeros(scale.shape, np_dtype(to))
    attrs = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attrs),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(np.asarray(scale), "s"), numpy_helper.from_array(zero, "z")],
    )
    expected = _run(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), {"x": x}
    )
    ours = evaluate(Recipe.of_array(x).quantize(Recipe.of_array(np.asarray(scale)), to, axis))
    assert ours.dtype == np_dtype(to)
    np.testing.assert_array_equal(ours.astype(np.float32), expected)


@pytest.mark.parametrize("to", [TensorProto.INT4, TensorProto.FLOAT4E2M1])
def test_four_bit_blocks_round_trip_through_a_file(to: int, tmp_path: Path) -> None:
    x = RNG.standard_normal((64, 128)).astype(np.float32)
    scale = np.abs(x.reshape(64, 8, 16)).max(-1).astype(np.float32) / 6
    recipe = Recipe.of_array(x).quantize(Recipe.of_array(scale), to, axis=1, block_size=16)
    assert recipe.nbytes == 64 * 128 // 2
    decoded = evaluate(recipe).astype(np.float32) * np.repeat(scale, 16, axis=1)
    assert np.linalg.norm(decoded - x) / np.linalg.norm(x) < 0.13
    save(_model({"w": recipe}), tmp_path / "m.onnx")
    loaded = Recipe.of_tensor(next(initializers(load(tmp_path / "m.onnx"))))
    assert loaded is not None
    np.testing.assert_array_equal(evaluate(loaded).astype(np.float32), evaluate(recipe).astype(np.float32))
    packed = numpy_helper.to_array(next(initializers(onnx.load(tmp_path / "m.onnx"))))  # onnx's own unpacking
    np.testing.assert_array_equal(packed.astype(np.float32), evaluate(recipe).astype(np.float32))


def _model(weights: dict[str, Recipe]) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in weights]
    outputs = [helper.make_tensor_value_info(f"{n}_out", r.dtype, r.shape) for n, r in weights.items()]
    tensors = [recipe.to_tensor(name) for name, recipe in weights.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def test_recipe_chain_equals_numpy_and_survives_json() -> None:
    x = RNG.standard_normal((6, 10)).astype(np.float16)
    by = RNG.uniform(0.5, 2, (10,)).astype(np.float32)
    recipe = (
        Recipe.of_array(x)
        .multiply(Recipe.of_array(by))
        .transpose((1, 0))
        .reshape((5, 12))
        .cast(TensorProto.BFLOAT16)
    )
    expected = (x.astype(np.float32) * by).astype(np.float16).T.reshape(5, 12).astype(ml_dtypes.bfloat16)
    again = Recipe.of_tensor(recipe.to_tensor("w"))
    assert again is not None
    np.testing.assert_array_equal(evaluate(again).astype(np.float32), expected.astype(np.float32))
    with pytest.raises(PassError, match="cannot reshape"):
        recipe.reshape((7, 7))


def test_graphsurgeon_keeps_recipes() -> None:
    recipe = keep(RNG.standard_normal((8, 8)).astype(ml_dtypes.bfloat16)).transpose((1, 0))
    model = _model({"w": recipe})
    graph = import_graph(model)
    assert recipe_of(graph.tensors()["w"]) == recipe
    graph.nodes[0].inputs[0] = constant("v", recipe.cast(TensorProto.FLOAT))
    exported = export_graph(graph.cleanup(), model)
    assert [Recipe.of_tensor(t) for t in initializers(exported)] == [recipe.cast(TensorProto.FLOAT)]


def test_save_stores_equal_recipes_once_aligned_and_repeatably(tmp_path: Path) -> None:
    big = keep(RNG.standard_normal((256, 300)).astype(np.float32))
    small = keep(RNG.standard_normal(300).astype(np.float32))
    tiny = keep(RNG.standard_normal(4).astype(np.float32))
    model = _model({"small": small, "a": big, "b": big, "tiny": tiny})
    seen: list[int] = []
    files = save(model, tmp_path / "m.onnx", lambda done, total, name: seen.append(done))
    again = save(model, tmp_path / "n.onnx")
    assert [f.sha256 for f in files][1] == [f.sha256 for f in again][1]
    assert files[1].nbytes < big.nbytes * 1.2
    assert seen == sorted(seen)
    tensors = {t.name: t for t in initializers(onnx.load(tmp_path / "m.onnx", load_external_data=False))}
    offsets = {
        n: int(next(e.value for e in t.external_data if e.key == "offset"))
        for n, t in tensors.items()
        if n != "tiny"
    }
    assert offsets["a"] == offsets["b"]
    assert offsets["a"] % 4096 == 0
    assert tensors["tiny"].raw_data
    assert tiny.nbytes <= INLINE_BYTES
    whole = onnx.load(tmp_path / "m.onnx")
    for tensor in initializers(whole):
        np.testing.assert_array_equal(
            numpy_helper.to_array(tensor),
            evaluate({"small": small, "a": big, "b": big, "tiny": tiny}[tensor.name]),
        )
    assert weight_bytes(load(tmp_path / "m.onnx")) >= 2 * big.nbytes


def test_save_without_room_leaves_nothing(tmp_path: Path) -> None:
    huge = keep(np.broadcast_to(np.float32(1.5), (1, 1))).source
    endless = Recipe(huge, (), TensorProto.FLOAT, (1 << 30, 1 << 18))
    with pytest.raises(PassError, match="no room"):
        save(_model({"w": endless}), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_recipe_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    file.write_bytes(RNG.bytes(4096))
    (tmp_path / "out").mkdir()
    recipe = Recipe.of_source(_raw(file, 1024))
    file.write_bytes(RNG.bytes(100))
    with pytest.raises(PassError, match="cut off"):
        save(_model({"w": recipe}), tmp_path / "out" / "m.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def _raw(file: Path, count: int):
    from passes.weights.recipe import Source

    return Source("raw", str(file), TensorProto.FLOAT, (count,), "w", 0, count * 4)


def test_safetensors_sources_read_what_was_written(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3, 4).bfloat16(), "c": torch.randn(6).half()}
    save_file(tensors, tmp_path / "w.safetensors")
    for name, tensor in tensors.items():
        read = evaluate(Recipe.of_source(safetensors_source(tmp_path / "w.safetensors", name)))
        np.testing.assert_array_equal(read.astype(np.float32), tensor.float().numpy())
    with pytest.raises(PassError, match="no tensor 'd'"):
        safetensors_source(tmp_path / "w.safetensors", "d")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    *_, last = sorted(tensors, key=lambda n: safetensors_source(tmp_path / "w.safetensors", n).offset)
    with pytest.raises(PassError, match="cut off"):
        safetensors_source(tmp_path / "cut.safetensors", last)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "C:\\secret"])
def test_external_data_may_not_leave_the_folder(location: str, tmp_path: Path) -> None:
    model = _model({"w": keep(RNG.standard_normal(2000).astype(np.float32))})
    tensor = model.graph.initializer[0]
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(PassError, match="outside"):
        load(tmp_path / "m.onnx")


def test_load_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="no such file"):
        load(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(RNG.bytes(500))
    with pytest.raises(PassError, match="not an ONNX model"):
        load(tmp_path / "bad.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(PassError, match="not an ONNX model"):
        load(tmp_path / "empty.onnx")


def test_materialize_runs() -> None:
    x = RNG.standard_normal((30, 40)).astype(np.float32)
    model = materialize(_model({"w": keep(x).transpose((1, 0))}))
    np.testing.assert_array_equal(_run(model, {}), x.T)
    assert bytes(to_bytes(x)) == x.tobytes()


def test_models_of_one_folder_share_their_weights(tmp_path: Path) -> None:
    """What both have is stored once; each finds its own again."""
    both = keep(RNG.standard_normal((200, 300)).astype(np.float32))
    left, right = (keep(RNG.standard_normal((64, 100)).astype(np.float32)) for _ in range(2))
    weights = {"m.onnx": {"a": both, "l": left}, "m-other.onnx": {"r": right, "b": both, "c": both}}
    seen: list[tuple[int, int]] = []
    files = save_all(
        {tmp_path / name: _model(given) for name, given in weights.items()},
        lambda done, total, name: seen.append((done, total)),
    )
    assert {f.path.name for f in files} == {"m.onnx", "m-other.onnx", "m.onnx_data"}
    assert {p.name for p in tmp_path.iterdir()} == {f.path.name for f in files}
    whole = both.nbytes + left.nbytes + right.nbytes
    data = next(f for f in files if f.path.name == "m.onnx_data")
    assert whole <= data.nbytes <= whole + 4 * 4096
    assert seen[-1] == (whole, whole)
    for name, given in weights.items():
        for tensor in initializers(onnx.load(tmp_path / name)):
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), evaluate(given[tensor.name]))
    for file in files:
        assert hashlib.sha256(file.path.read_bytes()).hexdigest() == file.sha256


def test_a_model_that_fails_leaves_no_other_behind(tmp_path: Path) -> None:
    good = keep(RNG.standard_normal((200, 300)).astype(np.float32))
    bad = Recipe(
        keep(RNG.standard_normal((3, 3000))).source, (Op("no-such", {}),), TensorProto.FLOAT, (3, 3000)
    )
    with pytest.raises(PassError, match="unknown weight operation 'no-such'"):
        save_all({tmp_path / "a.onnx": _model({"w": good}), tmp_path / "b.onnx": _model({"v": bad})})
    assert not list(tmp_path.glob("*.onnx"))
