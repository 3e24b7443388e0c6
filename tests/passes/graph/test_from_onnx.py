"""passes.graph.convert: the same graphs and models as graphsurgeon's own import and export, to the byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from onnx.parser import parse_model

from passes.graph.convert import export_model, import_graph
from passes.graph.match import is_recipe
from passes.weights.recipe import Recipe

BODIES = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[B, 3] x, bool c) => (float[B, 3] y, float z) <float[3] w = {1, 2, 3}, float[B, 3] a, int64[1] axes = {0}> {
    a = Add(x, w)
    b, n = own.Thing <f = -0.0, g = 0.0, i = 1, fs = [1.0, 2.5], is = [1, 2], s = "text", ss = ["u", "v"]> (a, , w)
    t = Constant <value = float[2] {4, 5}> ()
    y = If (c) <
        then_branch = h () => (float[B, 3] p) { p = Mul(a, w) },
        else_branch = k () => (float[B, 3] q) { m = Neg(b) q = Mul(m, a) }
    >
    z = ReduceSum <keepdims = 0> (y)
}"""
FUNCTIONS = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[2] x) => (float[2] y) { y = own.Twice (x) }
<domain: "own", opset_import: ["" : 21]> Twice (x) => (y) { y = Add (x, x) }"""


def _with_recipes() -> onnx.ModelProto:
    model = parse_model(BODIES)
    rng = np.random.default_rng(3)
    recipe = Recipe.of_array(rng.standard_normal(3).astype(np.float32)).cast(TensorProto.BFLOAT16)
    model.graph.initializer.append(recipe.to_tensor("r"))
    model.graph.node.append(helper.make_node("Cast", ["r"], ["r32"], "cast", domain="", to=TensorProto.FLOAT))
    for name, kind in (("a", TensorProto.FLOAT), ("a", TensorProto.FLOAT), ("unused", TensorProto.INT8)):
        model.graph.value_info.append(helper.make_tensor_value_info(name, kind, ["B", 3]))
    model.graph.value_info.append(helper.make_tensor_value_info("n", TensorProto.BFLOAT16, None))
    model.graph.value_info.append(helper.make_tensor_sequence_value_info("t", TensorProto.FLOAT, [None]))
    return model


def _sparse() -> onnx.ModelProto:
    model = parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[4] x) => (float[4] y) { y = Add(x, s) }""")
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [7.0])
    where = helper.make_tensor("where", TensorProto.INT64, [1], [2])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, where, [4]))
    return model


MODELS = {"bodies and recipes": _with_recipes, "functions": lambda: parse_model(FUNCTIONS), "sparse": _sparse}


@pytest.mark.parametrize("name", MODELS)
def test_export_is_graphsurgeons(name: str) -> None:
    model = MODELS[name]()
    ours, theirs = import_graph(model), gs.import_onnx(MODELS[name]())
    expected = gs.export_onnx(theirs, do_type_check=False)
    for graph in (ours, theirs):
        assert _text(export_model(graph)) == _text(expected)
    changed = next(node for node in ours.nodes if node.attrs or node.op)
    changed.name = "another"
    assert _text(export_model(ours)) != _text(expected)


def _text(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


def test_import_is_graphsurgeons() -> None:
    ours, theirs = import_graph(_with_recipes()), gs.import_onnx(_with_recipes())
    assert _content(ours) == _content(theirs)
    assert is_recipe(ours.tensors()["r"])
    assert not is_recipe(theirs.tensors()["r"])


def _content(graph: gs.Graph) -> Any:
    return (
        [
            (node.op, node.name, node.domain, _names(node.inputs), _names(node.outputs))
            for node in graph.nodes
        ],
        [_attributes(node) for node in graph.nodes],
        [
            (name, type(t), t.dtype, list(t.shape or ()), t.shape is None, getattr(t, "type", None))
            for name, t in graph.tensors().items()
        ],
        [(name, _ops(t.inputs), _ops(t.outputs)) for name, t in graph.tensors().items()],
        _names(graph.inputs),
        _names(graph.outputs),
        (graph.name, graph.opset, graph.producer_name, graph.ir_version, graph.doc_string),
    )


def _names(tensors: list[gs.Tensor]) -> list[str]:
    return [tensor.name for tensor in tensors]


def _ops(nodes: list[gs.Node]) -> list[str]:
    return [node.op for node in nodes]


def _attributes(node: gs.Node) -> list[Any]:
    return [
        (name, _content(value) if isinstance(value, gs.Graph) else repr(value))
        for name, value in node.attrs.items()
    ]


def test_an_imported_graph_is_linked_both_ways() -> None:
    graph = import_graph(_with_recipes())
    node = graph.nodes[0]
    x, w = node.inputs
    del node.inputs[1]
    assert node not in w.outputs
    node.inputs.append(w)
    assert node in w.outputs
    node.outputs.clear()
    assert not graph.tensors()["a"].inputs
    assert x.outputs == [node]
