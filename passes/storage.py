"""Loading models with their weights as recipes; writing them is `passes.weights.writer`."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx import TensorProto

from passes.base import PassError
from passes.graph.onnx_reader import all_tensors, external_file, read_proto
from passes.weights.initializers import INLINE_BYTES, initializers, inline
from passes.weights.recipe import Recipe, Source
from passes.weights.sources import keep
from passes.weights.writer import Progress, SavedFile, save, save_all

__all__ = [
    "INLINE_BYTES",
    "Progress",
    "SavedFile",
    "bind_weights",
    "initializers",
    "load",
    "make_recipe",
    "materialize",
    "read_graph",
    "save",
    "save_all",
    "stored_bytes",
    "weight_bytes",
]


def load(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read an .onnx file; weights beside it or large ones inside it become recipes.

    Raises PassError for a missing or corrupt file, for one that holds recipes, and for external data outside the
    model's folder.
    """
    file = Path(path)
    model = read_graph(file)
    bind_weights(model, file)
    return model


def read_graph(path: Path) -> onnx.ModelProto:
    """The model in `path` as `graph/onnx_reader.py` reads it, no weight looked at. Raises PassError without a graph."""
    model = read_proto(path)
    if not model.graph.node and not model.graph.output:
        raise PassError(f"{path} holds no graph: not an ONNX model. Fix: export or copy it again")
    return model


def bind_weights(model: onnx.ModelProto, path: Path) -> None:
    """Weights of the model that was read from `path` become recipes; other external data comes into the graph.

    What is a recipe already stays. Raises PassError for external data that is missing, cut off or outside the folder.
    """
    for tensor in initializers(model):
        make_recipe(tensor, path)
    for tensor in all_tensors(model):  # in attributes, functions, sparse tensors, where nothing reads recipes
        if tensor.data_location == TensorProto.EXTERNAL and Recipe.of_tensor(tensor) is None:
            tensor.CopyFrom(inline(tensor.name, _external_recipe(tensor, path)))


def make_recipe(tensor: TensorProto, path: Path) -> None:
    """Turn a tensor of the model in `path` with external data, or a large one, into a recipe; others stay.

    Raises PassError as `bind_weights` does.
    """
    if Recipe.of_tensor(tensor) is not None:  # made here: `read_proto` lets none in
        return
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor.CopyFrom(_external_recipe(tensor, path).to_tensor(tensor.name))
    elif tensor.ByteSize() > INLINE_BYTES * 4:
        tensor.CopyFrom(keep(onnx.numpy_helper.to_array(tensor)).to_tensor(tensor.name))


def _external_recipe(tensor: TensorProto, path: Path) -> Recipe:
    entries = {e.key: e.value for e in tensor.external_data}
    file = external_file(path, tensor).resolve()
    shape = tuple(tensor.dims)
    plain = Recipe.of_source(Source("raw", str(file), tensor.data_type, shape, tensor.name))
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", plain.nbytes))
    if not file.is_file() or file.stat().st_size < offset + length or length != plain.nbytes:
        raise PassError(
            f"tensor {tensor.name!r}: {file} is missing, cut off, or of another size"
            ". Fix: copy the model again, with its weights beside it"
        )
    return Recipe.of_source(Source("raw", str(file), tensor.data_type, shape, tensor.name, offset, length))


def materialize(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every weight computed and inside the protobuf (models below 2 GB: checks and tests)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in initializers(copy):
        recipe = Recipe.of_tensor(tensor)
        if recipe is not None:
            tensor.CopyFrom(inline(tensor.name, recipe))
    return copy


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers as they will be stored, without alignment."""
    return sum(stored_bytes(tensor) for tensor in initializers(model))


def stored_bytes(tensor: TensorProto) -> int:
    """Bytes of an initializer as it will be stored, whether it is a recipe or holds its values."""
    recipe = Recipe.of_tensor(tensor)
    return tensor.ByteSize() if recipe is None else recipe.nbytes
