from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from diffc.validate.float32 import cpu_session, feed, float32_copy
from passes import Pipeline
from passes.importing.cast_unsupported import CastUnsupported
from tests.passes.graph_helpers import model, ops

X = np.random.default_rng(3).standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16)


def rewritten(equation: str, kind: str = "bfloat16") -> onnx.ModelProto:
    text = f'g ({kind}[2,3,4] x) => ({kind} y) {{ z = Einsum<equation = "{equation}">(x) y = Neg(z) }}'
    made = model(text)
    made.graph.output[0].type.tensor_type.ClearField("shape")
    return Pipeline([CastUnsupported()]).run(made, check=lambda before, after, step: "").model


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("abc->cab", ["Transpose", "Neg"]),
        ("a b c -> b c a", ["Transpose", "Neg"]),
        ("abc->ab", ["Cast", "Einsum", "Cast", "Neg"]),
        ("abc->acb", ["Transpose", "Neg"]),
    ],
)
def test_moves_become_transposes_and_sums_compute_in_float32(equation: str, expected: list[str]) -> None:
    made = rewritten(equation)
    assert ops(made) == expected
    copy = float32_copy(made)
    with cpu_session(copy) as session:
        (found,) = session.run(feed(copy, {"x": X})).values()
    want = -np.einsum(equation, X.astype(np.float32))
    assert np.allclose(found, want, rtol=2e-2)


def test_types_that_the_schema_has_are_left_alone() -> None:
    assert ops(rewritten("abc->cab", "float16")) == ["Einsum", "Neg"]
