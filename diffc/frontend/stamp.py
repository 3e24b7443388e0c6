"""Puts the blocks that a trace left out into its graph: copies of a traced one, proven to be what a trace gives.

The traced blocks of a run are numbered 0, 1, 2 and 3, the last. The nodes of a block are a *segment*: from the first
node of its module to the first of the next one's. Copies of segment 2 go between it and segment 3, with paths renamed.

What a node reads is one of: a value of its own segment, a value of the segment before, a weight of its own block, or
something that all blocks share. Segments 1 and 2 must be equal in all of this, node by node; so a block is the same
function of its number in all of them, and since the modules that were left out equal these (`blocks.find_runs`),
their segments are, too. Where segments are not equal nothing is stamped, and the caller traces the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from diffc.frontend.blocks import Run
from diffc.frontend.names import SCOPES, module_of
from diffc.frontend.recipes import is_real


class StampError(Exception):
    """The traced blocks of a run are not copies of each other; says which node differs, and in what."""


@dataclass(frozen=True)
class _Traced:
    """The traced part of a run: node segments 0 to 2, and the first node of segment 3."""

    run: Run
    segments: tuple[tuple[ir.Node, ...], ...]
    end: ir.Node


def stamp(model: ir.Model, runs: Sequence[Run]) -> None:
    """Add the blocks that `runs` leave out, nodes and weights, in place; linear in the nodes of the result.

    Node names are those of the exporter, so this comes before `name_graph`. Raises StampError, and has changed
    nothing, where the graph does not repeat itself.
    """
    graph = model.graph
    nodes = list(graph)
    position = {id(node): i for i, node in enumerate(nodes)}
    found = [_find(run, nodes, position) for run in runs]
    for traced in found:
        _prove(traced, nodes, position)
    for traced in found:
        _prove_weights(graph, traced.run)
    _stamp_weights(graph, runs)
    for traced in found:
        _stamp_nodes(graph, traced)


def _find(run: Run, nodes: Sequence[ir.Node], position: Mapping[int, int]) -> _Traced:
    """The segments of a run. Raises StampError when nodes of its blocks are not in the blocks' order."""
    starts, ends = [], []
    for block in run.traced:
        inside = [position[id(n)] for n in nodes if _below(module_of(n), block)]
        if not inside:
            raise StampError(f"{block} has no nodes")
        starts.append(inside[0])
        ends.append(inside[-1])
    if any(end >= start for end, start in zip(ends, starts[1:], strict=False)):
        raise StampError(f"the blocks of {run.path} do not follow each other")
    segments = [tuple(nodes[a:b]) for a, b in pairwise(starts)]
    return _Traced(run, tuple(segments), nodes[starts[-1]])


