"""Recipes are diffc's own notation in memory: from a file they are refused, wherever in the model they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from diffc.backends.onnx_graph import read
from diffc.cli.main import run
from diffc.errors import DiffcError
from diffc.frontend.onnx_file import read_model
from passes.base import PassError
from passes.graph.onnx_reader import all_tensors, read_proto
from passes.storage import load, save
from passes.weights.recipe import Recipe, Source

SECRET = np.arange(4096, dtype=np.float32)


def stolen(folder: Path) -> TensorProto:
    """A tensor whose recipe reads a file that is not the model's."""
    file = folder / "private.bin"
    file.write_bytes(SECRET.tobytes())
    source = Source("raw", str(file), TensorProto.FLOAT, (64, 64), "W", 0, SECRET.nbytes)
    return Recipe.of_source(source).to_tensor("W")


def model(*nodes: onnx.NodeProto, weights: tuple[TensorProto, ...] = ()) -> ModelProto:
    value = helper.make_tensor_value_info
    x, y = value("x", TensorProto.FLOAT, ["n", 64]), value("y", TensorProto.FLOAT, ["n", 64])
    graph = helper.make_graph([*nodes, helper.make_node("MatMul", ["x", "W"], ["y"])], "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def _initializer(tensor: TensorProto) -> ModelProto:
    return model(weights=(tensor,))


def _constant(tensor: TensorProto) -> ModelProto:
    return model(helper.make_node("Constant", [], ["W"], value=tensor))


def _list(tensor: TensorProto) -> ModelProto:
    node = helper.make_node("Odd", [], ["W"], domain="com.microsoft")
    node.attribute.append(helper.make_attribute("tensors", [tensor]))
    return model(node)


def _subgraph(tensor: TensorProto) -> ModelProto:
    output = helper.make_tensor_value_info("W", TensorProto.FLOAT, [64, 64])
    body = helper.make_graph([], "body", [], [output], [tensor])
    condition = numpy_helper.from_array(np.array(True), "c")
    node = helper.make_node("If", ["c"], ["W"], then_branch=body, else_branch=body)
    return model(node, weights=(condition,))


def _function(tensor: TensorProto) -> ModelProto:
    made = model(helper.make_node("Give", [], ["W"], domain="local"))
    body = [helper.make_node("Constant", [], ["w"], value=tensor)]
    made.functions.append(
        helper.make_function("local", "Give", [], ["w"], body, [helper.make_opsetid("", 23)])
    )
    made.opset_import.append(helper.make_opsetid("local", 1))
    return made


def _sparse(tensor: TensorProto) -> ModelProto:
    made = model()
    sparse = made.graph.sparse_initializer.add(dims=[64, 64])
    sparse.values.CopyFrom(tensor)
    sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(4096), "i"))
    return made


def _training(tensor: TensorProto) -> ModelProto:
    made = model(weights=(numpy_helper.from_array(np.eye(64, dtype=np.float32), "W"),))
    made.training_info.add().initialization.initializer.append(tensor)
    return made


PLACES = (_initializer, _constant, _list, _subgraph, _function, _sparse, _training)
READERS = (load, read_model, read, read_proto)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_takes_one_from_any_place(
    place: Callable[[TensorProto], ModelProto], reader: Callable[[Path], object], tmp_path: Path
) -> None:
    made = place(stolen(tmp_path))
    assert any(Recipe.of_tensor(tensor) for tensor in all_tensors(made))
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises((PassError, DiffcError), match=r"m\.onnx: tensor 'W' is a recipe of diffc.*Fix: "):
        reader(tmp_path / "m.onnx")


@pytest.mark.parametrize("command", ["import", "compile", "opt"])
def test_no_command_writes_a_file_that_it_was_not_given(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.onnx").write_bytes(_initializer(stolen(tmp_path)).SerializeToString())
    more = ["-p", "remove-unused"] if command == "opt" else []
    assert run([command, str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out"), *more]) == 1
    assert "is a recipe of diffc" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "private.bin"}


@pytest.mark.parametrize("entries", [{"recipe": "{}"}, {"location": "diffc-recipe"}])
@pytest.mark.parametrize("external", [True, False])
def test_half_of_the_notation_is_refused_as_well(
    entries: dict[str, str], external: bool, tmp_path: Path
) -> None:
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[64, 64], data_location=int(external))
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx").write_bytes(_initializer(tensor).SerializeToString())
    with pytest.raises(PassError, match="is a recipe of diffc"):
        load(tmp_path / "m.onnx")


def test_one_key_twice_is_refused_since_readers_differ_on_which_counts(tmp_path: Path) -> None:
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[64, 64], data_location=1)
    for location in ("inside", "../outside"):
        tensor.external_data.add(key="location", value=location)
    (tmp_path / "m.onnx").write_bytes(_initializer(tensor).SerializeToString())
    with pytest.raises(PassError, match="says twice where its data lies"):
        load(tmp_path / "m.onnx")


def _external(folder: Path) -> TensorProto:
    (folder / "w.bin").write_bytes(SECRET.tobytes())
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[64, 64], data_location=1)
    tensor.external_data.add(key="location", value="w.bin")
    return tensor


@pytest.mark.parametrize("place", [_initializer, _constant, _subgraph, _function])
def test_external_data_is_the_models_own_and_not_that_of_the_current_folder(
    place: Callable[[TensorProto], ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "w.bin").write_bytes(b"\0" * SECRET.nbytes)
    (tmp_path / "model" / "m.onnx").write_bytes(place(_external(tmp_path / "model")).SerializeToString())
    monkeypatch.chdir(tmp_path / "here")
    save(load(tmp_path / "model" / "m.onnx"), tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    held = [numpy_helper.to_array(t) for t in all_tensors(written) if list(t.dims) == [64, 64]]
    assert held
    assert all((array.ravel() == SECRET).all() for array in held)


def test_graphs_in_memory_keep_their_recipes(tmp_path: Path) -> None:
    """As passes hand them on, and as `save` writes them: with their values."""
    made = _initializer(stolen(tmp_path))
    save(made, tmp_path / "out.onnx")
    written = load(tmp_path / "out.onnx")
    (tensor,) = written.graph.initializer
    entries = {e.key: e.value for e in tensor.external_data}
    assert json.loads(entries["recipe"])["source"]["path"] == str((tmp_path / "out.onnx_data").resolve())
    assert Recipe.of_tensor(made.graph.initializer[0]) is not None
