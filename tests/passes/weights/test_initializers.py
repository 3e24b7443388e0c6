"""The initializers of a model, those of bodies too, and a recipe's values inside the model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from passes.weights.evaluate import evaluate
from passes.weights.initializers import initializers, inline
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import model


def held(name: str) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.arange(3, dtype=np.float32), name)


def test_bodies_have_initializers_too() -> None:
    text = """g (float[3] x, bool c) => (float[3] y) {
        y = If (c) <
            then_branch = t () => (float[3] p) { p = Neg(x) }, else_branch = e () => (float[3] q) { q = Abs(x) }
        >
    }"""
    made = model(text, {"outer": np.ones(2)})
    branch = made.graph.node[0].attribute[0].g
    branch.initializer.append(held("inner"))
    deeper = helper.make_graph([], "deep", [], [], [held("deepest")])
    branch.node[0].attribute.append(helper.make_attribute("several", [deeper]))
    assert [tensor.name for tensor in initializers(made)] == ["outer", "inner", "deepest"]


@pytest.mark.parametrize("to", [TensorProto.FLOAT16, TensorProto.INT4, TensorProto.FLOAT8E4M3FN])
def test_values_inside_the_model_are_those_of_the_recipe(to: int) -> None:
    recipe = Recipe.of_array(np.linspace(-3, 3, 35, dtype=np.float32).reshape(5, 7))
    scale = Recipe.of_array(np.array(0.5, np.float32))
    recipe = recipe.cast(to) if to == TensorProto.FLOAT16 else recipe.quantize(scale, to)
    tensor = inline("w", recipe)
    assert (tensor.name, tensor.data_type, list(tensor.dims)) == ("w", to, [5, 7])
    read = onnx.numpy_helper.to_array(tensor)
    assert np.array_equal(read.astype(np.float32), evaluate(recipe).astype(np.float32))
