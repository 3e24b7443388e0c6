"""Running compiled graphs on ONNX Runtime's CPU provider: the graph itself, or its twin in float32.

That provider has no bfloat16 arithmetic, and 16-bit rounding hides small faults behind quantizers that flip.
Neither is a reason to skip a check: passes derive a twin, node for node the same graph, that computes in
float32 with the same stored weights and the same scales.
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

TWIN = Pipeline.parse("fold-weight-qdq{deep=true},widen-types{source=bfloat16},widen-types{source=float16}")
"""Weights are folded first: ONNX Runtime's QuantizeLinear and ModelOpt put exact ties on different sides."""
SMOOTH = Pipeline.parse("drop-rounding")
EMULATED = "emulate-fp4,add-trt-functions"
"""What ONNX Runtime's CPU provider lacks: FP4 becomes FP8, TensorRT's operators get function bodies."""
FP4 = onnx.TensorProto.FLOAT4E2M1
Arrays = Mapping[str, npt.NDArray[Any]]


def float32_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with float32 in the place of the 16-bit floats; quantized types stay as stored."""
    return TWIN.run(model, check=lambda before, after, step: "").model


def smooth_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 twin with activations scaled and saturated by their quantizers, but not rounded.

    Rounding makes a deep graph chaotic: the last bit of a float32 sum decides on a step of 6 % (FP8), and
    that on many more. Without it two equal graphs agree to float32 rounding, whatever their depth.
    """
    return SMOOTH.run(float32_twin(model), check=lambda before, after, step: "").model


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph for a runtime without FP4 and without TensorRT's operators."""
    if all(node.domain != "trt" for node in model.graph.node) and FP4 not in element_types(model):
        return model
    return Pipeline.parse(EMULATED).run(model, check=lambda before, after, step: "").model


def runs_on_cpu(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime's CPU provider has arithmetic for every type of the graph itself."""
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
