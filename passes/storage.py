"""Loading models with their weights as recipes, and the one writer that computes and streams them to disk.

The writer holds one tensor at a time. Files appear under their final names only when complete.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import TensorProto

from passes.base import PassError
from passes.kernels import evaluate, to_bytes
from passes.sources import keep
from passes.weights import Recipe, Source

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the .onnx file: parsers and shape inference read their values."""
_PAGE, _LINE = 4096, 64  # alignment of large and small tensors: mappable pages, cache lines
_CHUNK = 1 << 24

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the tensor just written."""


@dataclass(frozen=True)
class SavedFile:
    """A file as it was written: path, size in bytes and SHA-256."""

    path: Path
    nbytes: int
    sha256: str


def initializers(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every initializer of the main graph and its subgraphs."""
    yield from _graph_initializers(model.graph)


def _graph_initializers(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graph_initializers(attribute.g)
            for sub in attribute.graphs:
                yield from _graph_initializers(sub)


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
            tensor.CopyFrom(_inline(tensor.name, recipe))
    return copy


def _inline(name: str, recipe: Recipe) -> TensorProto:
    data = bytes(to_bytes(evaluate(recipe)))
    return TensorProto(name=name, data_type=recipe.dtype, dims=recipe.shape, raw_data=data)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers as they will be stored, without alignment."""
    recipes = (Recipe.of_tensor(t) or t.ByteSize() for t in initializers(model))
    return sum(r.nbytes if isinstance(r, Recipe) else r for r in recipes)


def save(model: onnx.ModelProto, path: Path, progress: Progress | None = None) -> list[SavedFile]:
    """Write `path` and, for weights over 1 KiB, `path` + "_data", one tensor in memory at a time.

    Equal recipes are stored once. Raises PassError when the disk has no room; then nothing is left behind.
    """
    return save_all({path: model}, progress)


def save_all(models: Mapping[Path, onnx.ModelProto], progress: Progress | None = None) -> list[SavedFile]:
    """Write several models of one folder that share one file of weights: that of the first, + "_data"."""
    copies = {path: _copy(model) for path, model in models.items()}
    first = next(iter(copies))
    total = sum(recipe.nbytes for recipe in _distinct(copies.values()).values())
    _check_room(first.parent, total)
    data = first.with_name(first.name + "_data")
    finals = [*copies, data]
    partial = {final: final.with_name(final.name + ".partial") for final in finals}
    try:
        weights = _stream(copies.values(), partial[data], data.name, total, progress)
        saved = [
            _write(partial[path], model.SerializeToString(deterministic=True))
            for path, model in copies.items()
        ]
        saved += [weights] if weights else []
        named = list(zip(saved, finals, strict=False))
        for written, final in reversed(named):  # what names the data comes last
            written.path.replace(final)
        return [SavedFile(final, f.nbytes, f.sha256) for f, final in named]
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PassError(f"no space left on {first.parent}: {total} bytes are needed") from error
        raise
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)


def _distinct(models: Iterable[onnx.ModelProto]) -> dict[str, Recipe]:
    """Every recipe that is written to the file of weights, by its text."""
    recipes = (Recipe.of_tensor(tensor) for model in models for tensor in initializers(model))
    return {str(r.to_json()): r for r in recipes if r is not None and r.nbytes > INLINE_BYTES}


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _check_room(folder: Path, needed: int) -> None:
    if not folder.is_dir():
        raise PassError(f"no such folder: {folder}")
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + (1 << 20):
        raise PassError(
            f"no room on {folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )


def _stream(
    models: Iterable[onnx.ModelProto], partial: Path, name: str, total: int, progress: Progress | None
) -> SavedFile | None:
    """Compute every recipe into `partial`, pointing the initializers of `models` at it as file `name`."""
    places: dict[str, tuple[int, int]] = {}
    digest, done = hashlib.sha256(), 0
    with partial.open("wb") as file:
        for tensor in (tensor for model in models for tensor in initializers(model)):
            recipe = Recipe.of_tensor(tensor)
            if recipe is None:
                continue
            if recipe.nbytes <= INLINE_BYTES:
                tensor.CopyFrom(_inline(tensor.name, recipe))
                continue
            key = str(recipe.to_json())
            if key not in places:
                view = to_bytes(evaluate(recipe))
                alignment = _PAGE if view.nbytes >= 1 << 16 else _LINE
                gap = bytes(-file.tell() % alignment)
                chunks: list[bytes | memoryview] = [
                    view[i : i + _CHUNK] for i in range(0, view.nbytes, _CHUNK)
                ]
                for chunk in (gap, *chunks):
                    file.write(chunk)
                    digest.update(chunk)
                places[key] = (file.tell() - view.nbytes, view.nbytes)
                done += recipe.nbytes
                if progress:
                    progress(done, total, tensor.name)
            _point(tensor, name, *places[key])
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return SavedFile(partial, size, digest.hexdigest()) if size else None


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _write(partial: Path, data: bytes) -> SavedFile:
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return SavedFile(partial, len(data), hashlib.sha256(data).hexdigest())
