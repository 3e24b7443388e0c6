"""fuse-rms-norm: which norms are recognised, and the same numbers."""

from typing import Any

import numpy as np
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fuse_rms_norm import FuseRmsNorm
from tests.passes.graph_helpers import (
    apply,
    check_same,
    error,
    model,
    ops,
    refused,
    run_ort,
)
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(11)


def rms_norm(kind: str = "float", axis: int = -1, exponent: float = 2.0, also: str = "") -> str:
    code, extra = ("1" if kind == "float" else "10"), (f", {kind}[b,s,8] z" if also else "")
    return f"""g ({kind}[b,s,8] x) => ({kind}[b,s,8] y{extra})
        <float two = {{{exponent}}}, float eps = {{0.001}}, int64[1] last = {{{axis}}}, {kind}[8] w> {{
        wide = Cast<to = 1>(x)
        power = Pow(wide, two)
        mean = ReduceMean(power, last)
        total = Add(mean, eps)
        root = Sqrt(total)
        inverse = Reciprocal(root)
        again = Cast<to = 1>(x)
        product = Mul(again, inverse)
        back = Cast<to = {code}>(product)
        y = Mul(back, w)
        {also}
    }}"""


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"), [("float", np.float32, 1e-6), ("float16", np.float16, 1e-3)]
)
def test_rms_norm(kind: str, dtype: Any, bound: float) -> None:
    before = model(rms_norm(kind), {"w": random(8, dtype=dtype)})
    result = apply(before, FuseRmsNorm(), RemoveUnused())
    assert ops(result.model) == ["RMSNormalization"]
    x = {"x": 3 * random(2, 5, 8, dtype=dtype)}
    check_same(before, result.model, x, bound, run_ort)
    (got,) = run_ort(result.model, x)
    assert error(got, run_ort(before, {"x": 2 * x["x"]})[0]) > 1e-5  # eps matters: the comparison can fail


@pytest.mark.parametrize("seed", range(8))
def test_operands_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = rms_norm()
    for operands in ("mean, eps", "again, inverse", "back, w"):
        if rng.integers(2):
            text = text.replace(f"({operands})", f"({', '.join(operands.split(', ')[::-1])})")
    before = model(text, {"w": random(8)})
    result = apply(before, FuseRmsNorm(), RemoveUnused())
    assert ops(result.model) == ["RMSNormalization"]
    check_same(before, result.model, {"x": random(2, 5, 8)}, 1e-6, run_ort)


_WEIGHT = "the weight is not a constant along the last axis"


@pytest.mark.parametrize(
    ("graph", "opset", "reason"),
    [
        (rms_norm(axis=1), 23, "the mean is not over the last axis, or does not keep it"),
        (rms_norm(exponent=3.0), 23, "the power is not 2, or epsilon is not a constant"),
        (
            rms_norm().replace("y = Mul(back, w)", "n = Neg(w) y = Mul(back, n)"),
            23,
            _WEIGHT,
        ),
        (rms_norm(), 22, "opset 22 has no RMSNormalization"),
        (rms_norm(also="z = Identity(back)"), 23, None),
    ],
)
def test_must_not_fire(graph: str, opset: int, reason: str | None) -> None:
    made = model(graph, {"w": random(8)}, opset=opset)
    assert refused(made, FuseRmsNorm()) == ({reason} if reason else set())
