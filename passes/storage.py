"""Loading models with their weights as recipes; writing them is `passes.weights.writer`."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import TensorProto

from passes.base import PassError
from passes.weights.initializers import INLINE_BYTES, initializers, inline
from passes.weights.recipe import Recipe, Source
from passes.weights.sources import keep
from passes.weights.writer import Progress, SavedFile, save, save_all

__all__ = [
    "INLINE_BYTES",
    "Progress",
    "SavedFile",
    "initializers",
    "load",
    "make_recipe",
    "materialize",
    "save",
    "save_all",
    "stored_bytes",
    "weight_bytes",
]


def load(path: Path) -> onnx.ModelProto:
    """Read an .onnx file; weights beside it or large ones inside it become recipes.

    Raises PassError for a missing or corrupt file, and for external data outside the model's folder.
    """
    if not path.is_file():
        raise PassError(f"no such file: {path}")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise PassError(f"{path} is not an ONNX model, or is cut off ({type(error).__name__})") from error
    if not model.graph.node and not model.graph.output:
        raise PassError(f"{path} holds no graph: not an ONNX model")
    for tensor in initializers(model):
        make_recipe(tensor, path.resolve().parent)
    return model


def make_recipe(tensor: TensorProto, folder: Path) -> None:
    """Turn a tensor with external data in `folder`, or a large one, into a recipe; small ones stay."""
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor.CopyFrom(_external_recipe(tensor, folder).to_tensor(tensor.name))
    elif tensor.ByteSize() > INLINE_BYTES * 4:
        tensor.CopyFrom(keep(onnx.numpy_helper.to_array(tensor)).to_tensor(tensor.name))


def _external_recipe(tensor: TensorProto, folder: Path) -> Recipe:
    recipe = Recipe.of_tensor(tensor)
    if recipe is not None:
        return recipe
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    rooted = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive
    file = (folder / location).resolve()
    if not location or rooted or not file.is_relative_to(folder):
        raise PassError(f"tensor {tensor.name!r} points outside the model's folder: {location!r}")
    shape = tuple(tensor.dims)
    plain = Recipe.of_source(Source("raw", str(file), tensor.data_type, shape, tensor.name))
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", plain.nbytes))
    if not file.is_file() or file.stat().st_size < offset + length or length != plain.nbytes:
        raise PassError(f"tensor {tensor.name!r}: {file} is missing, cut off, or of another size")
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
