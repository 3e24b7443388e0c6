"""A pass that changes numbers, or rounds weights wrongly, is caught."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.validate.passes import NumericCheck, check_quantized_weights, random_feeds
from passes import Pass, PassCheckError, PassResult, Pipeline
from passes.canonical.fold_weight_qdq import FoldWeightQdq
from passes.graph.match import weight_recipe
from passes.weights.operations import BINDERS, Step
from passes.weights.recipe import Recipe, constant


@dataclass(frozen=True)
class Damage(Pass):
    """Multiplies one weight; not registered, so that no pipeline text can name it."""

    name: ClassVar[str] = "damage-weight"
    factor: float = 1.01
    weight: str = "w2"

    def run(self, graph: gs.Graph) -> PassResult:
        tensor = graph.tensors()[self.weight]
        recipe = weight_recipe(tensor)
        assert recipe is not None
        wrong = recipe.multiply(Recipe.of_array(np.float32([self.factor])))
        tensor._values = constant(self.weight, wrong)._values
        return PassResult(1)


def network(*, quantized: bool) -> onnx.ModelProto:
    """x [n, 16] -> MatMul -> Gelu -> MatMul -> y, with FP8 quantizers on the second product's inputs."""
    rng = np.random.default_rng(12)
    weights = [
        numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32) / 4, f"w{i}") for i in (1, 2)
    ]
    hidden, weight, nodes = "h", "w2", []
    if quantized:
        scale = numpy_helper.from_array(np.float32(2.0**-7), "s")
        zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
        weights += [scale, zero]
        for name in ("h", "w2"):
            nodes.append(helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"], f"{name}/q"))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_d"], f"{name}/d")
            )
        hidden, weight = "h_d", "w2_d"
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Gelu", ["a"], ["h"], "gelu"),
        *nodes,
        helper.make_node("MatMul", [hidden, weight], ["y"], "second"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 16]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def checker(model: onnx.ModelProto) -> NumericCheck:
    feeds = random_feeds(model, seed=4)
    return NumericCheck(lambda: feeds)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("factor", [1.01, 0.0, 1.0005])
def test_a_pass_that_changes_numbers_is_caught(quantized: bool, factor: float) -> None:
    model = network(quantized=quantized)
    with pytest.raises(
        PassCheckError, match=r"'damage-weight' changed output 'y': relative L2 error .*limit|over"
    ):
        Pipeline([Damage(factor=factor, weight="w1")]).run(model, check=checker(model))


def test_a_pass_that_keeps_numbers_passes_and_says_how_near() -> None:
    model = network(quantized=True)
    result = Pipeline([Damage(factor=1.0), FoldWeightQdq()]).run(model, check=checker(model))
    assert [record.changed for record in result.records] == [1, 1]
    assert "1 quantized weights within half a step" in result.records[1].check
    assert all("outputs within" in record.check for record in result.records)


def test_a_pass_may_change_numbers_by_its_own_tolerance() -> None:
    class Coarse(Damage):
        tolerance: ClassVar[float] = 0.02

    model = network(quantized=False)
    Pipeline([Coarse(factor=1.01)]).run(model, check=checker(model))
    with pytest.raises(PassCheckError):
        Pipeline([Coarse(factor=1.05)]).run(model, check=checker(model))


def test_weights_that_are_not_rounded_to_nearest_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    before = network(quantized=True)
    after = Pipeline([FoldWeightQdq()]).run(before).model
    assert check_quantized_weights(before, after) == 1

    rounding = BINDERS["quantize"]

    def towards_zero(*arguments: Any) -> Step:
        step = rounding(*arguments)
        return replace(step, run=lambda x, rows: step.run(np.asarray(x) * 0.95, rows))

    monkeypatch.setitem(BINDERS, "quantize", towards_zero)
    with pytest.raises(PassCheckError, match=r"weight 'w2_q.*' was quantized wrongly"):
        check_quantized_weights(before, after)
