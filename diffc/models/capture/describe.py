"""From recorded calls to inputs: types, kinds, constants, and how every size follows from the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diffc.errors import UnsupportedError
from diffc.models.capture.record import Leaves
from diffc.models.interface import Dimension, Input
from diffc.models.lists import LENGTHS
from diffc.models.nested import Path
from diffc.models.relation import Relation, Setting, fit

_TIMES = ("timestep", "timesteps", "t", "sigma", "timestep_ratio")
_LARGE = 8.0
"""Values beyond this are no embeddings: they are sizes or positions, and are drawn from the range that was seen."""


class Unfit(Exception):
    """A size that follows no polynomial of the settings at these values of them."""


@dataclass
class Sizes:
    """Names of dynamic dimensions, one for each way in which sizes follow from the settings."""

    named: dict[Relation, str] = field(default_factory=dict)

    def name(self, relation: Relation) -> str:
        """The name of the dimension with this relation, a new one at first."""
        if relation not in self.named:
            base, number = _plain_name(relation), 1
            while (name := base if number == 1 else f"{base}_{number}") in self.named.values():
                number += 1
            self.named[relation] = name
        return self.named[relation]

    def dimensions(self) -> tuple[Dimension, ...]:
        """All dimensions, in the order in which they were named."""
        return tuple(Dimension(name, relation) for relation, name in self.named.items())


def _plain_name(relation: Relation) -> str:
    """height, width, batch, frames, text; "image" or "video" for tokens; "sequence" for text and tokens together."""
    settings = relation.settings - {"batch"} if len(relation.settings) > 1 else relation.settings
    if len(settings) == 1:
        return next(iter(settings))
    if "text" in settings:
        return "sequence"
    return "video" if "frames" in settings else "image"


@dataclass(frozen=True)
class Recorded:
    """The calls at `settings`, in the measures of the backbone: its own batch, and tokens as it gets them."""

    settings: Sequence[Setting]
    calls: Sequence[Leaves]
    batch: int = 1

    def relation(self, sizes: Sequence[int], what: str) -> Relation | int:
        """How a size follows from the settings; an int where it does not change. Raises Unfit."""
        if len(set(sizes)) == 1:
            return sizes[0]
        found = fit(self.settings, sizes)
        if found is None:
            raise Unfit(
                f"{what} has the sizes {', '.join(map(str, dict.fromkeys(sizes)))}, and follows no rule"
            )
        return found


def recorded(settings: Sequence[Setting], calls: Sequence[Leaves]) -> Recorded:
    """The calls in the measures of the backbone. Raises UnsupportedError where arguments come and go, and Unfit."""
    came = [
        path for call in calls for path in call if path not in calls[0] or any(path not in c for c in calls)
    ]
    if came:
        names = ", ".join(dict.fromkeys(str(path[0]) for path in came))
        raise UnsupportedError(
            f"the backbone is called with lists whose length follows the batch ({names}); one graph holds one length",
            fix="write a family file for this class: CONTRIBUTING.md, Adding a model family",
        )
    plain = Recorded(settings, calls)
    batch, text = _measures(plain)
    own = [dict(s) | {"batch": s["batch"] * batch} for s in settings]
    if text is not None:
        for setting in own:
            setting["text"] = int(text.at(setting))
    return Recorded(own, calls, batch)


def _measures(plain: Recorded) -> tuple[int, Relation | None]:
    """How often the pipeline's batch is in the backbone's, and the tokens that the backbone gets, by the text asked."""
    batch, text = None, None
    for path, first in plain.calls[0].items():
        for axis in range(getattr(first, "ndim", 0)):
            found = plain.relation([c[path].shape[axis] for c in plain.calls], _axis(path, axis))
            if isinstance(found, int):
                continue
            if batch is None and (line := found.line("batch")) is not None and line[1] == 0:
                batch = line[0]
            if text is None and found.line("text") is not None:
                text = found
    return int(batch or 1), text


def inputs_of(
    record: Recorded, half: Leaves, sizes: Sizes
) -> tuple[tuple[Input, ...], tuple[tuple[Path, Any], ...]]:
    """Inputs of the graph and constants; `half` is a call of a pipeline in bfloat16.

    Raises UnsupportedError for a number that follows the settings and is not whole, and Unfit.
    """
    inputs, constants = [], []
    for path, first in record.calls[0].items():
        values = [call[path] for call in record.calls]
        if hasattr(first, "ndim"):
            inputs.append(_tensor(path, values, half.get(path), record, sizes))
        elif all(value == first for value in values):
            constants.append((path, first))
        elif all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            found = record.relation(values, _name(path))
            assert isinstance(found, Relation)
            inputs.append(Input(_name(path), path, "float32", (sizes.name(found),), "size"))
        else:
            raise UnsupportedError(
                f"the argument {_name(path)} changes with the image size and is not a whole number",
                fix="add a family for this class: CONTRIBUTING.md",
            )
    bounds = {item.path: _bound(item, record, sizes) for item in inputs}
    return tuple(replace(item, bound=bounds[item.path]) for item in inputs), tuple(constants)


def _bound(item: Input, record: Recorded, sizes: Sizes) -> str | None:
    """The dimension whose rows whole numbers count: it is one above the largest of them at all settings."""
    if item.kind != "positions" or item.dtype != "int64":
        return None
    try:
        above = record.relation([int(call[item.path].max()) + 1 for call in record.calls], item.name)
    except Unfit:
        return None
    return None if isinstance(above, int) else sizes.named.get(above)


def _tensor(path: Path, values: Sequence[Any], half: Any, record: Recorded, sizes: Sizes) -> Input:
    import torch

    first, dims = values[0], list[str | int]()
    if first.is_complex():
        raise UnsupportedError(
            f"the argument {_name(path)} has complex numbers, which ONNX does not have",
            fix="add a family for this class: CONTRIBUTING.md",
        )
    for axis in range(first.ndim):
        found = record.relation([value.shape[axis] for value in values], _axis(path, axis))
        dims.append(found if isinstance(found, int) else sizes.name(found))
    low = min(float(v.float().min()) for v in values)
    high = max(float(v.float().max()) for v in values)
    kind = _kind(path, first, low, high)
    dtype: Any = "model"
    if kind == "time":
        dtype = "float32"  # a scheduler may give any time, and 16 bits hold few
    elif first.dtype is torch.bool:
        dtype = "bool"
    elif not first.is_floating_point():
        dtype = "int64"
    elif kind == "positions" or (half is not None and half.dtype == torch.float32):
        dtype = "float32"
    return Input(_name(path), path, dtype, tuple(dims), kind, low, high)


def _kind(path: Path, first: Any, low: float, high: float) -> Any:
    import torch

    name = str(path[-1] if isinstance(path[-1], str) else path[0])
    if name in _TIMES:
        return "time"
    if name.endswith(LENGTHS) and first.dtype is torch.int64 and first.ndim == 1:
        return "lengths"
    if first.dtype is torch.bool or ("mask" in name and low >= 0 and high <= 1):
        return "mask"
    if not first.is_floating_point() or name.endswith("_ids") or max(abs(low), abs(high)) > _LARGE:
        return "positions"
    return "values"


def _name(path: Path) -> str:
    """The name of an input: the last name of its place where that is enough, with the positions below it."""
    last = max(i for i, part in enumerate(path) if isinstance(part, str))
    return "_".join(map(str, path[last:]))


def _axis(path: Path, axis: int) -> str:
    return f"axis {axis} of {_name(path)}"


def whole(dimensions: Sequence[Dimension], setting: Mapping[str, int]) -> bool:
    """Whether every dimension has a whole size above zero at these settings."""
    sizes = [d.relation.at(setting) for d in dimensions]
    return all(size.denominator == 1 and size > 0 for size in sizes)
