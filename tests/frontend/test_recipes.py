"""Initializers of a trace become recipes: of which tensors, with which arithmetic, and what is missing is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from diffc.errors import DiffcError
from diffc.frontend.quantizers import TracedQuantizer
from diffc.frontend.recipes import attach_recipes, is_real, scaling_of
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.kinds import KINDS
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

RNG = np.random.default_rng(11)
WEIGHT = RNG.standard_normal((6, 4)).astype(np.float32)


def model(**shapes: tuple[int, ...]) -> ir.Model:
    """A graph whose initializers, of float16, have no values yet; a double underscore stands for a dot."""
    values = [
        ir.Value(name=name.replace("__", "."), shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT16))
        for name, shape in shapes.items()
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23})
    return ir.Model(graph, ir_version=11)


def source(**weights: np.ndarray) -> Any:
    return SimpleNamespace(
        name="some model",
        weights={name.replace("__", "."): Recipe.of_array(w) for name, w in weights.items()},
    )


def checkpoint(amax: dict[str, Any] | None = None, **scaling: np.ndarray) -> Any:
    named = {name.replace("__", "."): value for name, value in scaling.items()}
    return Checkpoint("sd3", "int4_awq", {}, {}, amax or {}, scaling=named)


def result(made: ir.Model, name: str) -> Any:
    """The recipe of an initializer, computed."""
    proto = ir.serde.serialize_model(made).graph
    recipe = next(Recipe.of_tensor(tensor) for tensor in proto.initializer if tensor.name == name)
    assert recipe is not None
    return evaluate(recipe)


def test_a_weight_is_cast_to_its_type_in_the_graph() -> None:
    made = model(layer__weight=(6, 4))
    attach_recipes(made, source(layer__weight=WEIGHT), {}, None)
    got = result(made, "layer.weight")
    assert got.dtype == np.float16
    assert np.array_equal(got, WEIGHT.astype(np.float16))


def test_the_scale_of_a_quantizer_is_amax_by_bound() -> None:
    kind = KINDS["int8"]
    traced = {"layer.input_quantizer": TracedQuantizer(kind, None, 0, ())}
    made, amax = model(layer__input_quantizer__scale=()), np.float32(3.25)
    attach_recipes(made, source(), traced, checkpoint({"layer.input_quantizer": np.array([amax])}))
    assert result(made, "layer.input_quantizer.scale") == np.float16(amax / np.float32(kind.bound))


@pytest.mark.parametrize("branch", [False, True])
def test_a_weight_is_divided_by_its_channels_and_less_its_branch(branch: bool) -> None:
    """As torch computes it: 16-bit weight, times 1 / factor, less b a, each rounded to 16 bits."""
    factor = 2.0 ** RNG.integers(-2, 3, 4).astype(np.float32)
    a, b = (RNG.integers(-3, 4, shape).astype(np.float32) / 8 for shape in ((2, 4), (6, 2)))
    scaling = {"layer__input_quantizer__pre_quant_scale": factor}
    if branch:
        scaling |= {
            "layer__weight_quantizer__svdquant_lora_a": a,
            "layer__weight_quantizer__svdquant_lora_b": b,
        }
    made = model(layer__weight=(6, 4))
    attach_recipes(made, source(layer__weight=WEIGHT), {}, checkpoint(**scaling))
    want = torch.from_numpy(WEIGHT).half() * (1 / torch.from_numpy(factor)).half()
    if branch:
        product = torch.from_numpy(b).double() @ torch.from_numpy(a).double()
        want = (want.double() - product).half()
    assert np.array_equal(result(made, "layer.weight"), want.numpy())


def test_a_bias_of_a_scaled_layer_stays() -> None:
    scaling = {"layer__input_quantizer__pre_quant_scale": np.full(4, 2, np.float32)}
    made, bias = model(layer__bias=(6,)), WEIGHT[:, 0]
    attach_recipes(made, source(layer__bias=bias), {}, checkpoint(**scaling))
    assert np.array_equal(result(made, "layer.bias"), bias.astype(np.float16))


def test_buffers_of_quantizers_come_from_the_checkpoint() -> None:
    factor = np.array([1, 2, 4, 8], np.float32)
    held = checkpoint(layer__input_quantizer__pre_quant_scale=factor)
    found = scaling_of("layer.input_quantizer._pre_quant_scale", held)
    assert found is factor
    assert scaling_of("other.input_quantizer._pre_quant_scale", held) is None
    made = model(layer__input_quantizer___pre_quant_scale=(4,))
    attach_recipes(made, source(), {}, held)
    assert np.array_equal(result(made, "layer.input_quantizer._pre_quant_scale"), factor.astype(np.float16))


def test_constants_that_the_exporter_made_stay() -> None:
    made = model(weight=(6, 4))
    held = ir.Value(name="val_3", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    held.const_value = ir.Tensor(np.array([1.5, 2], np.float32), name="val_3")
    made.graph.register_initializer(held)
    assert is_real(held)
    assert not is_real(made.graph.initializers["weight"])
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = torch.empty(2)
    held.const_value = SimpleNamespace(raw=fake)  # type: ignore[assignment]
    assert not is_real(held)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "the weights of some model have no tensor 'layer.weight', which the model needs"),
        ({"layer__weight": WEIGHT[:3]}, "tensor 'layer.weight' has shape (3, 4), and config.json asks for"),
    ],
)
def test_weights_that_do_not_fit_are_named(given: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(DiffcError) as raised:
        attach_recipes(model(layer__weight=(6, 4)), source(**given), {}, None)
    assert said in str(raised.value)
