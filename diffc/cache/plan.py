"""A cache plan as data: the outputs of which blocks are used again, in which steps, and what is kept of them.

JSON and YAML hold the same mapping:

    {"name": "mine", "entries": [
      {"blocks": ["transformer_blocks.0-15"], "except": [], "steps": {"every": 2}, "keep": "residual"}]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from diffc.cache.plan_file import read_plan
from diffc.errors import DiffcError, unknown

Keep = Literal["auto", "output", "residual"]
KEEPS = ("auto", "output", "residual")
Blocks = tuple[str, ...] | Callable[[str], bool]
"""Patterns of module paths, or a predicate of one (resolved to a list before anything is compiled)."""


@dataclass(frozen=True)
class Steps:
    """In which steps of a generation, counted from 0, a block's kept value is used again.

    The steps from `start` to before `stop` (None: to the end), except every `every`-th of them (0: no exception).
    `listed` gives the steps one by one instead; `by_count` gives them for each number of steps. Negative `start`,
    `stop` and `listed` count from the end; a fraction between 0 and 1 is a share of the steps. Step 0 never uses a kept
    value.
    """

    every: int = 0
    start: float = 0
    stop: float | None = None
    listed: tuple[int, ...] | None = None
    by_count: tuple[tuple[int, tuple[int, ...]], ...] | None = None

    def __post_init__(self) -> None:
        if self.every < 0 or self.every == 1:
            raise DiffcError(f"every is {self.every} in a cache plan", fix="give 2 or more, or leave it out")

    @classmethod
    def of(cls, predicate: Callable[[int, int], bool], counts: Sequence[int]) -> Steps:
        """The steps that `predicate(step, number of steps)` chooses, for each of `counts`."""
        return cls(by_count=tuple((n, tuple(s for s in range(n) if predicate(s, n))) for n in counts))

    @property
    def needs_count(self) -> bool:
        """Whether the choice depends on the number of steps of a generation."""
        ends = (self.start, self.stop or 0, *(self.listed or ()))
        return self.by_count is not None or any(end < 0 or end != int(end) for end in ends)

    def reuses(self, step: int, count: int | None) -> bool:
        """Whether `step` of a generation of `count` steps uses the kept value.

        Raises DiffcError when `count` is None and the choice depends on it.
        """
        if step == 0:
            return False
        if self.needs_count and count is None:
            raise DiffcError(
                "this cache plan depends on the number of denoising steps, which the backbone is not told",
                fix="tell it: start(steps) of a loaded module, or give cache.apply the pipeline, or steps=",
            )
        if self.by_count is not None:
            return step in self._known(cast(int, count))
        if self.listed is not None:
            return step in {_absolute(s, count) for s in self.listed}
        start = _absolute(self.start, count)
        inside = step >= start and (self.stop is None or step < _absolute(self.stop, count))
        return inside and (self.every == 0 or (step - start) % self.every != 0)

    def _known(self, count: int) -> tuple[int, ...]:
        known = dict(self.by_count or ())
        if count not in known:
            raise unknown("number of steps in a cache plan", str(count), map(str, known))
        return known[count]


def _absolute(step: float, count: int | None) -> int:
    if step != int(step):
        return round(step * (count or 0))
    return int(step) + (count or 0) if step < 0 else int(step)


@dataclass(frozen=True)
class Entry:
    """Blocks that share a decision.

    `keep`: a block's "output", its output minus its input ("residual"), or "auto": the residual of blocks that add to
    their input (`diffc.cache.streams`), the output of others.
    """

    blocks: Blocks
    steps: Steps = field(default_factory=lambda: Steps(every=2))
    keep: Keep = "auto"
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class CachePlan:
    """Entries in order: where several name a block, the last one decides. No entries: nothing is used again."""

    entries: tuple[Entry, ...] = ()
    name: str = "custom"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. Raises DiffcError for a predicate of blocks, which only `resolve` makes a list."""
        return {"name": self.name, "entries": [_entry_to_json(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, data: Any) -> CachePlan:
        """The inverse of `to_json`. Raises DiffcError naming what a plan does not have."""
        content = _mapping(data, ("name", "entries"), "a cache plan")
        entries, name = content.get("entries", ()), content.get("name", "custom")
        if not isinstance(entries, list | tuple) or not isinstance(name, str):
            raise DiffcError(
                f"a cache plan has a name and a list of entries, not {_short(entries)} and {_short(name)}",
                fix="see docs/cache.md",
            )
        return cls(tuple(_entry_from_json(item) for item in entries), name)

    @classmethod
    def load(cls, path: Path) -> CachePlan:
        """The plan in a .json, .yaml or .yml file. Raises DiffcError when it cannot be read, or is not a plan."""
        return cls.from_json(read_plan(path))


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    if callable(entry.blocks):
        raise DiffcError(
            "a predicate of blocks cannot be written as data", fix="resolve the plan for a backbone first"
        )
    data: dict[str, Any] = {"blocks": list(entry.blocks), "steps": steps_to_json(entry.steps)}
    data |= {"keep": entry.keep} if entry.keep != "auto" else {}
    return data | ({"except": list(entry.exclude)} if entry.exclude else {})


def _entry_from_json(data: Any) -> Entry:
    content = _mapping(data, ("blocks", "except", "steps", "keep"), "an entry of a cache plan")
    keep = content.get("keep", "auto")
    if keep not in KEEPS:
        raise unknown("keep in a cache plan", str(keep), KEEPS)
    blocks, exclude = _strings(content.get("blocks")), _strings(content.get("except", ()))
    return Entry(blocks, steps_from_json(content.get("steps", {"every": 2})), cast(Keep, keep), exclude)


def steps_to_json(steps: Steps) -> Any:
    """A list of steps, or a mapping of the fields that are not at their default."""
    if steps.listed is not None:
        return list(steps.listed)
    if steps.by_count is not None:
        return {"by_count": {str(count): list(chosen) for count, chosen in steps.by_count}}
    default = Steps()
    return {k: v for k in ("every", "start", "stop") if (v := getattr(steps, k)) != getattr(default, k)}


def steps_from_json(data: Any) -> Steps:
    """The inverse of `steps_to_json`. Raises DiffcError naming what steps do not have."""
    try:
        if isinstance(data, (list, tuple)):
            return Steps(listed=tuple(_whole(step) for step in data))
        content = _mapping(data, ("every", "start", "stop", "by_count"), "the steps of a cache plan")
        if "by_count" in content:
            table = content["by_count"].items()
            return Steps(by_count=tuple((int(n), tuple(_whole(s) for s in chosen)) for n, chosen in table))
        stop = content.get("stop")
        return Steps(
            _whole(content.get("every", 0)),
            _number(content.get("start", 0)),
            None if stop is None else _number(stop),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise DiffcError(
            f"the steps {_short(data)} of a cache plan are not steps", fix="see docs/cache.md"
        ) from error


def _short(data: Any) -> str:
    """A value for a message. What holds others is told by its kind: written out it can be endless."""
    return repr(data)[:80] if isinstance(data, str | int | float | None) else f"a {type(data).__name__}"


def _whole(value: Any) -> int:
    """A step or a count: a whole number. Raises ValueError for any other value."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MOST_STEPS:
        raise ValueError(value)
    return value


def _number(value: Any) -> float:
    """A step, or a share of the steps. Raises ValueError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST_STEPS:
        raise ValueError(value)
    return float(value)


_MOST_STEPS = 1_000_000


def _mapping(data: Any, known: Sequence[str], what: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise DiffcError(f"{what} is a mapping, not {_short(data)}", fix=f"give it {', '.join(known)}")
    for key in data:
        if key not in known:
            raise unknown(f"key of {what}", str(key), known)
    return data


def _strings(data: Any) -> tuple[str, ...]:
    if isinstance(data, str):
        return (data,)
    if not isinstance(data, Sequence) or not all(isinstance(item, str) for item in data):
        raise DiffcError(
            f"blocks of a cache plan are module paths, not {_short(data)}", fix="give a list of them"
        )
    return tuple(data)
