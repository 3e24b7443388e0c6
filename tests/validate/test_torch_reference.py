"""The checks of a compile can fail: damaged models, wrong passes and wrongly quantized weights are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffc.cli.main import run
from diffc.errors import MismatchError
from diffc.frontend.trace import trace
from diffc.models.sources.backbone import DTYPES, load_backbone
from diffc.models.sources.locate import locate
from diffc.quantize.convert import layer_of, role_of
from diffc.quantize.simulate import cpu_block_quant
from diffc.validate import torch_reference as fidelity
from diffc.validate.folded import check_folded_weights
from diffc.validate.passes import NumericCheck, random_feeds
from diffc.validate.reports import ShapeReport, require_match
from passes import Pass, PassCheckError, PassResult, Pipeline, presets
from passes.canonical.fold_weight_qdq import FoldWeightQdq
from passes.graph.match import weight_recipe
from passes.storage import load, materialize
from passes.weights.operations import BINDERS, Step
from passes.weights.recipe import Recipe, constant
from tests.conftest import Cell, Cells

Change = Callable[[onnx.ModelProto], None]


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def scaled(name: str, factor: float) -> Change:
    """Multiplies an initializer."""

    def change(model: onnx.ModelProto) -> None:
        tensor = initializer(model, name)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((array * np.float32(factor)).astype(array.dtype), name))

    return change


def swapped(op_type: str, first: int, second: int) -> Change:
    """Swaps two inputs of the second node of that type."""

    def change(model: onnx.ModelProto) -> None:
        node = [n for n in model.graph.node if n.op_type == op_type][1]
        node.input[first], node.input[second] = node.input[second], node.input[first]

    return change


def scale_of(layer: str, quantizer: str, factor: float) -> Change:
    """Multiplies the scale of a layer's quantizer, for its QuantizeLinear and DequantizeLinear alike."""

    def change(model: onnx.ModelProto) -> None:
        nodes = [n for n in model.graph.node if n.name.startswith(f"{layer}.{quantizer}/")]
        (scale,) = {n.input[1] for n in nodes}
        array = numpy_helper.to_array(initializer(model, scale))
        wrong = numpy_helper.from_array((array * factor).astype(array.dtype), f"{scale}_wrong")
        model.graph.initializer.append(wrong)
        for node in nodes:
            node.input[1] = wrong.name

    return change


_references: dict[Path, fidelity.Reference] = {}


def reference_of(cell: Cell) -> fidelity.Reference:
    """The torch model of a cell, made once: it keeps what it computed."""
    if cell.folder not in _references:
        made = fidelity.Reference(cell.plan.source, cell.plan.dtype, cell.checkpoint)
        _references[cell.folder] = made
    return _references[cell.folder]


def validate(cell: Cell, change: Change | None = None) -> list[ShapeReport]:
    """Validation of the cell's model, at the first shape, after `change`."""
    model = materialize(load(cell.folder / "model.onnx"))
    if change is not None:
        change(model)
    return fidelity.validate(
        model,
        reference_of(cell),
        format=cell.request.format,
        shapes=fidelity.validation_shapes(cell.plan.source)[:1],
        seed=77,
    )


@pytest.mark.parametrize("format", ["none", "fp8"])
def test_the_undamaged_model_matches_on_other_inputs(format: str, compiled: Cells) -> None:
    require_match(validate(compiled("tiny-sd3", format)))


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("none", scaled("proj_out.weight", 1.01)),
        ("none", scaled("transformer_blocks.1.attn.to_out.0.weight", 1.01)),
        ("none", scaled("transformer_blocks.0.ff.net.2.bias", 0)),
        ("none", scaled("transformer_blocks.2.norm1.linear.bias", 0)),
        ("none", swapped("Attention", 1, 2)),
        ("none", swapped("Sub", 0, 1)),
        ("fp8", scaled("transformer_blocks.0.ff.net.0.proj.bias", 0)),
        ("fp8", swapped("Attention", 0, 1)),
        ("fp8", scale_of("transformer_blocks.1.attn.to_v", "weight_quantizer", 1.01)),
        ("fp8", scale_of("transformer_blocks.2.ff.net.2", "weight_quantizer", 1.01)),
    ],
)
def test_a_damaged_model_is_a_mismatch(format: str, change: Change, compiled: Cells) -> None:
    with pytest.raises(MismatchError, match=r"the compiled model\.onnx differs from torch: output") as raised:
        require_match(validate(compiled("tiny-sd3", format), change))
    assert raised.value.exit_code == 3


def test_an_input_scale_that_cuts_values_off_is_a_mismatch(compiled: Cells) -> None:
    change = scale_of("transformer_blocks.1.ff.net.2", "input_quantizer", 0.25)
    with pytest.raises(MismatchError):
        require_match(validate(compiled("tiny-sd3", "fp8"), change))


@pytest.fixture(scope="module")
def traced() -> onnx.ModelProto:
    return trace(locate("tiny-sd3"), dtype="float16", checkpoint=None)


def compile_in(folder: Path, *more: str) -> int:
    return run(["compile", "tiny-sd3", "-o", str(folder / "out"), *more])


