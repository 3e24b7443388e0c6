"""merge-row-products: rows of a Split and their constants."""

from typing import Any

import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.merge_row_products import MergeRowProducts
from tests.passes.graph_helpers import (
    apply,
    model,
    ops,
    refused,
)
from tests.passes.targets.ort_cuda.graphs import check_reaches, rows, seeded

random = seeded(19)


def vectors() -> dict[str, Any]:
    return {"b0": random(4), "b1": random(4)}


def test_products_of_rows() -> None:
    before = rows(vectors())
    result = apply(before, MergeRowProducts(), RemoveUnused())
    assert result.records[0].changed == 2
    assert ops(result.model).count("Mul") == 1 + 1  # that of the rows, and that of two computed tensors
    check_reaches(before, result.model, {"x": random(1, 12), "one": random(4)}, 1e-6)


_FEW = "fewer than two rows are multiplied by a constant [channels] of their type"


@pytest.mark.parametrize(
    "products",
    [
        "e0 = Mul(f0, b0) u2 = Unsqueeze(r2, zero) e2 = Neg(u2)",  # one alone
        "e0 = Mul(f0, b0) u2 = Unsqueeze(r2, zero) v2 = Neg(u2) e2 = Mul(v2, b1)",  # not the row itself
        "c0 = Neg(b0) e0 = Mul(f0, c0) u2 = Unsqueeze(r2, zero) e2 = Mul(u2, b1)",  # not a constant
    ],
)
def test_must_not_fire(products: str) -> None:
    assert refused(rows(vectors(), products), MergeRowProducts()) == {_FEW}


def test_a_split_of_another_axis_is_no_refusal() -> None:
    made = model(
        """g (float[3,4] x) => (float[3,1] y, float[3,3] z) <int64[2] sizes = {1, 3}, float[1] w = {2}>
        { a, z = Split<axis = 1>(x, sizes) y = Mul(a, w) }"""
    )
    assert refused(made, MergeRowProducts()) == set()
