"""Operators without an ONNX translation, written out in operators that have one, each by itself.

torch's exporter does this with `ExportedProgram.run_decompositions`, which runs the whole backbone twice more. Of a
backbone's thousand nodes some sixty need it (dropout, chunk, reshape, contiguous, to): here only these are traced, on
the fake values that the export left at their inputs. A program that writes into tensors, or that holds a graph within
a graph, is left to torch's way, since there a node alone does not say what it does.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._export import utils as _utils
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.fx.passes import type_promotion

from diffc.frontend.sizes import NOT_IN_ONNX, InputSizes, compute_from_inputs

_LOG = logging.getLogger(__name__)
Table = Mapping[Any, Callable[..., Any]]
_INHERITED = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


@contextmanager
def decomposed_by_node() -> Iterator[None]:
    """Within, torch.onnx.export decomposes a program node by node, where it can be."""
    whole, promote = _fx_passes.decompose_with_registry, _fx_passes.insert_type_promotion_nodes

    def decompose(program: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        if not stands_alone(program.graph_module):
            return whole(program, registry)
        known = set(_decomp.get_onnx_implemented_overloads(registry))
        table = _decomp.create_onnx_friendly_decomposition_table(known)
        return program if expand(program, table) else whole(program, registry)

    passes: Any = _fx_passes
    passes.decompose_with_registry, passes.insert_type_promotion_nodes = decompose, promote_types
    try:
        yield
    finally:
        passes.decompose_with_registry, passes.insert_type_promotion_nodes = whole, promote


class _KnownValues(type_promotion._TypePromotionInterpreter):
    """The exporter's pass that casts operands to one type; what a node gives is known, and not computed again."""

    def run_node(self, node: fx.Node) -> Any:
        with self._set_current_node(node):
            if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        if node.op == "call_function" and "val" in node.meta:
            return node.meta["val"]
        return fx.Interpreter.run_node(self, node)


def promote_types(module: fx.GraphModule) -> None:
    """Cast the operands of each operator to one type, as torch does without being told; the module is changed."""
    for part in module.modules():
        assert isinstance(part, fx.GraphModule)
        table = type_promotion.TypePromotionTable()
        promotion = type_promotion.InsertTypePromotion(part, table)
        promotion.interpreter = _KnownValues(part, table)
        promotion.run()


def stands_alone(module: fx.GraphModule) -> bool:
    """Whether every node is known by its inputs alone: nothing is written into, no graph lies within the graph."""
    return not list(module.children()) and all(
        _is_plain(node.target) for node in module.graph.nodes if node.op == "call_function"
    )


def _is_plain(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable
    return not isinstance(target, torch._ops.HigherOrderOperator)


def expand(program: torch.export.ExportedProgram, table: Table) -> bool:
    """Take the operators of `table`, and those that are made of others and give views, apart; the program is changed.

    Before: chunk(x, 2, 1)    After: split(x, 3, 1)

    False, and no change, where an operator brings a tensor of its own, or does not run on its inputs alone.
    """
    graph = program.graph
    found = [node for node in graph.nodes if node.op == "call_function" and is_expanded(node.target, table)]
    if any(isinstance(item.meta["val"], list | tuple) for node in found for item in node.all_input_nodes):
        return False
    inputs = {node: node.all_input_nodes for node in found}
    try:
        traced = {node: _traced(node, table) for node in found}
    except Exception as error:  # torch raises many kinds; its own way may take this program
        _LOG.info("decomposing the whole program: %s", error)
        return False
    sizes = InputSizes(graph)
    inner = [item for part in traced.values() for item in part.graph.nodes]
    if any(item.op == "get_attr" for item in inner) or not all(
        sizes.known(item.meta["val"]) for item in inner if item.target in NOT_IN_ONNX
    ):
        return False
    instead: dict[fx.Node, Any] = {}
    for node, part in traced.items():
        _replace(node, _inserted(node, [instead.get(item, item) for item in inputs[node]], part), instead)
    compute_from_inputs(graph)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    _rename_outputs(program, {node.name: new for node, new in instead.items()})
    return True


def is_expanded(target: Any, table: Table) -> bool:
    """Whether run_decompositions would take the operator apart: as `table` says, or as it is made of others."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in table or (_utils._is_cia_op(target) and not _utils._is_preservable_cia_op(target))


def _traced(node: fx.Node, table: Table) -> fx.GraphModule:
    """What the node is made of, as a graph over the nodes that it reads, in the order of `all_input_nodes`."""
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [item.meta["val"] for item in inputs]
    with unset_fake_temporarily(), detect_fake_mode(values) or nullcontext():
        return make_fx(call, decomposition_table=dict(table))(*values)


def _inserted(node: fx.Node, inputs: list[fx.Node], traced: fx.GraphModule) -> Any:
    """Copy the nodes of `traced`, which reads `inputs`, before the node; those that give its results."""
    places = [item for item in traced.graph.nodes if item.op == "placeholder"]
    made: dict[fx.Node, Any] = dict(zip(places, inputs, strict=True))
    last = node.prev
    with node.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                made[inner] = node.graph.node_copy(inner, made.__getitem__)
    while (last := last.next) is not node:
        last.meta |= {key: node.meta[key] for key in _INHERITED if key in node.meta}
    return fx.map_arg(traced.graph.output_node().args[0], made.__getitem__)


def _replace(node: fx.Node, result: Any, instead: dict[fx.Node, Any]) -> None:
    """Let the node's users read `result`; `instead` is told what stands for each node that is gone."""
    instead[node] = result
    for user in list(node.users):
        if user.target is operator.getitem:
            instead[user] = result[user.args[1]]
            user.replace_all_uses_with(result[user.args[1]])
        else:
            user.args, user.kwargs = fx.map_arg(
                (user.args, user.kwargs), lambda item: result if item is node else item
            )


def _rename_outputs(program: torch.export.ExportedProgram, renamed: Mapping[str, Any]) -> None:
    """Let the signature name the nodes that stand in the place of those that are gone."""
    specs = program.graph_signature.output_specs
    for i, spec in enumerate(specs):
        if (node := renamed.get(getattr(spec.arg, "name", ""))) is not None:
            specs[i] = replace(spec, arg=replace(spec.arg, name=node.name))
