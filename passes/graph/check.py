"""The structural check that the runner makes after each pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import onnx
from onnx import GraphProto, ModelProto

from passes.base import Pass, PassCheckError, PassError
from passes.graph.inference import shell


class Check(Protocol):
    """What the runner calls before the first pass (`before` and `step` None) and after each that changed."""

    def __call__(self, before: ModelProto | None, after: ModelProto, step: Pass | None) -> str:
        """One line on what was checked. Raises PassCheckError when `after` is wrong."""
        ...


def check_structure(before: ModelProto | None, after: ModelProto, step: Pass | None) -> str:
    """Names, wiring, inputs and outputs, then the ONNX checker with strict shape inference.

    Raises PassError for the model as it came, PassCheckError for what a pass made of it.
    """
    problems = [*_wiring(after.graph, frozenset()), *_same_interface(before, after, step)]
    if problems:
        raise _invalid(step, problems[0])
    try:
        onnx.checker.check_model(shell(after), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise _invalid(step, str(error)) from error
    return f"structure of {len(after.graph.node)} nodes"


def _invalid(step: Pass | None, what: str) -> PassError:
    """The error for a graph that is not valid: what came in is wrong, or what a pass made of it."""
    if step is not None:
        return PassCheckError(f"pass {step.name!r}: {what}")
    return PassError(f"the model is not valid ONNX: {what}. Fix: export it again, or repair it")


def all_of(*checks: Check) -> Check:
    """One check that makes several, in order, and joins their lines."""

    def run(before: ModelProto | None, after: ModelProto, step: Pass | None) -> str:
        return "; ".join(check(before, after, step) for check in checks)

    return run


def _wiring(graph: GraphProto, outer: frozenset[str]) -> Iterator[str]:
    """Unnamed or doubled nodes, tensors read before or without being produced, or produced twice."""
    ready = {value.name for value in graph.input} | {t.name for t in graph.initializer}
    names: set[str] = set()
    for node in graph.node:
        if not node.name or node.name in names:
            yield f"node name {node.name!r} ({node.op_type}) is empty or used twice"
        names.add(node.name)
        for name in node.input:
            if name and name not in ready and name not in outer:
                yield f"node {node.name!r} ({node.op_type}) reads tensor {name!r}, not produced before it"
        bodies = [body for a in node.attribute for body in ([a.g] if a.HasField("g") else a.graphs)]
        for body in bodies:  # rare: joining the names costs as much as the graph has nodes
            yield from _wiring(body, outer | ready)
        for name in node.output:
            if name and name in ready:
                yield f"node {node.name!r} ({node.op_type}) produces tensor {name!r} a second time"
            ready.add(name)
    for value in graph.output:
        if value.name not in ready and value.name not in outer:
            yield f"graph output {value.name!r} is produced by no node"


def _same_interface(before: ModelProto | None, after: ModelProto, step: Pass | None) -> Iterator[str]:
    """Inputs and outputs keep names, order and (unless the pass says so) element types."""
    if before is None:
        return
    typed = step is None or not step.changes_types
    for kind, old, new in (
        ("inputs", before.graph.input, after.graph.input),
        ("outputs", before.graph.output, after.graph.output),
    ):
        was, now = ([(v.name, v.type.tensor_type.elem_type if typed else 0) for v in vs] for vs in (old, new))
        if step is not None and step.changes_interface:
            now = [item for item in now if item in was] if kind == "inputs" else now
            was = [item for item in was if item in now] if kind == "inputs" or step.drops_outputs else was
            now = now[: len(was)]
        if was != now:
            yield f"graph {kind} changed from {was} to {now} (name, element type)"
