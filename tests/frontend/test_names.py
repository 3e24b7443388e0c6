"""Names of a traced graph: nodes by module, inputs, outputs and dimensions as the family calls them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from diffc.frontend.names import SCOPES, module_of, name_graph, name_nodes


def node(scopes: list[str] | None, op: str, inputs: list[ir.Value], outputs: int = 1) -> ir.Node:
    made = ir.Node("", op, inputs, num_outputs=outputs)
    if scopes is not None:
        made.metadata_props[SCOPES] = repr(scopes)
    made.metadata_props["pkg.torch.onnx.stack_trace"] = "a long story"
    return made


def value(name: str, dims: list[Any]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))


@pytest.mark.parametrize(
    ("scopes", "module"),
    [
        (["", "blocks.0", "blocks.0.attn", "matmul_3"], "blocks.0.attn"),
        (["", "blocks.0", "_empty_nn_module_stack", "add"], "blocks.0"),  # what torch adds is no module
        (["", "add_1"], ""),
        (["proj_out"], ""),  # the operation itself
        (None, ""),
    ],
)
def test_the_module_of_a_node(scopes: list[str] | None, module: str) -> None:
    assert module_of(node(scopes, "MatMul", [])) == module


def test_nodes_and_values_are_called_after_modules() -> None:
    x = value("x", [2])
    first = node(["", "a.b", "mul"], "Mul", [x, x])
    second = node(["", "a.b", "mul_1"], "Mul", [first.outputs[0], x])
    split = node(["", "split"], "Split", [second.outputs[0]], outputs=2)
    graph = ir.Graph([x], [split.outputs[1]], nodes=[first, second, split], opset_imports={"": 23})
    graph.metadata_props["signature"] = x.metadata_props["kind"] = "input"
    name_nodes(graph)
    assert [n.name for n in graph] == ["a.b/Mul", "a.b/Mul_1", "Split"]
    assert [v.name for n in graph for v in n.outputs] == [
        "a.b/Mul_out",
        "a.b/Mul_1_out",
        "Split_out",
        "Split_out1",
    ]
    assert not any(item.metadata_props for item in (graph, x, *graph, *(v for n in graph for v in n.outputs)))


def family(inputs: list[Any]) -> Any:
    return SimpleNamespace(
        name="sd0",
        inputs=lambda config: inputs,
        interface=None,
        outputs=lambda config: [SimpleNamespace(name="sample", dims=("batch", 4, "width"))],
    )


def traced() -> ir.Model:
    """A graph as the exporter leaves it: x (s0, 2*s1) with an output (s0, 4, 2*s1)."""
    x, text = value("hidden", ["s0", "2*s1"]), value("added_text", ["s0", 7])
    inner = node(["", "norm", "add"], "Add", [x, text])
    inner.outputs[0].shape = ir.Shape(["s0", 3, "2*s1", "s0 + 1", None])
    last = node(["", "out", "neg"], "Neg", [inner.outputs[0]])
    last.outputs[0].shape = ir.Shape(["s0", 4, "2*s1"])
    graph = ir.Graph([x, text], [last.outputs[0]], nodes=[inner, last], opset_imports={"": 23})
    return ir.Model(graph, ir_version=11)


HIDDEN = SimpleNamespace(name="sample_in", path=("hidden",), dims=("batch", "width"))
TEXT = SimpleNamespace(name="text_embeds", path=("added", "text"), dims=("batch", 7))


@pytest.mark.parametrize("inputs", [[HIDDEN, TEXT], [TEXT, HIDDEN]])
def test_inputs_outputs_and_dimensions_have_the_names_of_the_family(inputs: list[Any]) -> None:
    model = traced()
    name_graph(model, family(inputs), {})
    graph = model.graph
    assert graph.name == "sd0"
    assert [(v.name, list(map(str, v.shape or ()))) for v in graph.inputs] == [
        ("sample_in", ["batch", "width"]),
        ("text_embeds", ["batch", "7"]),
    ]
    (output,) = graph.outputs
    assert (output.name, [str(d) for d in output.shape or ()]) == ("sample", ["batch", "4", "width"])
    inner = next(iter(graph)).outputs[0]
    # What is neither a number nor a dimension of an input is not known any more.
    assert [d if isinstance(d, int) else getattr(d, "value", d) for d in inner.shape or ()] == [
        "batch",
        3,
        "width",
        None,
        None,
    ]


def test_a_family_with_other_inputs_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"the trace has inputs \['hidden', 'added_text'\]"):
        name_graph(traced(), family([HIDDEN]), {})
