"""Element types from schemas, against ONNX's own inference on nodes of many kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from passes.base import PassError
from passes.graph.from_onnx import import_graph
from passes.graph.types import (
    compute_type,
    constants,
    fixed_type,
    float_type,
    schema_of,
    set_output_types,
    slots,
)
from passes.weights.recipe import dtype_of
from tests.passes.graph_helpers import model

NODES = {
    "Add": "y = Add(x, x)",
    "Cast": "y = Cast<to = 7>(x)",
    "CastLike": "y = CastLike(x, i)",
    "Constant of floats": "y = Constant<value_floats = [1.5]>()",
    "Constant of a tensor": "y = Constant<value = int8[2] {1, 2}>()",
    "Constant": "y = Constant<value_ints = [3, 4]>()",
    "ConstantOfShape": "y = ConstantOfShape(s)",
    "ConstantOfShape of a type": "y = ConstantOfShape<value = int64[1] {3}>(s)",
    "Shape": "y = Shape(x)",
    "Greater": "y = Greater(x, x)",
    "Where": "y = Where(b, x, x)",
    "MatMul": "y = MatMul(m, m)",
    "LayerNormalization": "y = LayerNormalization(m, w)",
    "QuantizeLinear with a zero point": "y = QuantizeLinear(x, f, z)",
    "QuantizeLinear": "y = QuantizeLinear(x, f)",
    "QuantizeLinear of a type": "y = QuantizeLinear<output_dtype = 17>(x, f)",
    "DequantizeLinear": "y = DequantizeLinear(q, f)",
    "TopK": "v, y = TopK(x, s)",
    "EyeLike": "y = EyeLike<dtype = 1>(m)",
    "RandomNormalLike": "y = RandomNormalLike(m)",
    "If": """y = If (c) <then_branch = t () => (int64[1] p) { p = Identity(s) },
        else_branch = e () => (int64[1] r) { r = Neg(s) }>""",
}
HEAD = "g (float16[4] x, int32[4] i, bool[4] b, bool c, float16[3,3] m, int8[4] q, int64[1] s)"
VALUES: dict[str, Any] = {"f": np.float16(0.5), "z": np.int8(0), "w": np.ones(3, np.float16)}


@pytest.mark.parametrize("name", NODES)
def test_outputs_have_the_types_that_onnx_infers(name: str) -> None:
    used = {key: value for key, value in VALUES.items() if f", {key}" in NODES[name]}
    made = model(f"{HEAD} => (float u) {{ {NODES[name]} u = Cast<to = 1>(y) }}", used)
    inferred = onnx.shape_inference.infer_shapes(made)
    want = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    graph = import_graph(made)
    node = next(n for n in graph.nodes if any(t.name == "y" for t in n.outputs))
    for tensor in node.outputs:
        tensor.dtype = np.float64 if node.op != "If" else None  # what an exporter wrote is not trusted
    set_output_types(node)
    assert {t.name: dtype_of(t) for t in node.outputs} == {t.name: want[t.name] for t in node.outputs}


def test_operators_of_other_domains_keep_what_they_have() -> None:
    out = gs.Variable("y", np.float16)
    set_output_types(gs.Node("Add", "n", {}, [gs.Variable("x", np.float32)] * 2, [out], domain="trt"))
    set_output_types(gs.Node("NoSuchOperator", "n", {}, [gs.Variable("x", np.float32)], [out]))
    assert dtype_of(out) == TensorProto.FLOAT16
    assert schema_of("NoSuchOperator") is None


def test_inputs_that_must_agree() -> None:
    made = model(
        f"{HEAD} => (float16[4] y, float16[2] z) {{ y = Where(b, x, x) z = Gather(x, j) }}",
        {"j": np.array([1, 2])},
    )
    where, gather = import_graph(made).nodes
    for node, expected in ((where, ["B", "T", "T"]), (gather, ["T", "Tind"])):
        schema = schema_of(node.op)
        assert schema is not None
        assert [slot.type_str for slot in slots(node, schema)] == expected


def test_types_by_name() -> None:
    assert fixed_type("tensor(bfloat16)") == TensorProto.BFLOAT16
    assert fixed_type("T") is None
    assert float_type("float16") == TensorProto.FLOAT16
    with pytest.raises(PassError, match=r"unknown type 'half'\. Known: float32, float16, bfloat16"):
        float_type("half")


@pytest.mark.parametrize(
    ("inputs", "weights", "expected"),
    [
        ("float16[2] x, bfloat16[2] t, bfloat16[2] u", [], TensorProto.BFLOAT16),
        ("float[2] x", [np.float16, np.float16, np.float32], TensorProto.FLOAT16),
        ("float[2] x", [np.float32], TensorProto.FLOAT),
    ],
)
def test_the_compute_type_is_that_of_the_inputs_then_of_the_weights(
    inputs: str, weights: list[Any], expected: int
) -> None:
    values = {f"w{i}": np.ones(2, dtype) for i, dtype in enumerate(weights)}
    reads = " ".join(f"c{i} = Cast<to = 1>({name})" for i, name in enumerate(values))
    graph = import_graph(model(f"g ({inputs}) => (float[2] y) {{ {reads} y = Cast<to = 1>(x) }}", values))
    assert compute_type(graph) == expected
    assert [tensor.name for tensor in constants(graph)] == list(values)
