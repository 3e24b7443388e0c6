"""A model whose outputs do not depend on its inputs is a failure, whatever it is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffc.errors import MismatchError
from diffc.models.spec import Shape
from diffc.validate.float32 import cpu_session
from diffc.validate.outputs import require_alive
from diffc.validate.reports import UNROUNDED, ShapeReport
from diffc.validate.streamed import validate_streamed


def network(scale: float) -> onnx.ModelProto:
    """y = relu(x W * scale) + b."""
    rng = np.random.default_rng(4)
    value = helper.make_tensor_value_info
    weights = [
        numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), "W"),
        numpy_helper.from_array(np.float32(scale), "s"),
        numpy_helper.from_array(rng.normal(size=8).astype(np.float32), "b"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["p"], "p"),
        helper.make_node("Mul", ["p", "s"], ["q"], "q"),
        helper.make_node("Add", ["q", "b"], ["y"], "y"),
    ]
    x, y = value("x", TensorProto.FLOAT, ["n", 8]), value("y", TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_outputs_that_are_the_same_whatever_goes_in(scale: float) -> None:
    model = network(scale)
    inputs = {"x": np.random.default_rng(6).normal(size=(3, 8)).astype(np.float32)}
    with cpu_session(model) as session:
        result = dict(session.run(inputs))
        report = ShapeReport(Shape(1, 64, 64, 8), UNROUNDED, [], inputs, result, result)
        if scale:
            require_alive(model, session, report)
        else:
            with pytest.raises(MismatchError, match="the same whatever goes in"):
                require_alive(model, session, report)


class Layer:
    """Torch's side of `network`, with what `validate_streamed` asks of a reference."""

    quantized = False

    def __init__(self, scale: float):
        self.model, self._scale = torch.nn.Identity(), scale

    def outputs(self, shape: Shape, seed: int, *, unrounded: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        assert not unrounded
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in network(self._scale).graph.initializer]
        x = torch.randn(shape.batch, 8, generator=torch.Generator().manual_seed(seed))
        weight, scale, bias = (torch.tensor(array) for array in arrays)
        return {"x": x}, {"y": (self.model(x) @ weight * scale + bias).numpy()}


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_layer_by_layer_as_well(scale: float) -> None:
    reference: Any = Layer(scale)
    if scale:
        (report,) = validate_streamed(
            network(scale), reference, format="none", seed=3, shape=Shape(2, 64, 64, 8)
        )
        assert report.passed
    else:
        with pytest.raises(MismatchError, match="the same whatever goes in"):
            validate_streamed(network(scale), reference, format="none", seed=3, shape=Shape(2, 64, 64, 8))