def test_a_damage_after_the_passes_exits_3_and_leaves_nothing(
    traced: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import diffc.compile.spine

    original = diffc.compile.spine.rewrite

    def damaging(*arguments: Any) -> Any:
        graphs = original(*arguments)
        tensor = initializer(graphs.models["model.onnx"], "transformer_blocks.1.attn.to_v.weight")
        recipe = Recipe.of_tensor(tensor)
        assert recipe is not None
        tensor.CopyFrom(recipe.multiply(Recipe.of_array(np.float32([1.05]))).to_tensor(tensor.name))
        return graphs

    monkeypatch.setattr(diffc.compile.spine, "trace", lambda *_: traced)
    monkeypatch.setattr(diffc.compile.spine, "rewrite", damaging)
    assert compile_in(tmp_path) == 3
    error = capsys.readouterr().err
    assert "the compiled model.onnx differs from torch: output 'out_hidden_states' at batch 1" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


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


def test_a_wrong_pass_in_a_compile_exits_3_and_leaves_nothing(
    traced: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import diffc.compile.spine

    wrong = Damage(weight="transformer_blocks.1.attn.to_v.weight", factor=1.05)
    monkeypatch.setattr(diffc.compile.spine, "trace", lambda *_: traced)
    monkeypatch.setattr(presets, "CANONICAL", (*presets.CANONICAL, wrong))
    assert compile_in(tmp_path) == 3
    error = capsys.readouterr().err
    assert "pass 'damage-weight' changed output 'out_hidden_states': relative L2 error" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


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
    assert check_folded_weights(before, after) == 1

    rounding = BINDERS["quantize"]

    def towards_zero(*arguments: Any) -> Step:
        step = rounding(*arguments)
        return replace(step, run=lambda x, rows: step.run(np.asarray(x) * 0.95, rows))

    monkeypatch.setitem(BINDERS, "quantize", towards_zero)
    with pytest.raises(PassCheckError, match=r"weight 'w2_q.*' was quantized wrongly"):
        check_folded_weights(before, after)


@pytest.mark.parametrize(
    ("name", "format"),
    [("tiny-sd35", "fp8"), ("tiny-flux", "fp8"), ("tiny-sdxl", "int8"), ("tiny-flux", "int8")],
)
def test_stored_weights_are_those_of_modelopt_bit_for_bit(name: str, format: str, compiled: Cells) -> None:
    """Each stored code is the one that ModelOpt chose; code x scale is its fake-quantized weight to the last bits."""
    cell = compiled(name, format)
    assert cell.checkpoint is not None
    backbone = load_backbone(cell.plan.source, DTYPES[cell.plan.dtype])
    cell.checkpoint.apply(backbone, cell.plan.spec.family)
    backbone.float()
    model = cell.model
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    dequantize = {n.input[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    users = {i: n for n in model.graph.node for i in n.input}
    layers = [n.removesuffix(".weight_quantizer") for n in cell.checkpoint.settings if "weight_q" in n]
    assert len(layers) > 30
    for path in layers:
        layer: Any = backbone.get_submodule(path)
        node = dequantize[f"{path}.weight_q"]
        with torch.no_grad():
            expected = layer.weight_quantizer(layer.weight).numpy()
        codes, scale = tensors[node.input[0]], tensors[node.input[1]].astype(np.float32)
        if users[node.output[0]].op_type == "MatMul":  # stored [in, out]
            expected = expected.T
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale.size > 1:
            scale = scale.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])
        values = codes.astype(np.float32) * scale
        # ModelOpt divides by its factor, which is 1 / scale rounded (FP8: rounded twice).
        np.testing.assert_array_max_ulp(values, expected, maxulp=1 if format == "int8" else 2)
        chosen = expected / scale
        step = 1.0 if format == "int8" else np.maximum(np.abs(chosen) * 2.0**-4, 2.0**-9)
        assert (np.abs(codes.astype(np.float32) - chosen) < 1e-3 * step).all(), path
        assert len(np.unique(codes)) > 100, path


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("tiny-sd3", "int4_awq"),
        ("tiny-sd3", "nvfp4"),
        ("tiny-sd3", "mxfp8"),
        ("tiny-flux", "nvfp4_svdquant"),
    ],
)
def test_stored_blocks_are_those_of_modelopt(name: str, format: str, compiled: Cells) -> None:
    """Values times scales of blocks are the weight that ModelOpt simulates, from the same scaled weight."""
    cell = compiled(name, format)
    assert cell.checkpoint is not None
    backbone = load_backbone(cell.plan.source, DTYPES[cell.plan.dtype])
    cell.checkpoint.apply(backbone, cell.plan.spec.family)
    backbone.float()
    tensors = {t.name: numpy_helper.to_array(t) for t in cell.model.graph.initializer}
    nodes = {n.input[0]: n for n in cell.model.graph.node if "DequantizeLinear" in n.op_type}
    layers = {layer_of(n) for n in cell.checkpoint.settings if role_of(n) == "weight_quantizer"}
    assert len(layers) > 15
    for path in sorted(layers):
        layer: Any = backbone.get_submodule(path)
        with torch.no_grad(), cpu_block_quant():
            expected = layer.weight_quantizer(layer.weight).numpy()
        stored = tensors[f"{path}.weight_q"].astype(np.float32)
        if format == "int4_awq":
            node = nodes[f"{path}.weight_q"]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            scale = tensors[node.input[1]].astype(np.float32)
            values = stored * np.repeat(scale, 128, axis=axis)
            values = values if values.shape == expected.shape and axis == 1 else values.T
            np.testing.assert_array_max_ulp(values, expected, maxulp=2)
            continue
        scales = tensors[f"{path}.weight_scale"]
        if format == "mxfp8":
            steps = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        else:
            steps = scales.astype(np.float32) * tensors[nodes[f"{path}.weight_scale"].input[1]]
        values = stored * np.repeat(steps, expected.shape[-1] // steps.shape[-1], axis=-1)
        assert np.array_equal(values, expected), path
