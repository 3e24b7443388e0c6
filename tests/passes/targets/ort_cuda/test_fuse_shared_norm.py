"""fuse-shared-norm: norms with constant scales, and adaptive ones over few tokens."""

from typing import Any

import numpy as np
import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.fuse_adaptive_norm import FuseAdaptiveNorm
from passes.targets.ort_cuda.fuse_shared_norm import FuseSharedNorm
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
from tests.passes.targets.ort_cuda.graphs import check_reaches, seeded

random, C = seeded(41), 8


def normed(inside: str, batch: str = "b", tokens: str = "s") -> Any:
    per_image = ", ".join(f"float[{batch},1,8] {name}" for name in ("g", "s1", "t1"))
    text = f"""g (float[{batch},{tokens},8] x, float[{batch},{tokens},8] v, {per_image})
        => (float[{batch},{tokens},8] y, float[{batch},{tokens},8] k) {{
        p = MatMul(v, m) q = Add(p, bias) d = Mul(g, q) {inside} k = Neg(a)
    }}"""
    weights = {"ones": np.ones(C, np.float32), "gamma": random(C), "beta": random(C)}
    return typed(model(text, weights | {"bias": random(C), "m": random(C, C)}))


ADAPTIVE = (
    "a = Add(x, d) n = LayerNormalization<axis = -1, epsilon = 0.01>(a, ones) o = Mul(n, s1) y = Add(o, t1)"
)
STEPS = (FuseAdaptiveNorm(), RemoveUnused(), FuseSharedNorm(), RemoveUnused())


@pytest.mark.parametrize("batch", ["b", "3"])
def test_norms_over_few_tokens(batch: str) -> None:
    before = normed(ADAPTIVE, batch, "text")
    result = apply(before, *STEPS)
    assert result.records[2].changed == 1
    assert ops(result.model).count("SkipLayerNormalization") == 1
    assert ops(result.model).count("LayerNormalization") == 0
    feeds = {name: random(3, 5, C) for name in ("x", "v")} | {n: random(3, 1, C) for n in ("g", "s1", "t1")}
    check_reaches(before, result.model, feeds, 1e-6)


@pytest.mark.parametrize(
    "inside",
    [
        "a = Add(x, d) y = LayerNormalization<axis = -1, epsilon = 0.01>(a, gamma, beta)",
        "a = Add(d, x) y = LayerNormalization<axis = 2, epsilon = 0.01>(a, gamma)",
        "a = Add(x, q) w = LayerNormalization(a, gamma, beta) z = Mul(w, g) u = Mul(z, s1) y = Add(u, t1)",
        "a = Add(q, x) w = LayerNormalization(a, gamma) z = Mul(w, g) u = Mul(z, s1) y = Add(u, t1)",
    ],
)
def test_norms_with_constant_scale(inside: str) -> None:
    before = normed(inside)
    result = apply(before, RemoveUnused(), FuseSharedNorm(), RemoveUnused())
    found = ops(result.model)
    assert (found.count("SkipLayerNormalization"), found.count("LayerNormalization")) == (1, 0)
    assert found.count("Add") == 1  # the bias went into the norm where nothing stands between
    feeds = {name: random(2, 5, C) for name in ("x", "v")} | {n: random(2, 1, C) for n in ("g", "s1", "t1")}
    wanted = {name: feeds[name] for name in {i.name for i in before.graph.input}}
    check_same(before, result.model, wanted, 1e-6)
    moved = wanted | {"x": 1.1 * wanted["x"]}
    assert error(run_ort(result.model, moved)[0], run_ort(before, wanted)[0]) > 1e-3


_NO_SUM = "its input is not a sum of two tensors (batch, tokens, channels)"
_EARLY = ADAPTIVE.replace("a = Add(x, d) ", "a = Add(x, d) z = Sqrt(a) ").replace("o, t1", "o, z")


_READ = "the sum before it is read before the norm"


@pytest.mark.parametrize(
    ("inside", "tokens", "reason"),
    [
        (ADAPTIVE, "s", None),  # many tokens: fuse-skip-norm's
        (ADAPTIVE.replace("x, d", "x, t1"), "text", _NO_SUM),  # one row for all tokens
        (_EARLY, "text", _READ),
        ("a = Add(x, d) y = LayerNormalization<axis = 1>(a, m)", "s", None),
        ("a = Mul(x, d) y = LayerNormalization(a, gamma)", "s", _NO_SUM),
        (
            "a = Add(x, d) e = Abs(a) w = LayerNormalization(a, gamma) y = Mul(w, e)",
            "s",
            _READ,
        ),
    ],
)
def test_must_not_fire(inside: str, tokens: str, reason: str | None) -> None:
    made = normed(inside, tokens=tokens)
    assert refused(made, *STEPS[:3]) == ({reason} if reason else set())


def test_a_sum_that_is_an_output_stays() -> None:
    text = """g (float[b,s,8] x, float[b,s,8] v) => (float[b,s,8] y, float[b,s,8] a)
        { a = Add(x, v) y = LayerNormalization(a, w) }"""
    assert refused(typed(model(text, {"w": random(C)})), FuseSharedNorm()) == {
        "the sum before it is an output"
    }
