"""Running compiled graphs on ONNX Runtime's CPU provider: the graph itself, or a copy of it in float32.

That provider has no bfloat16 arithmetic, and in 16-bit types small faults disappear among the quantizer steps that
roundings flip. So passes derive a copy, node for node the same graph with the same stored weights and scales, that
computes in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy.typing as npt
import onnx

from diffc.backends.onnx_graph import element_types
from diffc.backends.onnxruntime.arrays import OrtSession
from passes import Pipeline
from passes.storage import save

# Weights are folded first: on exact ties, ONNX Runtime's QuantizeLinear and ModelOpt take different sides.
_FLOAT32 = Pipeline.parse(
    "fold-weight-qdq{deep=true},widen-types{source=bfloat16},widen-types{source=float16}"
)
_UNROUNDED = Pipeline([*_FLOAT32.passes, *Pipeline.parse("drop-rounding").passes])
# ONNX Runtime's CPU provider lacks FP4, which becomes FP8, and TensorRT's operators, which get function bodies.
_EMULATED = "emulate-fp4,add-trt-functions"
_FP4 = onnx.TensorProto.FLOAT4E2M1
Arrays = Mapping[str, npt.NDArray[Any]]


def float32_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with float32 in the place of the 16-bit floats; quantized types stay as stored."""
    return _unchecked(_FLOAT32, model)


def unrounded_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 copy whose activation quantizers scale and saturate, and do not round.

    Rounding makes a deep graph chaotic: the last bit of a float32 sum decides on a step of 6 % (FP8), and that step
    on many more. Without it, two equal graphs agree to float32 rounding, whatever their depth.
    """
    return _unchecked(_UNROUNDED, model)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph for a runtime that has neither FP4 nor TensorRT's operators."""
    if all(node.domain != "trt" for node in model.graph.node) and _FP4 not in element_types(model):
        return model
    return _unchecked(Pipeline.parse(_EMULATED), model)


def _unchecked(passes: Pipeline, model: onnx.ModelProto) -> onnx.ModelProto:
    return passes.run(model, check=lambda before, after, step: "").model


def runs_on_cpu(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime's CPU provider has arithmetic for every type of the graph."""
    return onnx.TensorProto.BFLOAT16 not in element_types(model)


@contextmanager
def cpu_session(model: onnx.ModelProto) -> Iterator[OrtSession]:
    """A CPU session of `model`, whose weights may be recipes; it computes exactly what the graph says."""
    with TemporaryDirectory(prefix="diffc-") as folder:
        path = Path(folder) / "model.onnx"
        save(emulated(model), path)
        with OrtSession(path, exact=True) as session:
            yield session


def feed(model: onnx.ModelProto, values: Arrays) -> dict[str, npt.NDArray[Any]]:
    """`values` in the types of the inputs of `model`."""
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    return {name: values[name].astype(onnx.helper.tensor_dtype_to_np_dtype(t)) for name, t in types.items()}
