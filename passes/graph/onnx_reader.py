"""The one reader of .onnx files: what only diffc itself may write into a graph in memory is never taken from a file.

A recipe (`passes.weights.recipe`) names any file of this machine. In a graph that diffc made that is the point; in a
file that somebody sent it would be a way to read what the author of the file may not. So a file that holds a recipe is
refused, wherever in the model the recipe lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto

from passes.base import PassError
from passes.files.bounded import regular
from passes.files.contained import contained
from passes.graph.onnx_fields import check_fields
from passes.weights.recipe import LOCATION, RECIPE

LARGEST = (1 << 31) - 1
"""Bytes of a protobuf message, by its own format."""
_HOLDERS = frozenset(
    {"GraphProto", "NodeProto", "AttributeProto", "TensorProto", "SparseTensorProto", "FunctionProto"}
    | {"TrainingInfoProto"}
)
"""The messages of ONNX in which a tensor can lie."""


def read_proto(path: Path) -> ModelProto:
    """The model in `path`; its external data stays where it is, checked to lie in the model's folder.

    Raises PassError for a file that is missing or damaged, for one that holds recipes, and for external data outside
    the model's folder.
    """
    if regular(path).st_size > LARGEST:
        raise PassError(
            f"{path} has more than 2 GB, and no ONNX model has. Fix: keep its weights in a file beside it"
        )
    try:
        model = onnx.load(path, load_external_data=False, format="protobuf")
    except OSError as error:
        raise PassError(
            f"cannot read {path}: {error.strerror}. Fix: check the file and its permissions"
        ) from error
    except Exception as error:
        said = f"{path} is not an ONNX model, or is cut off ({type(error).__name__})"
        raise PassError(f"{said}. Fix: export or copy it again") from error
    for tensor in all_tensors(model):
        if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
            _refuse_recipe(tensor, path)
        if tensor.data_location == TensorProto.EXTERNAL:
            external_file(path, tensor)
    check_fields(model, path)
    return model


def all_tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor below a model, graph, function, node or attribute: initializers, attributes, sparse ones, all."""
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.name not in _HOLDERS:
            continue
        for part in (value,) if hasattr(value, "ListFields") else value:
            if isinstance(part, TensorProto):
                yield part
            else:
                yield from all_tensors(part)


def _refuse_recipe(tensor: TensorProto, path: Path) -> None:
    keys = [entry.key for entry in tensor.external_data]
    if RECIPE in keys or any(entry.value == LOCATION for entry in tensor.external_data):
        raise PassError(
            f"{path}: tensor {tensor.name!r} is a recipe of diffc, which names files of the machine that made it and is"
            " not read from a file. Fix: save the model with passes.storage.save or diffc opt, which write the values"
        )
    if len(set(keys)) != len(keys):
        raise PassError(
            f"{path}: tensor {tensor.name!r} says twice where its data lies. Fix: export the model again"
        )


def external_file(path: Path, tensor: TensorProto) -> Path:
    """The file that holds the external data of `tensor`, of the model in `path`; it need not exist.

    It lies beside the model. Where `path` is a link, that is beside the link, or else beside the file that it leads to.
    Raises PassError when it lies outside.
    """
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    what = f"the data of tensor {tensor.name!r}"
    folders = dict.fromkeys((path.absolute().parent, path.resolve().parent))
    files = [contained(folder, location, what=what, hub=True) for folder in folders]
    return next((file for file in files if file.is_file()), files[0])
