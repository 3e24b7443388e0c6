"""inline-functions: calls become nodes, in bodies too; what cannot be inlined is refused."""

import numpy as np
import onnx

from passes.canonical.inline_functions import InlineFunctions
from passes.targets.ort.add_trt_functions import AddTrtFunctions
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, ops, recipes
from tests.passes.trt_helpers import trt_model

NESTED = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[b, 3] x, bool c) => (float[b, 3] y, float[b, 3] z) {
    a = own.F:one <k = 2> (x, w)
    y = own.F:two (a, w)
    z = If (c) <
        then_branch = h () => (float[b, 3] p) { p = own.F:two (a, w) },
        else_branch = k () => (float[b, 3] q) { q = Neg (a) }
    >
}
<domain: "own", opset_import: ["" : 21, "own" : 1], overload: "one"> F <k> (x, b) => (y) {
    t = Add (x, b)
    n = Constant <value_int: int = @k> ()
    f = CastLike (n, t)
    u = Mul (t, f)
    y = own.G (u, b)
}
<domain: "own", opset_import: ["" : 21]> G (x, b) => (y) { t = Sub (x, b)  y = Abs (t) }
<domain: "own", opset_import: ["" : 21], overload: "two"> F (x, b) => (y) { t = Add (x, b)  y = Exp (t) }
"""


def nested() -> onnx.ModelProto:
    made = onnx.parser.parse_model(NESTED)
    weight = np.random.default_rng(4).standard_normal(3).astype(np.float32)
    made.graph.initializer.append(Recipe.of_array(weight).to_tensor("w"))
    return made


def test_overloads_calls_in_functions_and_calls_in_bodies() -> None:
    made = nested()
    result = apply(made, InlineFunctions())
    assert result.records[0].notes == ("3 calls of 2 functions",)
    assert list(result.model.functions) == []
    assert ops(result.model) == ["Add", "Constant", "CastLike", "Mul", "Sub", "Abs", "Add", "Exp", "If"]
    assert list(recipes(result.model)) == ["w"]
    names = [node.name for node in result.model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    rng = np.random.default_rng(5)
    for condition in (True, False):
        feeds = {"x": rng.standard_normal((2, 3)).astype(np.float32), "c": np.array(condition)}
        check_same(made, result.model, feeds)


def test_a_function_of_another_opset_is_refused() -> None:
    made = nested()
    made.functions[1].opset_import[0].version = 20
    result = apply(made, InlineFunctions())
    assert ops(result.model) == ["Add", "Constant", "CastLike", "Mul", "G", "Add", "Exp", "If"]
    assert [(r.node, r.reason) for r in result.records[0].refusals] == [
        ("own::G", "it is of opset 20, and the model of 21")
    ]


def test_functions_for_operators_of_tensorrt_stay() -> None:
    made = trt_model(
        "g (float[2, 32] x) => (float[2, 32] y) { y = trt.TRT_FP4QDQ(x) }",
    )
    with_function = apply(made, AddTrtFunctions()).model
    result = apply(with_function, InlineFunctions())
    assert result.changed == 0
    assert [function.name for function in result.model.functions] == ["TRT_FP4QDQ"]
