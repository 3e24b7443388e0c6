"""fuse-rotary: which rotations become one operator."""

from typing import Any

import numpy as np
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fuse_rotary import FuseRotary
from tests.passes.graph_helpers import (
    apply,
    check_same,
    error,
    model,
    ops,
    refused,
    run_ort,
    typed,
)
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(12)


def rotary(kind: str = "float", double: str = "Expand(cu, two)", first: str = "Neg(odd)") -> str:
    """Rotary embedding as diffusers has it for FLUX, its tables made in the graph."""
    code = "1" if kind == "float" else "10"
    return f"""g ({kind}[b,s,3,8] x, float[s,4] a) => ({kind}[b,s,3,8] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] i2 = {{2}}, int64[1] last = {{-1}},
         int64[1] four = {{4}}, int64[3] two = {{1, 1, 2}}, int64[2] flat = {{-1, 8}}, int64[2] lead = {{0, 2}},
         int64[5] pairs = {{0, 0, 3, 4, 2}}, int64[4] whole = {{0, 0, 3, 8}}> {{
        c = Cos(a) cu = Unsqueeze(c, last) ce = {double} cr = Reshape(ce, flat)
        d = Sin(a) du = Unsqueeze(d, last) de = Expand(du, two) dr = Reshape(de, flat)
        ct = Unsqueeze(cr, lead) dt = Unsqueeze(dr, lead)
        p = Reshape(x, pairs)
        e1 = Slice(p, zero, one, four) even = Squeeze(e1, four)
        o1 = Slice(p, one, i2, four) odd = Squeeze(o1, four)
        n = {first} nu = Unsqueeze(n, last) eu = Unsqueeze(even, last)
        j = Concat<axis = -1>(nu, eu) t = Reshape(j, whole)
        xw = Cast<to = 1>(x) tw = Cast<to = 1>(t)
        l = Mul(xw, ct) r = Mul(tw, dt) sum = Add(l, r)
        y = Cast<to = {code}>(sum)
    }}"""


@pytest.mark.parametrize(("kind", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_rotary(kind: str, dtype: Any) -> None:
    before = typed(model(rotary(kind)))
    result = apply(before, FuseRotary(), RemoveUnused())
    assert ops(result.model).count("RotaryEmbedding") == 1
    assert not {"Neg", "Concat", "Mul", "Squeeze"} & set(ops(result.model))
    feeds = {"x": random(2, 5, 3, 8, dtype=dtype), "a": 3 * random(5, 4)}
    check_same(before, result.model, feeds, 1e-6 if kind == "float" else 1e-3, run_ort)
    turned = feeds | {"a": -feeds["a"]}
    assert error(run_ort(result.model, turned)[0], run_ort(before, feeds)[0]) > 0.1


@pytest.mark.parametrize("seed", range(6))
def test_operands_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = rotary()
    for operands in ("xw, ct", "tw, dt", "l, r"):
        if rng.integers(2):
            text = text.replace(f"({operands})", f"({', '.join(operands.split(', ')[::-1])})")
    before = typed(model(text))
    result = apply(before, FuseRotary(), RemoveUnused())
    assert ops(result.model).count("RotaryEmbedding") == 1
    check_same(before, result.model, {"x": random(2, 5, 3, 8), "a": 3 * random(5, 4)}, 1e-6, run_ort)


_UNDOUBLED = rotary(double="Concat<axis = -1>(cu, minus)").replace(
    "cu = U", "cv = Unsqueeze(c, last) minus = Neg(cv) cu = U"
)
_DOUBLE = (
    rotary("double")
    .replace("to = 10>", "to = 11>")
    .replace("to = 1>", "to = 11>")
    .replace("float[s,4]", "double[s,4]")
)
_HEADS = rotary().replace("[b,s,3,8]", "[b,s,h,8]").replace("{0, 0, 3, ", "{0, 0, -1, ")
_TURNED = "the pairs are not turned to (-x[1], x[0])"
_TABLES = "cos and sin are not tables (1, tokens, 1, size) of doubled values"


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (_UNDOUBLED, _TABLES),
        (rotary(first="Identity(odd)"), None),
        (rotary().replace("Slice(p, one, i2, four)", "Slice(p, zero, one, four)"), _TURNED),
        (_DOUBLE, "it is not computed in float32"),
        (_HEADS, "x is not (batch, tokens, heads, size) with known heads and size"),
    ],
)
def test_must_not_fire(graph: str, reason: str | None) -> None:
    assert refused(typed(model(graph)), FuseRotary()) == ({reason} if reason else set())
