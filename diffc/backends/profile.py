"""The shapes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from diffc.errors import DiffcError
from diffc.models.sizes import Sizes, size_of


class ShapeRange(NamedTuple):
    """The smallest, the most usual and the largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """A range of shapes, per input name, that an engine is built for."""

    inputs: Mapping[str, ShapeRange]

    @classmethod
    def of_json(cls, entry: Mapping[str, Mapping[str, Sequence[Sequence[int]]]]) -> Profile:
        """A profile as a manifest holds it: `dataclasses.asdict` of one."""
        return cls({name: ShapeRange(*map(tuple, ranges)) for name, ranges in entry["inputs"].items()})

    @classmethod
    def of_shapes(
        cls,
        minimum: Mapping[str, Sequence[int]],
        optimum: Mapping[str, Sequence[int]],
        maximum: Mapping[str, Sequence[int]],
    ) -> Profile:
        """The profile between three sets of shapes by input name. Raises DiffcError when these name other inputs."""
        if not minimum.keys() == optimum.keys() == maximum.keys():
            raise DiffcError(
                "minimum, optimum and maximum of a profile do not name the same inputs",
                fix="give the same inputs in all three",
            )
        return cls({n: ShapeRange(tuple(minimum[n]), tuple(optimum[n]), tuple(maximum[n])) for n in minimum})

    @classmethod
    def of_dims(
        cls, dims: Mapping[str, Sequence[str | int]], minimum: Sizes, optimum: Sizes, maximum: Sizes
    ) -> Profile:
        """The profile of inputs whose `dims` are sizes in terms of dynamic dimensions (see `diffc.models.sizes`).

        `minimum`, `optimum` and `maximum` are the sizes of these dimensions.
        """

        def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
            return {name: tuple(size_of(dim, sizes) for dim in own) for name, own in dims.items()}

        return cls.of_shapes(shapes(minimum), shapes(optimum), shapes(maximum))
