"""Small ONNX networks for the probes of `tools.compat`: a graph in the making, and random constants of any type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

F32, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
FP8, E5M2, E8M0, FP4 = (
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E8M0,
    TensorProto.FLOAT4E2M1,
)
INT4, UINT4, INT8, UINT8 = TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8
INT32, INT64, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL

NAMES = {F32: "float32", F16: "float16", BF16: "bfloat16"}
_WHOLE = {INT4: (-8, 8), UINT4: (0, 16), INT8: (-127, 128), UINT8: (0, 256), INT32: (-9, 9), INT64: (0, 8)}


def random_array(rng: np.random.Generator, element_type: int, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Random values over the range that the type is used in: floats normal, integers over their bits."""
    dtype = helper.tensor_dtype_to_np_dtype(element_type)
    if element_type == BOOL:
        return rng.random(shape) < 0.7
    if element_type == E8M0:
        return np.exp2(rng.integers(-8, -2, shape)).astype(dtype)
    if element_type in _WHOLE:
        return rng.integers(*_WHOLE[element_type], shape).astype(dtype)
    spread = {FP8: 30.0, E5M2: 30.0, FP4: 2.5}.get(element_type, 0.5)
    return np.asarray(rng.standard_normal(shape) * spread).astype(dtype)


class Net:
    """A graph in the making. What adds something returns the name of what it added; outputs are listed last."""

    def __init__(self, opset: int = 23) -> None:
        self.opset, self.rng = opset, np.random.default_rng(len("compat"))
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: list[TensorProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.ranges: dict[str, dict[str, Sequence[int]]] = {}

    def input(self, element_type: int, *dims: int | str, low: int = 1, usual: int = 2, high: int = 4) -> str:
        """A graph input; dims that are strings are dynamic, `low` to `high`."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, element_type, dims))
        if any(isinstance(d, str) for d in dims):
            sizes = {"min": low, "opt": usual, "max": high}
            self.ranges[name] = {
                kind: [size if isinstance(d, str) else d for d in dims] for kind, size in sizes.items()
            }
        return name

    def weight(self, element_type: int, *dims: int) -> str:
        """A constant of random values."""
        return self.constant(random_array(self.rng, element_type, dims))

    def scale(self, element_type: int, *dims: int) -> str:
        """A constant of positive values, 0.01 to 0.05 (FLOAT8E4M3FN: 0.5 to 4, as NVFP4's block scales)."""
        low, high = (0.5, 4.0) if element_type == FP8 else (0.01, 0.05)
        values = self.rng.uniform(low, high, dims)
        return self.constant(np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(element_type)))

    def zeros(self, element_type: int, *dims: int) -> str:
        """A constant of zeros: a zero point, or a bias that a probe needs only for its type."""
        return self.constant(np.zeros(dims, helper.tensor_dtype_to_np_dtype(element_type)))

    def constant(self, values: Any) -> str:
        """A constant of these values."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output."""
        return self.ops(1, op_type, *inputs, domain=domain, **attributes)[0]

    def ops(self, outputs: int, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> list[str]:
        """A node with several outputs."""
        index = len(self.nodes)
        names = [f"v{index}_{i}" if outputs > 1 else f"v{index}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(op_type, inputs, names, f"{op_type}_{index}", domain=domain, **attributes)
        )
        return names

    def output(self, name: str, element_type: int) -> None:
        """Make a value a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, element_type, None))

    def model(self) -> ModelProto:
        """The finished model: IR version 11, an opset import for each domain in use."""
        graph = helper.make_graph(
            self.nodes, "probe", self.inputs, self.outputs, self.weights, value_info=self.values
        )
        domains = {n.domain for n in self.nodes if n.domain} | {f.domain for f in self.functions}
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
        return helper.make_model(graph, opset_imports=imports, ir_version=11, functions=self.functions)
