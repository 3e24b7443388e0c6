"""from_onnx and to_onnx: graphsurgeon's own import and export, and what these lose of bodies and functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from onnx.parser import parse_model

from passes.base import bodies_of
from passes.graph.edit import inline
from passes.graph.from_onnx import import_graph
from passes.graph.inference import fill_types, infer_types
from passes.graph.match import is_recipe
from passes.graph.to_onnx import export_graph, export_model
from passes.weights.recipe import Recipe, dtype_of
from tests.passes.graph_helpers import check_same

FLAT = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[B, 3] x) => (float z) <float[3] w = {1, 2, 3}, float[B, 3] a, int64[1] axes = {0}> {
    a = Add(x, w)
    b, n = own.Thing <f = -0.0, g = 0.0, i = 1, fs = [1.0, 2.5], is = [1, 2], s = "text", ss = ["u", "v"]> (a, , w)
    t = Constant <value = float[2] {4, 5}> ()
    z = ReduceSum <keepdims = 0> (a)
}"""
BODIES = """<ir_version: 10, opset_import: ["" : 21]>
g (float[B, 3] x, bool c) => (float[B, 3] y) <float[3] w = {1, 2, 3}, float[3] v = {4, 5, 6}, float[B, 3] a> {
    a = Add(x, w)
    y = If (c) <
        then_branch = h () => (float[B, 3] p) <float[3] u = {7, 8, 9}> {
            m = Mul(a, w)
            n = Mul(m, v)
            p = Add(n, u)
        },
        else_branch = k () => (float[B, 3] q) <float[3] u = {1, 5, 9}> { m = Mul(a, v) q = Div(m, u) }
    >
}"""
FUNCTIONS = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[2] x) => (float[2] y) { y = own.Twice (x) }
<domain: "own", opset_import: ["" : 21]> Twice (x) => (y) { y = Add (x, x) }"""


def _with_recipes() -> onnx.ModelProto:
    model = parse_model(FLAT)
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


MODELS = {
    "attributes and recipes": _with_recipes,
    "functions": lambda: parse_model(FUNCTIONS),
    "sparse": _sparse,
}


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


def test_a_weight_that_bodies_read_is_stored_once_and_theirs_stay_theirs() -> None:
    model = infer_types(parse_model(BODIES))
    graph = import_graph(model)
    then, _ = bodies_of(graph)
    assert then.nodes[0].inputs[0] is graph.nodes[0].outputs[0]
    exported = export_model(graph)
    (branch,) = [node for node in exported.graph.node if node.op_type == "If"]
    bodies = [attribute.g for attribute in branch.attribute]
    assert {t.name for t in exported.graph.initializer} == {"w", "v"}
    assert [[t.name for t in body.initializer] for body in bodies] == [["u"], ["u"]]
    assert [sorted(v.name for v in body.value_info) for body in bodies] == [["m", "n"], ["m"]]
    rng = np.random.default_rng(5)
    for condition in (True, False):
        feeds = {"x": rng.standard_normal((2, 3)).astype(np.float32), "c": np.array(condition)}
        check_same(model, exported, feeds)
    # What only one body reads goes with it.
    then.nodes[1].inputs[1] = inline("new", np.array([2, 4, 8], np.float32))
    exported = export_model(graph)
    bodies = [a.g for node in exported.graph.node for a in node.attribute]
    assert [t.name for t in exported.graph.initializer] == ["w"]
    assert [[t.name for t in body.initializer] for body in bodies] == [["new", "u"], ["v", "u"]]


OVERLOADS = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[B, 4] x, float16[B, 4] h) => (float[B, 4] y, float16[B, 4] z) {
    a = own.F:one <by = 2.0> (x)
    b = own.F:two (a)
    y = own.G (b)
    z = own.G (h)
}
<domain: "own", overload: "one", opset_import: ["" : 21]> F <by> (x) => (y) {
    c = Constant <value_float: float = @by> ()
    y = Mul (x, c)
}
<domain: "own", overload: "two", opset_import: ["" : 21]> F (x) => (y) { t = Exp (x)  y = own.G (t) }
<domain: "own", opset_import: ["" : 21]> G (x) => (y) { t = Neg (x)  y = Abs (t) }"""


def test_functions_keep_their_overloads_and_get_the_types_of_their_calls() -> None:
    model = parse_model(OVERLOADS)
    model.functions[1].opset_import.append(helper.make_opsetid("own", 1))
    model.functions[0].metadata_props.add(key="origin", value="a block")
    graph = import_graph(infer_types(model))
    one, two, both = graph.functions
    assert [(t.name, dtype_of(t), t.shape) for t in (*one.inputs, *one.outputs)] == [
        ("x", TensorProto.FLOAT, ["B", 4]),
        ("y", TensorProto.FLOAT, ["B", 4]),
    ]
    assert [dtype_of(t) for t in two.nodes[0].outputs] == [TensorProto.FLOAT]
    assert [dtype_of(t) for t in both.inputs] == [None]  # its calls differ
    exported = export_model(graph)
    assert [node.overload for node in exported.graph.node] == ["one", "two", "", ""]
    assert [function.overload for function in exported.functions] == ["one", "two", ""]
    assert exported.functions[0].metadata_props[0].value == "a block"
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 4))
    check_same(model, exported, {"x": x.astype(np.float32), "h": x.astype(np.float16)})


def test_attributes_that_graphsurgeon_does_not_know_stay() -> None:
    values = helper.make_tensor("", TensorProto.FLOAT, [1], [7.0])
    where = helper.make_tensor("", TensorProto.INT64, [1], [2])
    sparse = helper.make_node(
        "Constant", [], ["s"], sparse_value=helper.make_sparse_tensor(values, where, [4])
    )
    model = parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[4] x) => (float[4] y) { y = Add(x, s) }'
    )
    model.graph.node.insert(0, sparse)
    exported = export_model(import_graph(model))
    check_same(model, exported, {"x": np.arange(4, dtype=np.float32)})
    assert exported.graph.node[0].attribute[0].sparse_tensor.dims == [4]


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


def test_a_list_of_nothing_and_a_body_that_does_not_tell_its_types() -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["b"], "neg")], "b", [], [onnx.ValueInfoProto(name="b")]
    )
    node = helper.make_node("If", ["c"], ["y"], "if", then_branch=branch, else_branch=branch)
    node.attribute.add(name="none", type=onnx.AttributeProto.INTS)
    info = helper.make_tensor_value_info
    x, c, y = info("x", 1, ["n"]), info("c", 9, []), info("y", 1, ["n"])
    made = helper.make_model(helper.make_graph([node], "g", [x, c], [y]), ir_version=10)
    back = export_graph(import_graph(infer_types(made)), made)
    assert {a.name: a.type for a in back.graph.node[0].attribute}["none"] == onnx.AttributeProto.INTS
    fill_types(graph := import_graph(made), made)
    assert export_graph(graph, made).graph.node[0].op_type == "If"
