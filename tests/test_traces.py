"""A kept trace serves every model of its structure: with the weights of that model, and byte for byte its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from diffc.models.sources.locate import locate
from passes.weights.recipe import Recipe
from tests.traces import key_of, with_weights

ONE_AND_A_HALF = np.array([[1.5]], np.float32)


def weights_of(model: onnx.ModelProto) -> dict[str, Recipe]:
    found = {tensor.name: Recipe.of_tensor(tensor) for tensor in model.graph.initializer}
    return {name: recipe for name, recipe in found.items() if recipe is not None}


def test_with_its_own_weights_it_is_the_same(traced: onnx.ModelProto) -> None:
    again = with_weights(traced, locate("tiny-sd3"), None)
    assert again.SerializeToString(deterministic=True) == traced.SerializeToString(deterministic=True)


def test_the_weights_are_those_of_the_model_that_asks(traced: onnx.ModelProto) -> None:
    source = locate("tiny-sd3")
    name = "transformer_blocks.0.attn.to_q.weight"
    changed = {**source.weights, name: source.weights[name].multiply(Recipe.of_array(ONE_AND_A_HALF))}
    other = replace(source, weights=changed)
    before, after = weights_of(traced), weights_of(with_weights(traced, other, None))
    assert [key for key in before if before[key] != after[key]] == [name]
    assert after[name] == changed[name].cast(before[name].dtype)
    assert key_of(other, "float16", None) == key_of(source, "float16", None)


def test_another_structure_has_another_trace() -> None:
    source = locate("tiny-sd3")
    keys = [
        key_of(source, "float16", None),
        key_of(source, "float32", None),
        key_of(replace(source, config={**source.config, "num_layers": 2}), "float16", None),
        key_of(replace(source, exact=frozenset({"pos_embed.proj.bias"})), "float16", None),
        key_of(locate("tiny-flux"), "float16", None),
    ]
    assert len(set(keys)) == len(keys)
