"""Where graphs are cut, and what the parts compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference

from diffc.validate.cuts import COMPUTED, extract, module_values, nodes_computing


def small_graph() -> onnx.ModelProto:
    """x -> a/Relu -> b/Exp -> c/Add(with a's) -> y."""
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["a/Relu_out"], "a/Relu"),
        onnx.helper.make_node("Exp", ["a/Relu_out"], ["b/Exp_out"], "b/Exp"),
        onnx.helper.make_node("Add", ["b/Exp_out", "a/Relu_out"], ["y"], "c/Add"),
    ]
    value = onnx.helper.make_tensor_value_info
    x, y = (value(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)


def renamed(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The nodes and what they give called so, the graph's output excepted."""
    new = {node.output[0]: f"{name}_out" for node, name in zip(model.graph.node, names, strict=True)}
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
        for field in (node.input, node.output):
            field[:] = [tensor if tensor == "y" else new.get(tensor, tensor) for tensor in field]
    return model


def test_a_module_that_ends_with_one_inside_it_has_no_point() -> None:
    model = renamed(small_graph(), "up/Resize", "up.conv/Exp", "up.conv.bias/Add")
    assert [p.module for p in module_values(model)] == ["up.conv.bias"]


def test_a_value_that_another_modules_node_gives_is_still_its_modules() -> None:
    model = renamed(small_graph(), "a/Relu", "a.inner/Exp", "c/Add")
    assert [p.module for p in module_values(model)] == ["a.inner", "c"]
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "c/Exp_out"  # its bias went into c, a norm
    assert [(p.module, p.tensor) for p in module_values(model)] == [("c", "y")]
    model.graph.node[2].output.append("a/Add_out")  # and c gives the sum behind it, too
    assert [(p.module, p.node) for p in module_values(model)] == [("a", "c/Add"), ("c", "c/Add")]


def test_a_cut_graph_computes_each_piece_from_what_it_is_fed() -> None:
    model = small_graph()
    points = module_values(model)
    assert [p.module for p in points] == ["a", "b", "c"]
    part = extract(model, [p.tensor for p in points], {p.tensor: 1 for p in points})
    assert [v.name for v in part.graph.input] == ["x", "a/Relu_out", "b/Exp_out"]
    session = onnx.reference.ReferenceEvaluator(part)
    x, a, b = (np.asarray(v, np.float32) for v in ([-1.0, 2.0], [0.5, 0.25], [3.0, 4.0]))
    out = dict(
        zip(
            [v.name for v in part.graph.output],
            session.run(None, {"x": x, "a/Relu_out": a, "b/Exp_out": b}),
            strict=True,
        )
    )
    np.testing.assert_allclose(out["a/Relu_out" + COMPUTED], [0, 2])
    np.testing.assert_allclose(out["b/Exp_out" + COMPUTED], np.exp(a), rtol=1e-6)
    np.testing.assert_allclose(out["y" + COMPUTED], a + b)


def test_a_piece_reaches_back_to_the_known_tensors() -> None:
    model = small_graph()
    assert nodes_computing(model, "y", set()) == ["a/Relu", "b/Exp", "c/Add"]
    assert nodes_computing(model, "y", {"a/Relu_out", "y"}) == ["b/Exp", "c/Add"]
    assert [v.name for v in extract(model, ["b/Exp_out"], {}).graph.input] == ["x"]
