"""Moves of data: where channels go, against arrays whose every element says which channel it belongs to."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from passes.graph.grids import Grid
from passes.graph.movement import (
    MOVES,
    data_inputs,
    element_type,
    grid_after,
    grid_before,
    grows,
    is_move,
    size_ratio,
    takes,
)
from tests.passes.graph_helpers import graph_of, made_by, model, run_ort

SHAPE = (2, 4, 6, 8)
INT8, FP8 = int(TensorProto.INT8), int(TensorProto.FLOAT8E4M3FN)
TEXTS = {
    "Transpose": "y = Transpose<perm = [0, 2, 3, 1]>(x)",
    "Transpose reversed": "y = Transpose(x)",
    "Reshape joins": "y = Reshape(x, joined)",
    "Reshape splits": "y = Reshape(x, parted)",
    "Flatten": "y = Flatten<axis = 2>(x)",
    "Unsqueeze": "y = Unsqueeze(x, two)",
    "Squeeze": "y = Squeeze(x)",
    "Identity": "y = Identity(x)",
    "Slice": "y = Slice(x, zero, three, two)",
    "Split": "y, rest = Split<axis = 3, num_outputs = 2>(x)",
    "Gather": "y = Gather<axis = 1>(x, picked)",
    "Expand": "y = Expand(x, wider)",
    "Tile": "y = Tile(x, repeats)",
    "DepthToSpace": "y = DepthToSpace<blocksize = 2>(x)",
    "SpaceToDepth": "y = SpaceToDepth<blocksize = 2>(x)",
    "Concat": "y = Concat<axis = 2>(x, x)",
}
VALUES = {
    "joined": np.array([2, 4, 48]),
    "parted": np.array([2, 2, 2, 6, 8]),
    "two": np.array([2]),
    "zero": np.array([0]),
    "three": np.array([3]),
    "picked": np.array([2, 0]),
    "wider": np.array([3, 2, 4, 6, 8]),
    "repeats": np.array([1, 2, 1, 1]),
}
KNOWS_NO_AXIS = {"Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"}
"""Moves for which no axis is said even where there is one: what is not known is not moved."""


def text_of(name: str, kind: str = "float") -> str:
    shape = ",".join(map(str, SHAPE))
    return f"g ({kind}[{shape}] x) => ({kind} z) {{ {TEXTS[name]} z = Identity(y) }}"


def values_of(name: str) -> dict[str, Any]:
    return {key: value for key, value in VALUES.items() if key in TEXTS[name]}


def move(name: str) -> gs.Node:
    return made_by(graph_of(text_of(name), values_of(name)), "y")


def channels(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """An array in which every element is the number of its channel along an axis."""
    return np.broadcast_to(
        np.arange(shape[axis], dtype=np.float32).reshape([-1] + [1] * (len(shape) - 1 - axis)), shape
    )


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("name", TEXTS)
def test_scales_follow_their_channels(name: str, axis: int) -> None:
    node, grid = move(name), Grid(INT8, int(TensorProto.FLOAT), "s", axis=axis)
    (moved,) = run_ort(
        model(text_of(name), values_of(name)), {"x": np.ascontiguousarray(channels(SHAPE, axis))}
    )
    places = [
        i
        for i in range(moved.ndim)
        if moved.shape[i] == SHAPE[axis] and np.array_equal(moved, channels(moved.shape, i))
    ]
    found = grid_after(node, grid)
    if found is None:
        assert not places or node.op in KNOWS_NO_AXIS
        return
    assert found.axis in places
    assert found == grid.on(found.axis)
    back = grid_before(node, found)
    assert back == grid


@pytest.mark.parametrize("name", TEXTS)
def test_one_scale_goes_anywhere_and_blocks_nowhere(name: str) -> None:
    node, grid = move(name), Grid(INT8, int(TensorProto.FLOAT), "s")
    assert grid_after(node, grid) is grid_before(node, grid) is grid
    blocks = Grid(INT8, int(TensorProto.FLOAT), "s", axis=3, block_size=2)
    assert grid_after(node, blocks) is grid_before(node, blocks) is None


@pytest.mark.parametrize("name", TEXTS)
def test_a_move_is_known_and_runs_on_the_types_that_it_takes(name: str) -> None:
    node = move(name)
    assert is_move(node)
    assert [t.name for t in data_inputs(node)] == ["x"] * (2 if node.op == "Concat" else 1)
    assert takes(node.op, 23, INT8)
    x = np.arange(np.prod(SHAPE)).astype(np.int8).reshape(SHAPE)
    (moved,) = run_ort(model(text_of(name, "int8"), values_of(name)), {"x": x})
    (wide,) = run_ort(model(text_of(name), values_of(name)), {"x": x.astype(np.float32)})
    assert np.array_equal(moved.astype(np.float32), wide)
    assert takes(node.op, 23, FP8) == (node.op in ("Transpose", "Reshape", "Identity"))


def test_what_computes_is_no_move() -> None:
    nodes = "y = Neg(x) z = Gather(x, i) w = Identity(x)"
    graph = graph_of(f"g (float[4] x, int64[2] i) => (float[4] y, float[2] z, float[4] w) {{ {nodes} }}")
    assert [is_move(made_by(graph, name)) for name in "yzw"] == [False, False, True]
    assert not is_move(None)
    other = made_by(graph, "w")
    other.domain = "com.microsoft"
    assert not is_move(other)
    assert "Concat" not in MOVES  # it has several inputs that move


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Slice(x, zero, three, two)", Fraction(3, 6)),
        ("y, rest = Split<axis = 3, num_outputs = 2>(x)", Fraction(1, 2)),
        ("y = Gather<axis = 1>(x, picked)", Fraction(2, 4)),
        ("y = Transpose(x)", Fraction(1)),
        ("y = Tile(x, repeats)", Fraction(1)),  # from below: at least as many
    ],
)
def test_elements_of_an_output_for_each_of_the_input(text: str, expected: Fraction) -> None:
    values = {key: value for key, value in VALUES.items() if key in text}
    for batch in ("2", "b"):
        node = made_by(
            graph_of(f"g (float[{batch},4,6,8] x) => (float z) {{ {text} z = Identity(y) }}", values), "y"
        )
        assert size_ratio(node, node.outputs[0]) == expected
        assert grows(node) == (node.op == "Tile")


def test_sizes_that_are_not_known_count_as_nothing() -> None:
    node = move("Slice")
    node.outputs[0].shape = None
    assert size_ratio(node, node.outputs[0]) == 0


def test_names_of_types() -> None:
    assert element_type(gs.Variable("x", np.int8)) == "INT8"
    assert element_type(gs.Variable("x", FP8)) == "FLOAT8E4M3FN"
    assert element_type(gs.Variable("x")) == "unknown"
