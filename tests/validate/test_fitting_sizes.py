"""Sizes that constants of a graph leave, held against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from diffc.validate.fitting_sizes import FittingSizes
from tests.validate.sized_networks import film, positions, unet


def runs(model: onnx.ModelProto, sizes: dict[str, int]) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (value,) = session.get_inputs()
    shape = [sizes.get(dim, dim) for dim in value.shape]
    try:
        session.run(None, {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)})
    except Exception:  # ONNX Runtime has a class of its own for each status
        return False
    return True


@pytest.mark.parametrize("tokens", [6, 64, 77, 1530])
def test_a_size_in_constants_is_found(tokens: int) -> None:
    found = FittingSizes(positions(tokens))
    assert found.only_sizes() == {"tokens": tokens}
    assert found.reason({"tokens": tokens, "batch": 3}) == ""
    assert "Add_a" in found.reason({"tokens": tokens + 1})


@pytest.mark.parametrize("moving", [False, True])
def test_sizes_that_depend_on_each_other_are_searched_for(moving: bool) -> None:
    model = film(moving=moving)
    found = FittingSizes(model)
    assert found.only_sizes() == {}
    for _, sizes in zip(range(5), found.search(5.0), strict=False):
        assert runs(model, dict(sizes))
        if not moving:
            assert sizes["batch"] * sizes["frames"] * sizes["height"] * sizes["width"] == 60
    wrong = {"batch": 1, "frames": 3, "height": 4, "width": 6}
    assert (found.reason(wrong) == "") == runs(model, wrong) == moving


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (16, 4), (6, 8), (8, 10), (2, 2)])
def test_multiples_of_a_unet_are_told(rows: int, columns: int) -> None:
    model, sizes = unet(), {"batch": 2, "height": rows, "width": columns}
    found = FittingSizes(model)
    assert found.only_sizes() == {}
    assert (found.reason(sizes) == "") == runs(model, sizes)


def test_a_graph_that_onnx_cannot_follow_is_left_alone() -> None:
    model = positions(6)
    model.graph.node.append(helper.make_node("Concat", ["y", "table"], ["z"], axis=7))
    found = FittingSizes(model)
    assert found.only_sizes() == {}
    assert found.reason({"tokens": 5}) == ""
    assert not list(found.search(1.0))
