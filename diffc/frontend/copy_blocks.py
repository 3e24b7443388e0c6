"""Puts the blocks that a trace left out into its graph, as copies of a traced one.

    traced:  block 0 -> block 1 -> block N          result:  block 0 -> block 1 -> block 2 -> ... -> block N

A copy is made of block 1: its nodes with the paths of the new block, reading the weights of that block and, in the
place of the previous block's values, those of the copy before. `equal_blocks` proves that a whole trace would have
given these nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import onnx_ir as ir

from diffc.frontend.blocks import Run
from diffc.frontend.equal_blocks import BlockPattern, Read, Reads, is_below, prove_blocks_equal
from diffc.frontend.names import SCOPES


def copy_blocks(model: ir.Model, runs: Sequence[Run]) -> None:
    """Add the blocks that `runs` leave out, nodes and weights, in place; linear in the nodes of the result.

    Node names are those of the exporter, so this comes before `name_graph`. Raises BlocksDiffer, and has changed
    nothing, where the traced blocks are not equal.
    """
    graph = model.graph
    patterns = prove_blocks_equal(graph, runs)
    _copy_weights(graph, runs)
    for pattern in patterns:
        _copy_nodes(graph, pattern)


def _copy_weights(graph: ir.Graph, runs: Sequence[Run]) -> None:
    """Add the initializers of the blocks left out, where a trace of all blocks has them: block by block."""
    copied = {run.traced[1]: run for run in runs}

    def block_of(name: str) -> str | None:
        return next((block for block in copied if is_below(name, block)), None)

    values: list[ir.Value] = []
    for block, group in groupby(list(graph.initializers.values()), lambda value: block_of(str(value.name))):
        weights = list(group)
        values += weights
        if block is not None:
            for path in copied[block].left_out:
                values += [_like(weight, path + str(weight.name).removeprefix(block)) for weight in weights]
    graph.initializers.clear()
    for value in values:
        graph.register_initializer(value)


def _like(value: ir.Value, name: str | None) -> ir.Value:
    """A value of the same type and shape; an initializer's values are a placeholder that `attach_recipes` replaces."""
    shape = None if value.shape is None else ir.Shape(value.shape)
    return ir.Value(name=name, shape=shape, type=value.type, const_value=value.const_value)


def _copy_nodes(graph: ir.Graph, pattern: BlockPattern) -> None:
    """Insert the copies of block 1, each reading the one before it, and let the last block read the last copy."""
    own = [value for node in pattern.nodes for value in node.outputs]
    inside = {id(node) for node in pattern.nodes}
    readers = [(n, i, value) for value in own for n, i in value.uses() if id(n) not in inside]
    previous, made = dict(pattern.following), dict[int, ir.Value]()
    copies: list[ir.Node] = []
    for path in pattern.run.left_out:
        made = {id(value): _like(value, None) for value in own}
        copies += _copy(graph, pattern, path, {Read.OWN: made, Read.PREVIOUS: previous})
        previous = {key: made[id(value)] for key, value in pattern.following.items()}
    for node, i, value in readers:
        node.replace_input_with(i, made[id(value)])
    graph.insert_before(pattern.end, copies)


def _copy(
    graph: ir.Graph, pattern: BlockPattern, path: str, values: dict[Read, dict[int, ir.Value]]
) -> Iterator[ir.Node]:
    """The nodes of the block at `path`. `values` maps id() of a value that block 1 reads or makes to this block's."""
    block = pattern.run.traced[1]

    def inputs(node: ir.Node, reads: Reads) -> Iterator[ir.Value | None]:
        for value, read in zip(node.inputs, reads, strict=True):
            if value is not None and read is Read.WEIGHT:
                yield graph.initializers[path + str(value.name).removeprefix(block)]
            else:
                yield values[read][id(value)] if read in values else value

    for node, reads in zip(pattern.nodes, pattern.reads, strict=True):
        yield ir.Node(
            node.domain,
            node.op_type,
            list(inputs(node, reads)),
            node.attributes,
            overload=node.overload,
            outputs=[values[Read.OWN][id(value)] for value in node.outputs],
            version=node.version,
            metadata_props={SCOPES: _scopes(node, block, path)},
        )


def _scopes(node: ir.Node, block: str, path: str) -> str:
    """The module scopes of a node with the path of its block replaced."""
    scopes = node.metadata_props.get(SCOPES, "")
    return scopes.replace(f"'{block}'", f"'{path}'").replace(f"'{block}.", f"'{path}.")
