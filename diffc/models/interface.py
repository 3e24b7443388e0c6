"""The interface of a backbone as a value: what a pipeline calls it with, read off a few calls (`diffc.models.capture`).

JSON-able: an artifact keeps it in its manifest, and runs without the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from diffc.models.nested import Path
from diffc.models.relation import Relation, Setting


@dataclass(frozen=True)
class Input:
    """One tensor, or one whole number, that the backbone is called with.

    `dims` mixes names of dimensions with sizes. `kind` says what it holds: "values", a "mask" of ones and zeros, a
    "time" of the schedule, or a "size": a whole number of the call that follows the image size. A graph has no
    numbers, so its input is a tensor of that length, of which nothing but the length is read. "lengths" are those of
    the tensors in a list (`diffc.models.lists`).
    `low` and `high` are the least and largest value seen. `bound` is the dimension whose size is above all values:
    numbers of rows of another input.
    """

    name: str
    path: Path
    dtype: Literal["model", "float32", "int64", "bool"]
    dims: tuple[str | int, ...]
    kind: Literal["values", "mask", "time", "positions", "size", "lengths"] = "values"
    low: float = 0.0
    high: float = 1.0
    bound: str | None = None


@dataclass(frozen=True)
class Dimension:
    """A dynamic dimension: its size by `relation`, a multiple of `multiple`, at most `maximum`."""

    name: str
    relation: Relation
    multiple: int = 1
    maximum: int | None = None


@dataclass(frozen=True)
class Output:
    """One result of the backbone; `field` is its name in what forward() returns."""

    name: str
    dims: tuple[str | int, ...]
    field: str = "sample"


@dataclass(frozen=True)
class Interface:
    """All that a compile has to know of a backbone that no file of diffc describes.

    `batch` is how often a pipeline's batch is in the backbone's: 2 where guidance doubles it. `constants` are
    arguments that had one value in every call; the graph has no input for them. `tuples` are the places of lists that
    are tuples. `lists` are the arguments that are a list of one tensor per image, and whether these differ in length.
    `output_class` is the "module:class" of what forward() returns, `attributes` are those that the
    pipeline read from the backbone beside its config. `multiple`: pixels that height and width are multiples of.
    `frames` are the step and the rest of valid numbers of frames (8 and 1: 9, 17, ...), None for images. `native` is
    what the pipeline makes when nothing is asked for. `assumed` has one line for everything that was taken for granted.
    """

    backbone_class: str
    component: str
    pipeline_class: str
    inputs: tuple[Input, ...]
    constants: tuple[tuple[Path, Any], ...]
    tuples: tuple[Path, ...]
    dimensions: tuple[Dimension, ...]
    outputs: tuple[Output, ...]
    output_class: str
    attributes: Mapping[str, Any]
    batch: int
    multiple: int
    frames: tuple[int, int] | None
    native: Setting
    assumed: tuple[str, ...] = ()
    lists: Mapping[str, bool] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The interface as a manifest holds it."""
        found = asdict(replace(self, dimensions=()))
        found["dimensions"] = [
            {**asdict(replace(d, relation=Relation(()))), "relation": d.relation.to_json()}
            for d in self.dimensions
        ]
        return found

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Interface:
        """What `to_json` wrote."""
        given = dict(values)
        given["inputs"] = tuple(
            Input(**{**i, "path": tuple(i["path"]), "dims": tuple(i["dims"])}) for i in given["inputs"]
        )
        given["constants"] = tuple((tuple(path), value) for path, value in given["constants"])
        given["tuples"] = tuple(tuple(path) for path in given["tuples"])
        given["dimensions"] = tuple(
            Dimension(**{**d, "relation": Relation.from_json(d["relation"])}) for d in given["dimensions"]
        )
        given["outputs"] = tuple(Output(**{**o, "dims": tuple(o["dims"])}) for o in given["outputs"])
        given["frames"] = None if given["frames"] is None else tuple(given["frames"])
        given["assumed"] = tuple(given["assumed"])
        return cls(**given)
