"""What is kept between compiles serves those that are equal in what it depends on, and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from diffc.models.sources.locate import locate
from diffc.validate.passes import NumericCheck
from passes.weights.recipe import Recipe
from tests.conftest import made_once
from tests.networks import FP32, make, value
from tests.traces import key_of, remembered_outputs, with_weights

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


def scaling(weight: float, name: str = "w") -> onnx.ModelProto:
    """y = x * weight, its node called `name`."""
    node = onnx.helper.make_node("Mul", ["x", "w"], ["y"], name)
    ends = [value("x", FP32, [2])], [value("y", FP32, [2])]
    return make([node], *ends, [onnx.numpy_helper.from_array(np.float32([weight]), "w")])


def test_outputs_are_kept_of_an_equal_graph_and_equal_inputs(tmp_path: Path) -> None:
    run: list[onnx.ModelProto] = []

    def outputs(check: NumericCheck, model: onnx.ModelProto) -> Any:
        run.append(model)
        (weight,) = onnx.numpy_helper.to_array(model.graph.initializer[0])
        return [{"y": values["x"] * weight} for values in check._inputs()]

    found = remembered_outputs(outputs, tmp_path / "shared" / "outputs", made_once)
    check, other = (NumericCheck(lambda x=x: [{"x": np.float32([1, x])}]) for x in (2, 3))
    cases = [(check, scaling(5), 1), (check, scaling(5), 1), (check, scaling(6), 2), (other, scaling(5), 3)]
    of_a_test = scaling(5, f"{tmp_path}/model.safetensors")
    for asked, model, times in (*cases, (check, of_a_test, 4), (check, of_a_test, 5)):
        (values,) = found(asked, model)
        (inputs,) = asked._inputs()
        assert np.array_equal(
            values["y"], inputs["x"] * onnx.numpy_helper.to_array(model.graph.initializer[0])
        )
        assert len(run) == times
