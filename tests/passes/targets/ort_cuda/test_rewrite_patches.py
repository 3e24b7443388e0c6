"""rewrite-patches: patch embeddings as products."""

from typing import Any

import numpy as np
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.lift_bias import LiftBias
from passes.targets.ort_cuda.rewrite_patches import RewritePatches
from tests.passes.graph_helpers import (
    apply,
    check_same,
    model,
    ops,
    refused,
    typed,
)
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(20)


def patches(inside: str = "", conv: str = "strides = [2, 2]", dtype: str = "float") -> Any:
    text = f"""g ({dtype}[b,3,h,w] x) => ({dtype}[b,t,5] y, int64[1] n)
        <int64[3] shape = {{0, 5, -1}}> {{
        c = Conv<{conv}>(x, k, bias)
        r = Reshape(c, shape) y = Transpose<perm = [0, 2, 1]>(r)
        h1 = Shape<start = 2, end = 3>(c) w1 = Shape<start = 3>(c) n = Mul(h1, w1) {inside}
    }}"""
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    return typed(model(text, {"k": random(5, 3, 2, 2, dtype=kind), "bias": random(5, dtype=kind)}))


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_patches(dtype: str) -> None:
    before = patches(dtype=dtype)
    result = apply(before, RewritePatches(), LiftBias(), RemoveUnused())
    assert result.records[0].changed == result.records[1].changed == 1
    assert "Conv" not in ops(result.model)
    kind = np.float32 if dtype == "float" else np.float16
    for size in ((2, 3, 6, 4), (1, 3, 2, 10)):
        check_same(before, result.model, {"x": random(*size, dtype=kind)}, 1e-6 if dtype == "float" else 1e-3)


_READ = "something else than its tokens and sizes is read"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"conv": "strides = [1, 1]"}, None),
        ({"conv": "strides = [2, 2], pads = [0, 0, 1, 1]"}, None),
        ({"conv": "strides = [2, 2], dilations = [2, 2]"}, None),
        ({"conv": 'strides = [2, 2], auto_pad = "SAME_UPPER"'}, None),
        ({"inside": "z = Relu(c)"}, _READ),
        ({"inside": "z = Shape<start = 1, end = 2>(c)"}, _READ),
        ({"inside": "z = Relu(r)"}, "what it gives is not transposed to (batch, tokens, channels)"),
    ],
)
def test_must_not_fire(options: dict[str, str], reason: str | None) -> None:
    assert refused(patches(**options), RewritePatches()) == ({reason} if reason else set())
