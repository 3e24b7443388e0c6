"""The table of TensorRT's operators against the functions that compute them and the operators that ONNX has."""

from __future__ import annotations

import onnx_graphsurgeon as gs
import pytest

from passes.graph.trt_ops import DOMAIN, TRT_OPS, is_trt, trt_op
from passes.targets.ort.trt_functions import function


@pytest.mark.parametrize("op", TRT_OPS)
def test_an_operator_is_known_in_its_domain_alone(op: str) -> None:
    assert trt_op(DOMAIN, op) is TRT_OPS[op]
    assert is_trt(gs.Node(op, domain=DOMAIN))
    for domain in (None, "", "ai.onnx", "com.microsoft"):
        assert trt_op(domain, op) is None
        assert not is_trt(gs.Node(op, domain=domain))
    assert trt_op(DOMAIN, f"{op}2") is None


@pytest.mark.parametrize("op", TRT_OPS)
def test_its_function_gives_as_many_outputs_and_has_the_block_size(op: str) -> None:
    entry = TRT_OPS[op]
    inputs = 1 + max((output.like or 0 for output in entry.outputs), default=0)
    made = function(op, 23, {"block_size"} if entry.block_size else set(), max(inputs, 2))
    assert len(made.output) == len(entry.outputs)
    blocks = [item.i for item in made.attribute_proto if item.name == "block_size"]
    assert blocks in ([], [entry.block_size])
    assert any(output.blocks for output in entry.outputs) <= bool(entry.block_size)
