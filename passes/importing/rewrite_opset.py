"""rewrite-opset: a model of default-domain opset 7 or later in a later opset, with equal results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from passes.base import Pass, PassError, PassResult, register, walk
from passes.graph.edit import Edit
from passes.importing.older_opsets import SUCCESSORS, CannotConvertError, Rewrite
from passes.importing.opset_adapters import ADAPTERS, Scope
from passes.importing.schema_changes import schema_of, steps_of, type_problem
from passes.weights.recipe import default_opset, dtype_of

OLDEST = 7
"""Before it, operators that take two tensors broadcast by other rules."""
NEWEST = 23
"""Where canonical graphs are: the first with FLOAT4E2M1."""
BEFORE_22 = 21
DEFAULT_DOMAIN = ("", "ai.onnx")
NO_KERNEL_22 = frozenset(
    {
        "Bernoulli",
        "GlobalLpPool",
        "MaxRoiPool",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "RoiAlign",
    }
)
"""Operators for which no provider of ONNX Runtime has a kernel of opset 22, their newest; of older opsets it has."""
SHOWN = 20  # refused nodes that the message lists


@register
@dataclass(frozen=True)
class RewriteOpset(Pass):
    """Raise the default-domain opset of a model, its subgraphs and its functions to `to`.

    0. Without `to`, that is opset 23; 21 for a graph with an operator of `NO_KERNEL_22` that is of opset 21 or before,
       unless the graph has FLOAT4E2M1, and a note says so.
    1. Axes of reductions (18) and the axis of DFT (20) become inputs; Split without sizes gets `num_outputs`
       (18); GridSample modes get their new names (20); scale and bias of GroupNormalization are spread from
       groups to channels, with `stash_type` the type of the data (21); an Attention mask of one column is
       spread over the keys (24). What opsets 8 to 17 changed: `passes.importing.older_opsets`.
    2. Every other operator whose schema changed on the way stands as it is: inputs, outputs, attributes and
       defaults are the same, or what was added is, left out, what it did before (`changes` lists all).
    3. The IR version is the one that came with opset `to`.

    Other domains are left alone, and so are calls of model-local functions. When one node cannot be converted
    exactly, PassError names all such nodes and the model stays whole. Opsets are never lowered.
    """

    name: ClassVar[str] = "rewrite-opset"
    to: int = 0

    def run(self, graph: gs.Graph) -> PassResult:
        """Plan every node, then rewrite. Raises PassError before anything has changed."""
        to, held = self._target(graph)
        work = [part for part in (graph, *graph.functions) if _needs_work(part, to)]
        calls = {((call.domain or ""), call.name) for call in graph.functions}
        plans, problems = dict[int, list[Rewrite]](), list[str]()
        for part in work:
            _plan(part, to, calls, _scope(part, graph), plans, problems)
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise PassError(
                f"the model cannot be raised to opset {to} with equal results, and was left as it is: "
                + "; ".join([*problems[:SHOWN], *more])
                + f". Fix: export it in opset {to}"
            )
        notes = [_raise(part, to, plans) for part in work]
        return PassResult(len(work) + len(plans), (*notes, *held) if work else ())

    def _target(self, graph: gs.Graph) -> tuple[int, tuple[str, ...]]:
        """The opset to go to, and a note where an operator asks for another than 23 or will not run."""
        nodes = [node for part in (graph, *graph.functions) for body in walk(part) for node in body.nodes]
        found = sorted({n.op for n in nodes if n.op in NO_KERNEL_22 and (n.domain or "") in DEFAULT_DOMAIN})
        to = self.to or NEWEST
        if not found or to <= BEFORE_22:
            return to, ()
        reason = f"ONNX Runtime has no kernel for {', '.join(found)} of opset 22, the newest"
        source = max((opset_of(part) or 0 for part in (graph, *graph.functions)), default=0)
        if self.to or source > BEFORE_22 or _has_fp4(graph):
            return to, (f"{reason}: it will not run there",)
        return BEFORE_22, (f"opset {BEFORE_22} and not {NEWEST}: {reason}",)


def _has_fp4(graph: gs.Graph) -> bool:
    """Whether a tensor is FLOAT4E2M1, which opset 23 brought."""
    return any(dtype_of(tensor) == onnx.TensorProto.FLOAT4E2M1 for tensor in graph.tensors().values())


def opset_of(part: gs.Graph) -> int | None:
    """The default-domain opset that a graph or function imports; None when it imports none."""
    if part.import_domains is None:
        return int(part.opset)
    return default_opset(part.import_domains)


def _needs_work(part: gs.Graph, to: int) -> bool:
    """Whether the part is of an older opset. Raises PassError for opsets that are out of reach."""
    newest, source = onnx.defs.onnx_opset_version(), opset_of(part)
    if not OLDEST <= to <= newest:
        raise PassError(f"rewrite-opset cannot go to opset {to}; expected {OLDEST} to {newest}")
    what = f"function {part.name!r}" if isinstance(part, gs.Function) else "the model"
    if source is not None and source < OLDEST:
        raise PassError(
            f"{what} is of opset {source}; rewrite-opset takes opset {OLDEST} and later. "
            "Fix: export it again with opset 17 or later"
        )
    if source is not None and source > to:
        raise PassError(
            f"{what} is of opset {source}; rewrite-opset does not go back to {to}"
            ". Fix: export the model with an older opset"
        )
    return source is not None and source < to


def _scope(part: gs.Graph, graph: gs.Graph) -> Scope:
    """The values of the attributes of a function: its default where it has one, and those of all callers."""
    if not isinstance(part, gs.Function):
        return {}
    callers = [
        node
        for root in (graph, *graph.functions)
        for body in walk(root)
        for node in body.nodes
        if ((node.domain or ""), node.op) == ((part.domain or ""), part.name)
    ]
    return {name: [node.attrs.get(name, value) for node in callers] for name, value in part.attrs.items()}


def _plan(
    part: gs.Graph,
    to: int,
    calls: set[tuple[str, str]],
    scope: Scope,
    plans: dict[int, list[Rewrite]],
    problems: list[str],
) -> None:
    """Add what to do, by `id()` of the node, and what stands in the way; changes nothing."""
    source = opset_of(part) or to
    for node in (node for body in walk(part) for node in body.nodes):
        if (node.domain or "") not in DEFAULT_DOMAIN or ((node.domain or ""), node.op) in calls:
            continue
        try:
            rewrites = list(_rewrites(node, source, to, scope))
        except CannotConvertError as reason:
            where = f" in function {part.name!r}" if isinstance(part, gs.Function) else ""
            problems.append(f"{node.op} node {node.name or node.outputs[0].name!r}{where}: {reason}")
            continue
        if rewrites:
            plans[id(node)] = rewrites


def _rewrites(node: gs.Node, source: int, to: int, scope: Scope) -> Iterator[Rewrite]:
    """The rewrites of a node, one per opset that needs one. Raises CannotConvertError."""
    final, since = SUCCESSORS.get(node.op, (node.op, 0))
    old, new = schema_of(node.op, source), schema_of(final if to >= since else node.op, to)
    if old is None and new is not None:
        raise CannotConvertError(
            f"opset {source} has no such operator, and opset {to} gives the name a meaning"
        )
    if old is None or new is None or (old.name, old.since_version) == (new.name, new.since_version):
        return
    for step in steps_of(node.op, source, to):
        if step.kind == "unknown":
            raise CannotConvertError(f"opset {step.since} changed {step.reason}, which is not known here")
        adapter = ADAPTERS.get((step.op, step.since))
        rewrite = adapter(node, scope) if adapter is not None else None
        if rewrite is not None:
            yield rewrite
    problem = type_problem(node, new)
    if problem is not None and type_problem(node, old) is None:
        raise CannotConvertError(f"{problem} in opset {to}")


def _raise(part: gs.Graph, to: int, plans: Mapping[int, list[Rewrite]]) -> str:
    """Carry out the plans in one graph or function and its subgraphs; one line on what was done."""
    edit, source, done = Edit(part), opset_of(part), Counter[str]()
    for body in edit.view.parts:
        for node in body.nodes:
            node.domain = None if node.domain in DEFAULT_DOMAIN else node.domain
            for rewrite in plans.get(id(node), ()):
                rewrite(edit.at(node))
                done[node.op] += 1
    edit.apply()
    for body in edit.view.parts:
        body.opset = to
        body.import_domains = [
            onnx.helper.make_opsetid("", to),
            *(item for item in body.import_domains or () if item.domain not in DEFAULT_DOMAIN),
        ]
    what = f"function {part.name}: " if isinstance(part, gs.Function) else ""
    listed = ", ".join(f"{op} {count}" for op, count in sorted(done.items())) or "no node had to change"
    return f"{what}opset {source} to {to}: {listed}"
