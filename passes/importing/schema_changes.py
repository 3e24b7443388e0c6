"""What opsets changed in the operators of ONNX's default domain, read from the schemas of the onnx package.

A change either shows from the two schemas that a node stands as it is, or is one of those that were reviewed
(`KEEPS`), or has an adapter (`ADAPTERS` of `passes.importing.opset_adapters`), or is unknown and stops the conversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import onnx
import onnx_graphsurgeon as gs
from onnx.defs import OpSchema

from passes.importing.older_opsets import SUCCESSORS
from passes.importing.opset_adapters import ADAPTERS, KEEPS
from passes.weights.recipe import dtype_of


@dataclass(frozen=True)
class Change:
    """What opset `since` did to an operator: it reads the same, a reviewed addition, or an adapter rewrites."""

    op: str
    since: int
    kind: Literal["same", "reviewed", "adapter", "unknown"]
    reason: str


def changes(source: int, to: int) -> list[Change]:
    """Every change of a default-domain operator after opset `source` up to `to`, by operator and opset."""
    return [change for op in sorted(_schemas()) for change in _steps(op, source, to)]


def steps_of(op: str, source: int, to: int) -> Iterator[Change]:
    """The changes of an operator, and after the opset that dropped it, of the one that took its place."""
    yield from _steps(op, source, to)
    if op in SUCCESSORS:
        successor, since = SUCCESSORS[op]
        yield from _steps(successor, max(source, since), to)


@cache
def _schemas() -> dict[str, dict[int, OpSchema]]:
    """All schemas of the default domain by operator and the opset that brought them, ascending."""
    found: dict[str, dict[int, OpSchema]] = {}
    for schema in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda item: item.since_version):
        if schema.domain == "":
            found.setdefault(schema.name, {})[schema.since_version] = schema
    return found


def schema_of(op: str, opset: int) -> OpSchema | None:
    """The schema of an operator in an opset; None where it has none or dropped the operator before."""
    return next(
        (schema for since, schema in reversed(_schemas().get(op, {}).items()) if since <= opset),
        None,
    )


@cache
def _steps(op: str, source: int, to: int) -> tuple[Change, ...]:
    """The changes of one operator after `source` up to `to`; none for an operator that `source` lacks."""
    versions = [since for since in _schemas().get(op, {}) if since <= to]
    pairs = [(old, new) for old, new in pairwise(versions) if new > source]
    return tuple(_change(op, _schemas()[op][old], _schemas()[op][new]) for old, new in pairs)


def _change(op: str, old: OpSchema, new: OpSchema) -> Change:
    key, differ = (op, new.since_version), ", ".join(_differences(old, new))
    if key in ADAPTERS:
        return Change(*key, "adapter", (ADAPTERS[key].__doc__ or "").strip())
    if key in KEEPS:
        return Change(*key, "reviewed", KEEPS[key])
    if differ:
        return Change(*key, "unknown", differ)
    return Change(*key, "same", "inputs, outputs, attributes and defaults are the same")


def _differences(old: OpSchema, new: OpSchema) -> Iterator[str]:
    """Where the schemas differ so that an old node may mean another thing; types are compared per node."""
    if new.deprecated and not old.deprecated:
        yield "that it exists"
    for kind, before, after in (("inputs", old.inputs, new.inputs), ("outputs", old.outputs, new.outputs)):
        optional = OpSchema.FormalParameterOption.Optional
        if len(before) != len(after) or any(
            a.name != b.name or (a.option != b.option and b.option != optional) or a.min_arity < b.min_arity
            for a, b in zip(before, after, strict=True)
        ):
            yield kind
    for name in sorted({*old.attributes, *new.attributes}):
        if _attribute(old, name) != _attribute(new, name):
            yield f"attribute {name!r}"


def _attribute(schema: OpSchema, name: str) -> Any:
    """Type, necessity and default of an attribute, to compare."""
    found = schema.attributes.get(name)
    if found is None:
        return None
    return found.type, found.required, found.default_value.SerializeToString(deterministic=True)


def type_problem(node: gs.Node, schema: OpSchema) -> str | None:
    """Which input has an element type that the schema does not take; None where types fit or are not known."""
    bound: dict[str, str] = {}
    for index, tensor in enumerate(node.inputs):
        if not schema.inputs or tensor.is_empty():
            continue
        parameter, kind = schema.inputs[min(index, len(schema.inputs) - 1)], _type_of(tensor)
        if kind is None:
            continue
        if kind not in parameter.types:
            return f"its input {parameter.name!r} may not be {kind}"
        if parameter.is_homogeneous and bound.setdefault(parameter.type_str, kind) != kind:
            return f"its input {parameter.name!r} must be {bound[parameter.type_str]} as others, not {kind},"
    return None


def _type_of(tensor: gs.Tensor) -> str | None:
    """The type as schemas spell it; None when it is not known or not a dense tensor."""
    dtype = dtype_of(tensor)
    if dtype is None or getattr(tensor, "type", "tensor_type") != "tensor_type":
        return None
    return f"tensor({onnx.TensorProto.DataType.Name(dtype).lower()})"
