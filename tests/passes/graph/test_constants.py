"""Constants before chains that relabel or pad them, against what ONNX Runtime makes of the same chains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from passes.graph.constants import constant_feeding, constant_ints, relabelled, reshaped, resolved
from passes.graph.match import View
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import graph_of, made_by, model, pick, run_ort

W = np.random.default_rng(5).standard_normal((4, 6)).astype(np.float32)


@pytest.mark.parametrize("seed", range(40))
def test_the_constant_under_a_random_chain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps, values, padded = list[str](), dict[str, Any](), 0
    for number in range(int(rng.integers(4))):
        before, after = f"t{number}", f"t{number + 1}"
        step = (
            pick(rng, "Identity", "Cast", "Reshape")
            if padded
            else pick(rng, "Identity", "Cast", "Reshape", "Pad")
        )
        if step == "Reshape" and not padded:
            values[f"shape{number}"] = np.array(pick(rng, [6, 4], [-1, 3], [24], [0, 2, 3]))
            if values[f"shape{number}"].tolist() == [0, 2, 3]:
                steps.append(f"r{number} = Reshape({before}, matrix{number})")
                values[f"matrix{number}"], before = np.array([4, 6]), f"r{number}"
            steps.append(f"{after} = Reshape({before}, shape{number})")
        elif step == "Cast":
            steps.append(f"{after} = Cast<to = 1>({before})")
        elif step == "Pad":
            # The last axis alone, after the shape is a matrix again.
            steps.append(
                f"m{number} = Reshape({before}, m_shape{number}) {after} = Pad(m{number}, pads{number})"
            )
            padded = int(rng.integers(1, 4))
            values |= {f"m_shape{number}": np.array([4, 6]), f"pads{number}": np.array([0, 0, 0, padded])}
        else:
            steps.append(f"{after} = Identity({before})")
    last = f"t{len(steps)}"
    names = [step.split(" = ")[0] for step in steps]
    last = (
        names[-1]
        if names and "Pad" not in steps[-1]
        else (f"t{steps[-1].split(' t')[1].split(' ')[0]}" if steps else "t0")
    )
    text = f"g (float[1] unused) => (float y) {{ {' '.join(steps)} y = Neg({last}) }}"
    made = {**values, "t0": Recipe.of_array(W)}
    found = constant_feeding(made_by(graph_of(text, made), "y").inputs[0])
    (want,) = run_ort(model(text, made), {"unused": np.zeros(1, np.float32)})
    assert found is not None
    assert found.name == "t0"
    got = evaluate(found.recipe)
    if found.padded:
        assert found.padded == got.shape[-1] + padded
        got = np.pad(got, [(0, 0)] * (got.ndim - 1) + [(0, padded)])
    assert np.array_equal(-got, want)


@pytest.mark.parametrize(
    "chain",
    [
        "y = Neg(w)",  # computes
        "y = Reshape(w, target)",  # a shape that is computed
        "y = Pad(w, front)",  # padded before
        "y = Pad(w, back, one)",  # padded with ones
        'y = Pad<mode = "reflect">(w, back)',
        "p = Pad(w, back) y = Pad(p, back)",  # twice
    ],
)
def test_other_chains_end_in_no_constant(chain: str) -> None:
    values = {"front": np.array([0, 1, 0, 1]), "back": np.array([0, 0, 0, 2]), "one": np.float32(1)}
    used = {key: value for key, value in values.items() if key in chain}
    text = f"g (int64[2] target) => (float z) {{ {chain} z = Identity(y) }}"
    assert constant_feeding(made_by(graph_of(text, {"w": W, **used}), "z").inputs[0]) is None


def test_constant_nodes_count_as_constants() -> None:
    text = "g (float[1] x) => (float[2] y) { c = Constant<value = float[2] {1.5, -2}>() y = Identity(c) }"
    found = constant_feeding(made_by(graph_of(text), "y").inputs[0])
    assert found is not None
    assert evaluate(found.recipe).tolist() == [1.5, -2]


@pytest.mark.parametrize("seed", range(60))
def test_targets_of_reshape(seed: int) -> None:
    """Every target that ONNX Runtime takes gives the shape that it gives; every other one none."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4], rng.integers(1, 4)))
    target = [int(n) for n in rng.choice([0, -1, 1, 2, 3, 4, 6, math.prod(shape)], rng.integers(1, 4))]
    allowzero = bool(rng.integers(4) == 0)
    dims = ",".join(map(str, shape))
    text = f"g (float[{dims}] x) => (float y) {{ y = Reshape<allowzero = {int(allowzero)}>(x, t) }}"
    try:
        (moved,) = run_ort(model(text, {"t": np.array(target)}), {"x": np.ones(shape, np.float32)})
        want = moved.shape
    except Exception:
        want = None
    if target.count(-1) > 1 or (allowzero and 0 in target):
        want = None
    assert resolved(shape, target, allowzero=allowzero) == want
    assert resolved(shape, None) is None


def test_a_zero_that_is_allowed_is_a_size_and_keeps_nothing() -> None:
    assert resolved((4, 6), [0, 6]) == (4, 6)
    assert resolved((4, 6), [0, 6], allowzero=True) is None
    assert resolved((0, 6), [3, 0], allowzero=True) == (3, 0)


def test_what_reshapes_and_slices_make_of_a_tensor() -> None:
    text = """g (float[6,4] x) => (float[3,4] y) {
        a = Reshape(x, long)
        b = Reshape(a, wide)
        c = Slice(b, start, end, axes)
        y = Neg(c)
    }"""
    values = {"long": [24], "wide": [3, 8], "start": [0], "end": [4], "axes": [1]}
    graph = graph_of(text, {key: np.array(value) for key, value in values.items()})
    tensor, shape, nodes = relabelled(graph.inputs[0], (6, 4), View(graph))
    assert (tensor.name, shape, [n.op for n in nodes]) == ("c", (3, 4), ["Reshape", "Reshape", "Slice"])
    assert reshaped(made_by(graph, "b"), (24,)) == (3, 8)
    assert constant_ints(made_by(graph, "c"), 2) == [4]
    assert constant_ints(made_by(graph, "c"), 4) is None


@pytest.mark.parametrize(
    ("outputs", "more"),
    [("float y", "z = Abs(a)"), ("float y, float[24] a", ""), ("float y", "")],
)
def test_what_others_read_stays(outputs: str, more: str) -> None:
    """Another reader, or the caller: then the tensor in between is needed as it is."""
    text = f"g (float[6,4] x) => ({outputs}) {{ a = Reshape(x, long) y = Reshape(a, wide) {more} }}"
    graph = graph_of(text, {"long": np.array([24]), "wide": np.array([3, 8])})
    tensor, _, nodes = relabelled(graph.inputs[0], (6, 4), View(graph))
    expected = ("y", 2) if not more and "a" not in outputs.replace("float", "") else ("a", 1)
    assert (tensor.name, len(nodes)) == expected
