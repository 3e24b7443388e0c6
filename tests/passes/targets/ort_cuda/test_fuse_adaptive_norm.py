"""fuse-adaptive-norm: scale and shift of each image."""

from typing import Any

import numpy as np
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fuse_adaptive_norm import FuseAdaptiveNorm
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

random = seeded(13)


def adaptive(shape: str = "b,1,16", gamma: str = "ones", kind: str = "float", also: str = "") -> str:
    extra = f", {kind}[b,s,16] z" if also else ""
    return f"""g ({kind}[b,s,16] x, {kind}[{shape}] scale, {kind}[{shape}] shift) => ({kind}[b,s,16] y{extra})
        <{kind}[16] {gamma}> {{
        n = LayerNormalization<axis = -1, epsilon = 0.01>(x, {gamma})
        p = Mul(n, scale)
        y = Add(shift, p)
        {also}
    }}"""


@pytest.mark.parametrize("also", ["", "q = Mul(scale, n) z = Add(q, scale)"])
@pytest.mark.parametrize(
    ("kind", "dtype", "bound"), [("float", np.float32, 1e-6), ("float16", np.float16, 2e-3)]
)
def test_adaptive_norm(kind: str, dtype: Any, bound: float, also: str) -> None:
    before = model(adaptive(kind=kind, also=also), {"ones": np.ones(16, dtype)})
    result = apply(before, FuseAdaptiveNorm(), RemoveUnused())
    assert ops(result.model) == ["LayerNormalization"] * (2 if also else 1)
    for batch, tokens in ((3, 5), (1, 7), (2, 2)):
        feeds = {"x": random(batch, tokens, 16, dtype=dtype)}
        feeds |= {name: random(batch, 1, 16, dtype=dtype) for name in ("scale", "shift")}
        check_same(before, result.model, feeds, bound, run_ort)
        swapped = feeds | {"scale": feeds["shift"], "shift": feeds["scale"]}
        assert error(run_ort(result.model, swapped)[0], run_ort(before, feeds)[0]) > 0.1


_SHAPE = "scale and shift are not (batch, 1, channels) in the type of the norm"


_OTHER = "the norm has a bias of its own, or is not over the last of three axes"


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (adaptive("b,s,16"), _SHAPE),
        (adaptive("1,1,16"), _SHAPE),
        (adaptive(gamma="w"), "the norm has a scale of its own"),
        (
            adaptive().replace("(x, ones)", "(x, ones, w)"),
            _OTHER,
        ),
        (
            adaptive().replace("axis = -1", "axis = 1"),
            _OTHER,
        ),
        (adaptive(also="z = Identity(p)"), None),
    ],
)
def test_must_not_fire(graph: str, reason: str | None) -> None:
    values = {"ones": np.ones(16, np.float32), "w": random(16)}
    made = model(graph, {name: value for name, value in values.items() if name in graph})
    assert refused(made, FuseAdaptiveNorm()) == ({reason} if reason else set())
