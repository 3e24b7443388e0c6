"""Networks whose traced blocks are not copies of each other are refused, with the node that differs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from diffc.frontend.copy_blocks import copy_blocks
from diffc.frontend.equal_blocks import BlocksDiffer, Read, prove_blocks_equal
from tests.frontend.block_networks import NOT_REPEATING, REPEATING, Forward, chain, fake, shared


def text(graph: ir.Graph) -> list[str]:
    return [*graph.initializers, *(str(node) for node in graph)]


@pytest.mark.parametrize("forward", NOT_REPEATING)
def test_networks_that_do_not_repeat_are_refused_and_left_alone(forward: Forward) -> None:
    _, runs, program = fake(forward)
    before = text(program.model.graph)
    with pytest.raises(BlocksDiffer):
        copy_blocks(program.model, runs)
    assert text(program.model.graph) == before


@pytest.mark.parametrize("forward", REPEATING)
def test_a_proof_changes_nothing_and_gives_block_1(forward: Forward) -> None:
    _, runs, program = fake(forward)
    before = text(program.model.graph)
    (pattern,) = prove_blocks_equal(program.model.graph, runs)
    assert text(program.model.graph) == before
    assert all(
        len(reads) == len(node.inputs) for node, reads in zip(pattern.nodes, pattern.reads, strict=True)
    )
    found = {read for reads in pattern.reads for read in reads}
    assert {Read.OWN, Read.PREVIOUS, Read.WEIGHT} <= found
    if forward is shared:
        assert Read.SHARED in found


def test_values_of_a_blocks_own_are_refused() -> None:
    _, runs, program = fake(chain)
    weight = program.model.graph.initializers["blocks.1.linear.bias"]
    weight.const_value = ir.tensor(np.ones(6, np.float32))
    with pytest.raises(BlocksDiffer, match="own"):
        prove_blocks_equal(program.model.graph, runs)
