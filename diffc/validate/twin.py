"""A model that ONNX Runtime can run on this CPU: the compiled graph itself, or its twin in wider types.

ONNX Runtime's CPU provider has no bfloat16 arithmetic. Such a graph is not skipped: the pass widen-types
derives a twin from it, node for node the same, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from diffc.backends.ort import OrtSession
from passes import Pipeline
from passes.storage import initializers, save

TWIN = "widen-types{source=bfloat16,to=float32}"
Arrays = Mapping[str, npt.NDArray[Any]]


def needs_twin(model: onnx.ModelProto) -> bool:
    """Whether the graph holds a type without arithmetic on ONNX Runtime's CPU provider."""
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    types = {v.type.tensor_type.elem_type for v in values} | {t.data_type for t in initializers(model)}
    return onnx.TensorProto.BFLOAT16 in types


@contextmanager
def cpu_session(model: onnx.ModelProto) -> Iterator[OrtSession]:
    """A CPU session of `model`, whose weights may be recipes; of its float32 twin where that is needed."""
    if needs_twin(model):
        model = Pipeline.parse(TWIN).run(model).model
    with TemporaryDirectory(prefix="diffc-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        with OrtSession(path) as session:
            yield session


def feed(model: onnx.ModelProto, values: Arrays) -> dict[str, npt.NDArray[Any]]:
    """`values` in the types that the CPU session of `model` takes: bfloat16 widened to float32."""
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    wide = needs_twin(model)
    out = {}
    for name, elem_type in types.items():
        narrow = elem_type == onnx.TensorProto.BFLOAT16 and wide
        dtype = np.float32 if narrow else onnx.helper.tensor_dtype_to_np_dtype(elem_type)
        out[name] = values[name].astype(dtype)
    return out
