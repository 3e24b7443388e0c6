"""Sizes in an exported graph, computed from the sizes of its inputs.

A size that is read off a tensor in the middle of the graph ties what uses it to the layers before: a cached step that
leaves these layers out would have no size. torch knows every size as a formula over the sizes of the inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

_SIZE = torch.ops.aten.sym_size.int
_READ = (
    _SIZE,
    torch.ops.aten.sym_numel.default,
    torch.ops.aten.sym_stride.int,
    torch.ops.aten.sym_storage_offset.default,
)
_OPERATORS: dict[Any, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}
NOT_IN_ONNX = _READ[1:]
"""Operators that read a size, and that the exporter has no translation for."""


class InputSizes:
    """Nodes that compute sizes of `graph` from its inputs, each once, before everything else."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._place = next(node for node in graph.nodes if node.op != "placeholder")
        self._made: dict[Any, fx.Node | int] = {}
        self._symbols: dict[Any, tuple[fx.Node, int, int, int]] = {}
        for node in self._inputs:
            for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                self._learn(node, axis, size)

    def _learn(self, node: fx.Node, axis: int, size: Any) -> None:
        """Take down where a symbol can be read: where a size is `factor` times the symbol plus `rest`."""
        if not isinstance(size, torch.SymInt):
            return
        formula = sympy.expand(size.node.expr)
        if len(formula.free_symbols) != 1:
            return
        (symbol,) = formula.free_symbols
        factor, rest = formula.coeff(symbol), formula.subs(symbol, 0)
        if factor.is_Integer and rest.is_Integer and formula == factor * symbol + rest:
            self._symbols.setdefault(symbol, (node, axis, int(factor), int(rest)))

    def known(self, size: Any) -> bool:
        """Whether a size can be computed from those of the inputs by operators that ONNX has."""
        return not isinstance(size, torch.SymInt) or self._computable(size.node.expr)

    def _computable(self, formula: Any) -> bool:
        if formula.is_Integer:
            return True
        if formula.is_Symbol:
            return formula in self._symbols
        if isinstance(formula, sympy.Pow):
            return bool(formula.exp.is_Integer and formula.exp > 0) and self._computable(formula.base)
        return formula.func in _OPERATORS and all(map(self._computable, formula.args))

    def node(self, size: torch.SymInt) -> fx.Node | int:
        """The node that computes a known size."""
        return self._of(size.node.expr)

    def _of(self, formula: Any) -> fx.Node | int:
        if formula.is_Integer:
            return int(formula)
        if formula not in self._made:
            self._made[formula] = self._make(formula)
        return self._made[formula]

    def _make(self, formula: Any) -> fx.Node | int:
        if formula.is_Symbol:
            node, axis, factor, rest = self._symbols[formula]
            size = self._call(_SIZE, node, axis)
            shifted = size if rest == 0 else self._call(operator.sub, size, rest)
            return shifted if factor == 1 else self._call(operator.floordiv, shifted, factor)
        repeated = isinstance(formula, sympy.Pow)
        parts = [formula.base] * int(formula.exp) if repeated else formula.args
        function = operator.mul if repeated else _OPERATORS[formula.func]
        result, *others = map(self._of, parts)
        for other in others:
            result = self._call(function, result, other)
        return result

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
        with self._graph.inserting_before(self._place):
            made = self._graph.call_function(function, args)
        made.meta["val"] = values[0].shape[values[1]] if function is _SIZE else function(*values)
        return made


def compute_from_inputs(graph: fx.Graph) -> None:
    """Let every size that is read off a tensor be computed from the sizes of the inputs, where that is known."""
    sizes = InputSizes(graph)
    for node in list(graph.nodes):
        size = node.meta.get("val")
        if node.target in _READ and isinstance(size, torch.SymInt) and sizes.known(size):
            _replace_size(node, sizes.node(size))


def _replace_size(node: fx.Node, size: fx.Node | int) -> None:
    if isinstance(size, fx.Node):
        node.replace_all_uses_with(size)
        return
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg(
            (user.args, user.kwargs), lambda item: size if item is node else item
        )
