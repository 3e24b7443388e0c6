"""Checks that profiles fit a model's inputs, before the builder starts."""

from __future__ import annotations

from collections.abc import Sequence

from diffc.backends.onnx_graph import GraphInput
from diffc.backends.profile import Profile, ShapeRange
from diffc.errors import DiffcError


def check_profiles(inputs: Sequence[GraphInput], profiles: Sequence[Profile]) -> None:
    """Raise DiffcError when a dynamic input has no range, or a range does not fit the input it names."""
    dynamic = [i for i in inputs if None in i.dims]
    if dynamic and not profiles:
        names = ", ".join(f"{i.name} {_show(i)}" for i in dynamic)
        raise DiffcError(
            f"no optimization profile, and these inputs are dynamic: {names}",
            fix="give a profile with a minimum, optimum and maximum shape for each",
        )
    for number, profile in enumerate(profiles):
        _check_profile(f"profile {number}", inputs, profile)


def _check_profile(label: str, inputs: Sequence[GraphInput], profile: Profile) -> None:
    known = {i.name: i for i in inputs}
    unknown = sorted(profile.inputs.keys() - known.keys())
    if unknown:
        raise DiffcError(
            f"{label} names {', '.join(unknown)}. Inputs of the model: {', '.join(known)}",
            fix="name inputs that the model has",
        )
    missing = [i.name for i in inputs if None in i.dims and i.name not in profile.inputs]
    if missing:
        raise DiffcError(
            f"{label} has no shapes for the dynamic input {', '.join(missing)}",
            fix="give three shapes for it",
        )
    for name, shapes in profile.inputs.items():
        _check_range(f"{label}, input {name}", known[name], shapes)


def _check_range(label: str, graph_input: GraphInput, shapes: ShapeRange) -> None:
    rank = len(graph_input.dims)
    if any(len(shape) != rank for shape in shapes):
        raise DiffcError(
            f"{label}: {_list(shapes)} must have {rank} dimensions, as {_show(graph_input)} has",
            fix="give as many dimensions",
        )
    for low, usual, high, fixed in zip(*shapes, graph_input.dims, strict=True):
        if not 1 <= low <= usual <= high:
            raise DiffcError(
                f"{label}: {_list(shapes)} must hold 1 <= minimum <= optimum <= maximum", fix="order them so"
            )
        if fixed is not None and (low, high) != (fixed, fixed):
            raise DiffcError(
                f"{label}: {_list(shapes)} changes a fixed dimension of {_show(graph_input)}",
                fix="give that dimension as the model has it",
            )


def _show(graph_input: GraphInput) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in graph_input.dims) + "]"


def _list(shapes: ShapeRange) -> str:
    return " / ".join("x".join(map(str, shape)) for shape in shapes)
