"""The first look of native code at a stranger's .onnx file, in a process apart: whether ONNX follows and comes back."""

from __future__ import annotations

import onnx
from onnx import ModelProto

from diffc.apart import Ended, run_apart
from diffc.errors import DiffcError
from passes.graph.inference import shell

_FIX = "export the model again, or get it from a source that you trust"


def first_look(model: ModelProto, where: object) -> None:
    """Raise DiffcError when ONNX's type inference rejects the model, crashes, or takes more than such a file may.

    `model` holds its large weights as recipes. A file of a kilobyte may take a second of one core and 256 MB.
    """
    size = model.ByteSize()
    try:
        said = run_apart(_infer, model, seconds=1 + size / 20_000, memory=(256 << 20) + 50 * size)
    except Ended as error:
        raise DiffcError(f"{where}: ONNX's type inference was stopped: {error.reason}", fix=_FIX) from error
    if said:
        raise DiffcError(f"{where}: ONNX cannot follow the model: {said}", fix=_FIX)


def _infer(model: ModelProto) -> str:
    """What ONNX's inference says against a model; empty when it follows it."""
    try:
        onnx.shape_inference.infer_shapes(shell(model), data_prop=True)
    except MemoryError:
        raise
    except Exception as error:  # of classes without a common one
        return f"{type(error).__name__}: {error}"
    return ""