def _below(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _prove(traced: _Traced, nodes: Sequence[ir.Node], position: Mapping[int, int]) -> None:
    """Raise StampError unless segments 1 and 2 are equal, and what follows reads neither but through 3."""
    places = [
        _places(segment, block) for segment, block in zip(traced.segments, traced.run.traced, strict=False)
    ]
    one, two = traced.segments[1:]
    if len(one) != len(two):
        raise StampError(
            f"{traced.run.traced[1]} has {len(one)} nodes, {traced.run.traced[2]} has {len(two)}"
        )
    for a, b in zip(one, two, strict=True):
        left = _describe(a, traced.run.traced[1], places[0], places[1])
        right = _describe(b, traced.run.traced[2], places[1], places[2])
        # Segment 1 may read of segment 0 what all blocks share.
        shared = {id(value) for value in b.inputs}
        left["inputs"] = [
            _fixed(v) if v is not None and id(v) in shared else r
            for v, r in zip(a.inputs, left["inputs"], strict=True)
        ]
        if left != right:
            different = ", ".join(key for key in left if left[key] != right[key])
            raise StampError(f"{a.name} and {b.name} ({a.op_type}) differ in {different}")
    _prove_readers(traced, nodes[position[id(traced.end)] :], places)


def _prove_readers(traced: _Traced, after: Sequence[ir.Node], places: Sequence[_Places]) -> None:
    """From segment 3 on, segment 1 must not be read, and segment 2 by block 3 alone, where 2 reads 1."""
    run = traced.run
    chain = {places[1][id(v)] for n in traced.segments[2] for v in n.inputs if id(v) in places[1]}
    for node in after:
        for value in (v for v in node.inputs if v is not None):
            place = places[2].get(id(value))
            allowed = place in chain and _below(module_of(node), run.traced[-1])
            if id(value) in places[1] or (place is not None and not allowed):
                raise StampError(f"{node.name} ({node.op_type}) reads {value.name} inside {run.path}")
    if any(value.is_graph_output() for segment in traced.segments for n in segment for value in n.outputs):
        raise StampError(f"an output of the model comes from the middle of {run.path}")


_Places = Mapping[int, tuple[Any, ...]]
"""id() of a value of a segment -> what it is there: module below the block, operator, how many so far, output."""


def _places(segment: Sequence[ir.Node], block: str) -> _Places:
    places: dict[int, tuple[Any, ...]] = {}
    count: dict[tuple[str, str], int] = {}
    for node in segment:
        key = (_relative(module_of(node), block), node.op_type)
        count[key] = count.get(key, -1) + 1
        places |= {id(value): (*key, count[key], i) for i, value in enumerate(node.outputs)}
    return places


def _relative(path: str, block: str) -> str:
    """A path with the block's own replaced by a mark that no path has."""
    return f"*{path.removeprefix(block)}" if _below(path, block) else path


def _describe(node: ir.Node, block: str, before: _Places, own: _Places) -> dict[str, Any]:
    """Everything about a node that decides what it computes, in terms of its block."""
    return {
        "operator": (node.domain, node.op_type, node.overload, node.version),
        "place": own[id(node.outputs[0])],
        "attributes": {name: _plain(value) for name, value in node.attributes.items()},
        "outputs": [(value.type, str(value.shape)) for value in node.outputs],
        "inputs": [_reference(value, block, before, own) for value in node.inputs],
    }


def _scopes(node: ir.Node, block: str, path: str) -> str:
    """The module scopes of a node with the path of its block replaced."""
    scopes = node.metadata_props.get(SCOPES, "")
    return scopes.replace(f"'{block}'", f"'{path}'").replace(f"'{block}.", f"'{path}.")


def _reference(value: ir.Value | None, block: str, before: _Places, own: _Places) -> tuple[Any, ...] | None:
    if value is None:
        return None
    if id(value) in own:
        return ("own", *own[id(value)])
    if id(value) in before:
        return ("before", *before[id(value)])
    if value.is_initializer() and _below(str(value.name), block):
        return ("weight", _relative(str(value.name), block), value.dtype, str(value.shape))
    return _fixed(value)


def _fixed(value: ir.Value) -> tuple[str, int]:
    return ("fixed", id(value))


def _plain(attribute: ir.Attr) -> Any:
    """An attribute as something that compares by value. Raises StampError for a body."""
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise StampError("a node of a block has a body")
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return (tensor.dtype, str(tensor.shape), tensor.tobytes())
    return (attribute.type, attribute.value)


def _prove_weights(graph: ir.Graph, run: Run) -> None:
    """Raise StampError when a block holds values of its own that no file has."""
    for name, value in graph.initializers.items():
        if _below(name, run.traced[2]) and is_real(value):
            raise StampError(f"the values of {name} are the trace's own")


def _stamp_weights(graph: ir.Graph, runs: Sequence[Run]) -> None:
    """Add the initializers of the blocks left out, where a trace of all blocks has them: block by block."""
    values: list[ir.Value] = []
    group: list[ir.Value] = []
    source = {run.traced[2]: run for run in runs}
    of = {name: next((b for b in source if _below(name, b)), None) for name in graph.initializers}
    current: str | None = None
    for name, value in (*graph.initializers.items(), ("", None)):
        block = of.get(name)
        if current is not None and block != current:
            for path in source[current].left_out:
                values += [_like(weight, path + str(weight.name).removeprefix(current)) for weight in group]
            group = []
        current = block
        if value is not None:
            values.append(value)
            group += [value] if block is not None else []
    graph.initializers.clear()
    for value in values:
        graph.register_initializer(value)


def _like(value: ir.Value, name: str | None) -> ir.Value:
    """A value of the same type and shape; an initializer's is a placeholder that `attach_recipes` replaces."""
    shape = None if value.shape is None else ir.Shape(value.shape)
    return ir.Value(name=name, shape=shape, type=value.type, const_value=value.const_value)


def _stamp_nodes(graph: ir.Graph, traced: _Traced) -> None:
    """Insert the copies of segment 2, each reading the one before it, and let segment 3 read the last."""
    run, template, block = traced.run, traced.segments[2], traced.run.traced[2]
    own = [value for node in template for value in node.outputs]
    inside = {id(node) for node in template}
    readers = [(n, i, value) for value in own for n, i in value.uses() if id(n) not in inside]
    one = {place: value for value, place in _values_at(traced.segments[1], run.traced[1])}
    # Value of segment 1 -> the same of segment 2.
    next_one = {id(one[place]): value for value, place in _values_at(template, block)}
    previous, new = next_one, dict[int, ir.Value]()
    copies: list[ir.Node] = []
    for path in run.left_out:
        new = {id(value): _like(value, None) for value in own}
        find = partial(_find_input, graph.initializers, block, path, previous, new)
        copies += [_copy(node, block, path, find, new) for node in template]
        previous = {key: new[id(value)] for key, value in next_one.items()}
    for node, i, value in readers:
        node.replace_input_with(i, new[id(value)])
    graph.insert_before(traced.end, copies)


def _values_at(segment: Sequence[ir.Node], block: str) -> Iterator[tuple[ir.Value, tuple[Any, ...]]]:
    places = _places(segment, block)
    return ((value, places[id(value)]) for node in segment for value in node.outputs)


def _find_input(
    weights: Mapping[str, ir.Value],
    block: str,
    path: str,
    previous: Mapping[int, ir.Value],
    new: Mapping[int, ir.Value],
    value: ir.Value | None,
) -> ir.Value | None:
    """What the copy at `path` reads where the node of `block` reads `value`."""
    if value is None:
        return None
    if id(value) in new:
        return new[id(value)]
    if id(value) in previous:
        return previous[id(value)]
    if value.is_initializer() and _below(str(value.name), block):
        return weights[path + str(value.name).removeprefix(block)]
    return value


def _copy(
    node: ir.Node,
    block: str,
    path: str,
    find: Callable[[ir.Value | None], ir.Value | None],
    new: Mapping[int, ir.Value],
) -> ir.Node:
    return ir.Node(
        node.domain,
        node.op_type,
        [find(value) for value in node.inputs],
        node.attributes,
        overload=node.overload,
        outputs=[new[id(value)] for value in node.outputs],
        version=node.version,
        metadata_props={SCOPES: _scopes(node, block, path)},
    )
