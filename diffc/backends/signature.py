"""The inputs and outputs of a compiled graph, and the check that tensors fit them before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffc.backends.profile import Profile
from diffc.errors import DiffcError
from diffc.models.spec import DimSpec

TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "BOOL")
"""Element types that inputs and outputs may have, by onnx.TensorProto's names, as the manifest writes them."""


@dataclass(frozen=True)
class Value:
    """An input or output of the graph, of one of TYPES; `dims` mixes names of dynamic dimensions with sizes."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in graph order, the limits of the dynamic dimensions, and the profiles that shapes must fit.

    `profiles` is empty where the runtime takes every size (ONNX Runtime's own providers).
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    limits: tuple[DimSpec, ...] = ()
    profiles: tuple[Profile, ...] = ()

    @classmethod
    def of(
        cls,
        manifest: Mapping[str, Any],
        limits: Sequence[DimSpec] = (),
        profiles: Sequence[Profile] = (),
    ) -> Signature:
        """The signature in a manifest.json. Raises DiffcError for a type that is none of TYPES."""
        return cls(
            tuple(_value(entry) for entry in manifest["inputs"]),
            tuple(_value(entry) for entry in manifest["outputs"]),
            tuple(limits),
            tuple(profiles),
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The sizes of the dynamic dimensions. Raises DiffcError naming the first input that does not fit.

        `shapes` has one entry for every input. A dimension must have one size in all inputs, a multiple and a
        maximum as the model has them, and lie inside a profile where there are profiles.
        """
        sizes: dict[str, int] = {}
        for value in self.inputs:
            _match(value, shapes[value.name], sizes)
        for limit in self.limits:
            _check_limit(limit, sizes)
        if self.profiles:
            pick_profile(self.profiles, shapes)
        return sizes

    def output_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shape of every output at these sizes."""
        return {v.name: tuple(sizes[d] if isinstance(d, str) else d for d in v.dims) for v in self.outputs}


def pick_profile(profiles: Sequence[Profile], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of the profile that holds `shapes`; of several, the one with the nearest optimum.

    Raises DiffcError that tells every profile's range of the first input that is outside.
    """
    fitting = [n for n, profile in enumerate(profiles) if _outside(profile, shapes) is None]
    if fitting:
        return min(fitting, key=lambda n: _distance(profiles[n], shapes))
    name = _outside(profiles[0], shapes)
    assert name is not None
    ranges = [p.inputs[name] for p in profiles]
    told = "; ".join(f"profile {n}: {list(r.min)} to {list(r.max)}" for n, r in enumerate(ranges))
    raise DiffcError(
        f"input {name} of shape {list(shapes[name])} is outside what the engine was built for ({told})",
        fix="change the image size, the batch or the prompt's length, or compile with a wider --profile",
    )


def _outside(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first input whose shape is outside of `profile`; None where all are inside."""
    for name, sizes in profile.inputs.items():
        rows = zip(sizes.min, shapes[name], sizes.max, strict=True)
        if not all(low <= size <= high for low, size, high in rows):
            return name
    return None


def _distance(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(
        abs(size - best)
        for n, r in profile.inputs.items()
        for size, best in zip(shapes[n], r.opt, strict=True)
    )


def _match(value: Value, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Enter the sizes of `shape` into `sizes`. Raises DiffcError where they contradict the graph or each other."""
    fits = len(shape) == len(value.dims) and 0 not in shape
    for dim, size in zip(value.dims, shape, strict=False):
        fits = fits and size == (sizes.get(dim, size) if isinstance(dim, str) else dim)
    if not fits:
        known = [f"{d}={sizes[d]}" if d in sizes else str(d) for d in value.dims if d is not None]
        raise DiffcError(
            f"input {value.name} has shape {list(shape)}, and this backbone takes [{', '.join(known)}]",
            fix="give tensors of one batch, image size and prompt length, as the diffusers pipeline makes them; for"
            " another batch than the one of its --profile, compile again",
        )
    sizes.update({d: s for d, s in zip(value.dims, shape, strict=True) if isinstance(d, str)})


def _check_limit(limit: DimSpec, sizes: Mapping[str, int]) -> None:
    size = sizes.get(limit.name, limit.multiple)
    if size % limit.multiple:
        raise DiffcError(
            f"{limit.name} is {size}, and this backbone takes multiples of {limit.multiple}",
            fix="give a multiple",
        )
    if limit.maximum is not None and size > limit.maximum:
        raise DiffcError(
            f"{limit.name} is {size}, and this backbone ends at {limit.maximum}", fix="give a smaller size"
        )


def _value(entry: Mapping[str, Any]) -> Value:
    if entry["dtype"] not in TYPES:
        raise DiffcError(
            f"{entry['name']} has type {entry['dtype']}, which nothing here can feed",
            fix="compile the model again",
        )
    return Value(entry["name"], entry["dtype"], tuple(entry["dims"]))
