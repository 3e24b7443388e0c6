"""Types and shapes that ONNX infers, written into models and graphs; and the copy that it gets for this."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from passes.graph.from_onnx import import_graph
from passes.graph.inference import bodies_of_proto, fill_types, infer_types, nodes_of, shell, walk_protos
from passes.graph.to_onnx import export_model
from passes.weights.recipe import Recipe, dtype_of
from tests.passes.graph_helpers import made_by, model

RECIPE = Recipe.of_array(np.ones((4, 5), np.float32))
BODIES = """g (float[b,4] x, bool c) => (float[b,5] y) {
    a = MatMul(x, w)
    y = If (c) <
        then_branch = t () => (float[b,5] p) { p = Neg(a) },
        else_branch = e () => (float[b,5] q) { r = Abs(a) q = Relu(r) }
    >
}"""


def test_bodies_are_walked_in_order() -> None:
    made = model(BODIES, {"w": RECIPE})
    assert [graph.name for graph in walk_protos(made.graph)] == ["g", "t", "e"]
    assert [node.op_type for node in nodes_of(made.graph)] == ["MatMul", "If", "Neg", "Abs", "Relu"]
    assert [body.name for body in bodies_of_proto(made.graph.node[1])] == ["t", "e"]
    assert not bodies_of_proto(made.graph.node[0])


def test_types_go_into_bodies_and_leave_recipes_alone() -> None:
    made = model(BODIES, {"w": RECIPE})
    typed = infer_types(made)
    found = {v.name: v.type.tensor_type for graph in walk_protos(typed.graph) for v in graph.value_info}
    assert found["a"].elem_type == found["r"].elem_type == TensorProto.FLOAT
    assert [dim.dim_param or dim.dim_value for dim in found["r"].shape.dim] == ["b", 5]
    assert Recipe.of_tensor(typed.graph.initializer[0]) == RECIPE
    assert not made.graph.value_info  # the model that came in is not touched


def test_a_shell_has_no_recipe_and_passes_the_checker() -> None:
    made = model(BODIES, {"w": RECIPE})
    branch = made.graph.node[1].attribute[0].g
    branch.initializer.append(RECIPE.to_tensor("w"))  # a body has one of the same name
    branch.node[0].input[0] = "m"
    branch.node.insert(0, helper.make_node("MatMul", ["x", "w"], ["m"]))
    copy = shell(made)
    onnx.checker.check_model(copy, full_check=True)
    assert not [t for graph in walk_protos(copy.graph) for t in graph.initializer]
    assert [value.name for value in copy.graph.input] == ["x", "c", "w", "w@body 1"]
    assert copy.graph.node[1].attribute[0].g.node[0].input[1] == "w@body 1"


@pytest.mark.parametrize(("opset", "left"), [(18, "Identity"), (21, "GroupNormalization")])
def test_group_normalization_of_opset_18_is_left_out_of_the_shell(opset: int, left: str) -> None:
    """ONNX rejects its scale for each group, which runtimes take."""
    size = 2 if opset == 18 else 4
    values = {"s": np.ones(size, np.float32), "b": np.zeros(size, np.float32)}
    text = "g (float[1,4,8] x) => (float[1,4,8] y) { y = GroupNormalization<num_groups = 2>(x, s, b) }"
    copy = shell(model(text, values, opset))
    assert [node.op_type for node in copy.graph.node] == [left]


def test_outputs_of_unknown_rank_are_left_out() -> None:
    made = model("g (float[4] x) => (float[4] y, float[4] z) { y = Neg(x) z = Abs(x) }")
    made.graph.output[1].type.tensor_type.ClearField("shape")
    assert [value.name for value in shell(made).graph.output] == ["y"]


def test_numbers_take_the_place_of_symbols_and_types_stay() -> None:
    graph = import_graph(
        model("g (float[2,3] x) => (float[n,m] y) { a = Transpose(x) b = Neg(a) y = Identity(b) }")
    )
    a, b = made_by(graph, "a").outputs[0], made_by(graph, "b").outputs[0]
    a.shape, a.dtype = ["n", "m"], np.float32
    b.shape, b.dtype = None, None
    fill_types(graph, export_model(graph))
    assert a.shape == [3, 2]
    assert (b.shape, dtype_of(b)) == ([3, 2], TensorProto.FLOAT)
    a.dtype = np.float16  # what is said already is not said anew
    fill_types(
        graph,
        export_model(
            import_graph(model("g (float[2,3] x) => (float[3,2] y) { a = Transpose(x) y = Neg(a) }"))
        ),
    )
    assert dtype_of(a) == TensorProto.FLOAT16
