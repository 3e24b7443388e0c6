"""`--profile` of an ONNX file: sizes of its dynamic dimensions by name, and what an engine is built for."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

import onnx

from diffc.backends.profile import Profile
from diffc.backends.target import Target
from diffc.errors import DiffcError
from diffc.frontend.onnx_family import KnownInterface
from diffc.models.profiles import ShapeProfile, default_profile, parse_sizes, profile_of_ranges
from diffc.validate.trial_inputs import dynamic_names, followers, named_dimensions, open_dimensions

Ranges = Mapping[str, tuple[int, int, int]]
"""Smallest, usual and largest size by dimension."""


def given_sizes(model: onnx.ModelProto, text: str) -> dict[str, tuple[int, int, int]]:
    """The ranges that `--profile` gives, in the file's own names; a dimension that follows the batch takes its range.

    Raises DiffcError for a dimension that the file does not have.
    """
    sizes = parse_sizes(text, dynamic_names(model))
    follows = {name: batch for name, batch in followers(model).items() if name not in sizes}
    return sizes | {name: sizes[batch] for name, batch in follows.items() if batch in sizes}


def held_to_file(text: str, before: Mapping[str, Sequence[str | int]], model: onnx.ModelProto) -> str:
    """`--profile` without the dimensions that are numbers in `model` and were dynamic in the dimensions `before`.

    Raises DiffcError for a range of one of them that has other sizes as well.
    """
    after = named_dimensions(model)
    pairs = [pair for name, dims in before.items() for pair in zip(dims, after[name], strict=True)]
    fixed = {str(old): int(new) for old, new in pairs if old != new}
    given = parse_sizes(text, [*dynamic_names(model), *fixed])
    if wrong := [name for name in given if name in fixed and set(given[name]) != {fixed[name]}]:
        stated = ",".join(f"{name}={fixed[name]}" for name in wrong)
        raise DiffcError(
            f"--profile asks for more than {stated}, the one size at which the file runs, for its graph holds it",
            fix=f"give {stated} in --profile, or export the model by torch.onnx.export with dynamo=True",
        )
    return ",".join(
        f"{name}={':'.join(map(str, sizes))}" for name, sizes in given.items() if name not in fixed
    )


def check_profile(ranges: Ranges, reason: Callable[[Mapping[str, int]], str]) -> None:
    """Raise DiffcError where the graph does not run at an end of the ranges; `reason` tells why it does not."""
    for index, end in enumerate(("smallest", "usual", "largest")):
        sizes = {name: size[index] for name, size in ranges.items()}
        if why := reason(sizes) if sizes else "":
            stated = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise DiffcError(
                f"the file does not run at the {end} sizes of --profile ({stated}): {why}",
                fix="give sizes at which it runs, such as those of its export and, for a UNet, multiples of 8 rows",
            )


def trial_sizes(ranges: Ranges) -> list[dict[str, int]]:
    """The smallest and the usual sizes of a profile, at which a graph is tried first."""
    return [{name: sizes[index] for name, sizes in ranges.items()} for index in (0, 1)] if ranges else []


def profile_of(
    model: onnx.ModelProto, text: str, targets: Sequence[Target], interface: KnownInterface | None = None
) -> tuple[Profile, ...]:
    """The engine's shapes from `--profile dim=min:opt:max,...`, by the names of the file's dynamic dimensions.

    Empty when no dimension is dynamic or no target builds an engine. Raises DiffcError that lists what is
    missing or unknown, with the family's usual ranges where `interface` is known; a dimension that follows the batch
    need not be given.
    """
    known, sizes = dynamic_names(model), given_sizes(model, text)
    if not known or not any(target.is_engine for target in targets):
        return ()
    if missing := open_dimensions(model, sizes):
        raise DiffcError(
            f"the file has dynamic dimensions without a range: {', '.join(missing)}",
            fix=f"give --profile {_example(missing, interface)}",
        )
    bounds = [{name: size[index] for name, size in sizes.items()} for index in range(3)]
    return (Profile.of_dims(named_dimensions(model), *bounds),)


def shape_profile(interface: KnownInterface, model: onnx.ModelProto, text: str) -> ShapeProfile:
    """The profile in images, pixels and tokens; what --profile leaves open has the family's usual range.

    Raises UnsupportedError when no image has such sizes.
    """
    ranges = interface.ranges(given_sizes(model, text))
    return profile_of_ranges(interface.family, interface.config, ranges)


def _example(names: Sequence[str], interface: KnownInterface | None) -> str:
    """What --profile takes for the dimensions `names`, and the images that it means where the family is known."""
    ranges = dict.fromkeys(names, "min:opt:max")
    if interface is None:
        return _option(ranges)
    family, config = interface.family, interface.config
    profile = default_profile(family, config)
    bounds = [family.sizes(shape) for shape in (profile.minimum, profile.optimum, profile.maximum)]
    for name in (name for name in names if name in interface.dims):
        ranges[name] = ":".join(str(sizes[interface.dims[name]]) for sizes in bounds)
    return f"{_option(ranges)}, which is usual for {family} ({profile.minimum} to {profile.maximum})"


def _option(ranges: Mapping[str, str]) -> str:
    return shlex.quote(",".join(f"{name}={sizes}" for name, sizes in ranges.items()))
