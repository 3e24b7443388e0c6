"""fuse-residual: products that go into a Gemm with what they are added to."""

from typing import Any

import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fuse_residual import FuseResidual
from tests.passes.graph_helpers import (
    apply,
    model,
    ops,
    refused,
    typed,
)
from tests.passes.targets.ort_cuda.graphs import check_reaches, seeded

random, C = seeded(18), 8


def residual(inside: str = "p = MatMul(x, m) y = Add(r, p)", batch: str = "1") -> Any:
    text = f"""g (float[{batch},s,6] x, float[{batch},s,8] r) => (float[{batch},s,8] y) {{ {inside} }}"""
    return typed(model(text, {"m": random(6, C), "c": random(1, 5, C), "row": random(1, 1, C)}))


@pytest.mark.parametrize(
    "inside",
    ["p = MatMul(x, m) y = Add(r, p)", "n = Neg(m) p = MatMul(x, n) y = Add(p, r)"],
)
def test_residual_goes_into_the_product(inside: str) -> None:
    before = residual(inside)
    result = apply(before, FuseResidual(), RemoveUnused())
    assert result.changed > 0
    assert {"MatMul", "Add"}.isdisjoint(ops(result.model))
    check_reaches(before, result.model, {"x": random(1, 5, 6), "r": random(1, 5, C)}, 1e-6)


_SUM = "p = MatMul(x, m) y = Add(r, p)"


_ROW = "what is added to the product is not (1, tokens, channels)"


@pytest.mark.parametrize(
    ("inside", "batch", "reason"),
    [
        (_SUM, "2", "the batch is not 1"),
        (_SUM, "b", "the batch is not 1"),
        ("p = MatMul(x, m) y = Add(c, p)", "1", None),  # a constant
        ("p = MatMul(x, m) t = Add(r, p) y = Add(t, p)", "1", "something else reads the product"),
        ("p = MatMul(x, m) y = Mul(r, p)", "1", None),
        (
            "i = Neg(row) p = MatMul(x, m) q = Add(p, i) y = Mul(q, r)",
            "1",
            _ROW,
        ),
    ],
)
def test_must_not_fire(inside: str, batch: str, reason: str | None) -> None:
    assert refused(residual(inside, batch), FuseResidual()) == ({reason} if reason else set())
