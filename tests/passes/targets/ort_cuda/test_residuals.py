"""Residual sums and adaptive norms: what counts as one, and the reason where a sum cannot wait for its norm."""

from __future__ import annotations

import numpy as np
import pytest

from passes.graph.match import View
from passes.targets.ort_cuda.residuals import is_adaptive_norm, is_full, residual_sum
from tests.passes.graph_helpers import graph_of, made_by

HEAD = "g (float[2,t,4] x, float[2,t,4] rest, float[2,1,4] scale, float[2,1,4] shift, float[2,1,4] image)"
VALUES = {"w": np.ones(4, np.float32), "b": np.zeros(4, np.float32), "full": np.ones((2, 3, 4), np.float32)}


def graph(body: str, outputs: str = "float[2,t,4] y"):  # type: ignore[no-untyped-def]
    used = {key: value for key, value in VALUES.items() if f", {key}" in body}
    return graph_of(f"{HEAD} => ({outputs}) {{ {body} }}", used)


@pytest.mark.parametrize(
    ("norm", "adaptive"),
    [
        ("LayerNormalization(x, scale, shift)", True),
        ("LayerNormalization(x, w, b)", False),  # constants
        ("LayerNormalization(x, scale, b)", False),
        ("LayerNormalization(x, scale)", False),
        ("LayerNormalization<axis = 1>(x, scale, shift)", False),  # over tokens, too
        ("LayerNormalization(x, scale, rest)", False),  # a shift for every token
    ],
)
def test_a_norm_whose_scale_and_shift_are_computed_for_each_image(norm: str, adaptive: bool) -> None:
    assert is_adaptive_norm(made_by(graph(f"y = {norm}"), "y")) == adaptive


def test_values_of_its_own_for_every_token() -> None:
    made = graph("a = Add(x, rest) c = Add(x, image) d = Add(x, full) y = Add(a, c)")
    x, rest, _, _, image = made.inputs
    constant = made_by(made, "d").inputs[1]
    assert is_full(rest, x)
    assert not is_full(image, x)
    assert not is_full(constant, x)


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("s = Add(x, rest) y = LayerNormalization(s, w, b)", "float[2,t,4] y", None),
        (
            "s = Add(x, rest) y = LayerNormalization(s, w, b) z = Neg(s)",
            "float[2,t,4] y, float[2,t,4] z",
            None,
        ),
        ("s = Mul(x, rest) y = LayerNormalization(s, w, b)", "float[2,t,4] y", "is not a sum of two tensors"),
        (
            "s = Add(x, image) y = LayerNormalization(s, w, b)",
            "float[2,t,4] y",
            "is not a sum of two tensors",
        ),
        (
            "s = Add(x, rest) y = LayerNormalization(s, w, b)",
            "float[2,t,4] y, float[2,t,4] s",
            "is an output",
        ),
        (
            "s = Add(x, rest) z = Neg(s) y = LayerNormalization(s, w, b)",
            "float[2,t,4] y, float[2,t,4] z",
            "is read before the norm",
        ),
    ],
)
def test_a_sum_that_can_be_computed_where_the_norm_is(body: str, outputs: str, reason: str | None) -> None:
    made = graph(body, outputs)
    found = residual_sum(made_by(made, "y"), View(made))
    if reason is None:
        assert found is made_by(made, "s")
    else:
        assert isinstance(found, str)
        assert reason in found
