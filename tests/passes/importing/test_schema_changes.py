"""What opsets changed, read from schemas: nothing is unknown on the way that we go, and types are held per node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from passes.importing.rewrite_opset import NEWEST
from passes.importing.schema_changes import changes, schema_of, steps_of, type_problem


@pytest.mark.parametrize("source", range(17, NEWEST))
def test_every_schema_change_is_known(source: int) -> None:
    unknown = [change for change in changes(source, NEWEST) if change.kind == "unknown"]
    assert not unknown


def test_the_table_tells_real_changes_from_wider_types() -> None:
    table = {(change.op, change.since): change.kind for change in changes(17, 23)}
    assert table["ReduceMean", 18] == table["DFT", 20] == table["GroupNormalization", 21] == "adapter"
    assert table["Resize", 18] == table["AveragePool", 19] == "reviewed"
    assert table["Reshape", 19] == table["Conv", 22] == table["OptionalHasElement", 18] == "same"
    assert "MatMul" not in {op for op, _ in table}


@pytest.mark.parametrize("op", ["ReduceMean", "Cast", "Upsample", "Scatter", "Softmax"])
@pytest.mark.parametrize("opset", [7, 9, 13, 18, 23])
def test_the_schema_of_an_opset_is_the_one_of_onnx(op: str, opset: int) -> None:
    found = schema_of(op, opset)
    try:
        want = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        assert found is None
        return
    assert found is not None
    assert (found.name, found.since_version) == (want.name, want.since_version)


def test_an_operator_that_went_goes_on_as_its_successor() -> None:
    steps = [(step.op, step.since) for step in steps_of("Upsample", 8, 18)]
    assert steps[:2] == [("Upsample", 9), ("Upsample", 10)]
    assert ("Resize", 18) in steps
    assert all(since > 10 for op, since in steps if op == "Resize")
    assert not list(steps_of("NoSuchOperator", 8, 18))


def node(op: str, *dtypes: Any) -> gs.Node:
    return gs.Node(
        op, "n", {}, [gs.Variable(f"x{i}", dtype) for i, dtype in enumerate(dtypes)], [gs.Variable("y")]
    )


@pytest.mark.parametrize(
    ("made", "opset", "said"),
    [
        (node("Add", np.float32, np.float32), 13, None),
        (
            node("Add", np.float32, np.float16),
            13,
            "its input 'B' must be tensor(float) as others, not tensor(float16),",
        ),
        (node("Add", np.float32, None), 13, None),  # not known: nothing is said
        (node("Relu", np.int32), 13, "its input 'X' may not be tensor(int32)"),
        (node("Relu", np.int32), 14, None),
    ],
)
def test_types_that_a_schema_does_not_take(made: gs.Node, opset: int, said: str | None) -> None:
    schema = schema_of(made.op, opset)
    assert schema is not None
    assert type_problem(made, schema) == said
