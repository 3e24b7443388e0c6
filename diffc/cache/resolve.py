"""Resolves a plan on a backbone: patterns and predicates become lists of blocks, one group for each decision."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, Literal

from torch import nn

from diffc.cache.plan import CachePlan, Entry, Steps, steps_from_json, steps_to_json
from diffc.cache.streams import streams_of
from diffc.errors import DiffcError

_LONGEST = 150
"""The most steps that compiled models are made for; a longer generation takes the nearest set that exists."""


@dataclass(frozen=True)
class Group:
    """Blocks, by module path and in the backbone's order, with one decision for all of them."""

    blocks: tuple[str, ...]
    steps: Steps
    keep: Literal["output", "residual"]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"blocks": list(self.blocks), "steps": steps_to_json(self.steps), "keep": self.keep}


@dataclass(frozen=True)
class ResolvedCache:
    """The groups of a plan on one backbone. `notes` tell the user how ambiguous parts were read."""

    name: str
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()

    @property
    def needs_count(self) -> bool:
        """Whether decisions depend on the number of steps of a generation."""
        return any(group.steps.needs_count for group in self.groups)

    def reused(self, step: int, count: int | None) -> frozenset[int]:
        """The numbers of the groups whose kept values are used in `step`."""
        return frozenset(i for i, group in enumerate(self.groups) if group.steps.reuses(step, count))

    def reuse_sets(self) -> list[frozenset[int]]:
        """The distinct sets of groups that are used again together, the empty one left out; largest first."""
        if not self.needs_count:
            counts: Iterable[int] = (_LONGEST,)
        else:
            tables = [g.steps.by_count for g in self.groups if g.steps.by_count is not None]
            known = [{count for count, _ in table} for table in tables]
            counts = sorted(set.intersection(*known)) if known else range(1, _LONGEST + 1)
        found = {self.reused(step, count) for count in counts for step in range(count)} - {frozenset()}
        return sorted(found, key=lambda s: (-len(s), sorted(s)))

    def schedule(self, count: int) -> list[frozenset[int]]:
        """What every step of a generation of `count` steps uses again."""
        return [self.reused(step, count) for step in range(count)]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "groups": [group.to_json() for group in self.groups]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ResolvedCache:
        """The inverse of `to_json`."""
        groups = (Group(tuple(g["blocks"]), steps_from_json(g["steps"]), g["keep"]) for g in data["groups"])
        return cls(data["name"], tuple(groups))


def resolve(plan: CachePlan, backbone: nn.Module) -> ResolvedCache:
    """The plan on `backbone` (whose tensors may be fake). Later entries override earlier ones, and notes say so.

    Raises DiffcError for a pattern that matches no module, for a block inside another, and for a residual of a
    block that has none.
    """
    modules = {path: module for path, module in backbone.named_modules() if path}
    chosen: dict[str, int] = {}
    notes = []
    for number, entry in enumerate(plan.entries):
        found = _matching(entry, list(modules), block_names(backbone))
        if taken := [path for path in found if path in chosen]:
            notes.append(f"entry {number + 1} decides for {spell(taken)}, which earlier entries name as well")
        chosen |= dict.fromkeys(found, number)
    order = {path: i for i, path in enumerate(modules)}
    paths = sorted(chosen, key=order.__getitem__)
    _check_nesting(paths)
    decided: dict[str, tuple[list[str], Steps, Literal["output", "residual"]]] = {}
    for path in paths:
        entry = plan.entries[chosen[path]]
        keep = _keep(entry, path, modules[path])
        key = json.dumps([steps_to_json(entry.steps), keep])
        decided.setdefault(key, ([], entry.steps, keep))[0].append(path)
    groups = tuple(Group(tuple(blocks), steps, keep) for blocks, steps, keep in decided.values())
    return ResolvedCache(plan.name, groups, tuple(notes))


def block_names(backbone: nn.Module) -> list[str]:
    """The blocks of a backbone: the members of its module lists, and a UNet's middle."""
    names = []
    for path, module in backbone.named_children():
        if isinstance(module, nn.ModuleList):
            names += [f"{path}.{number}" for number in range(len(module))]
        elif path == "mid_block":
            names.append(path)
    return names


def spell(paths: Sequence[str]) -> str:
    """Module paths in a row, runs of numbers shortened: transformer_blocks.0-23."""
    parts = []
    pieces = [(path.rpartition(".")[0], path.rpartition(".")[2]) for path in paths]
    for (parent, numbered), group in groupby(pieces, key=lambda p: (p[0], p[1].isdigit())):
        last = [name for _, name in group]
        for run in _runs(last) if numbered else [[name] for name in last]:
            name = run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}"
            parts.append(f"{parent}.{name}" if parent else name)
    return ", ".join(parts)


def _runs(numbers: Sequence[str]) -> list[list[str]]:
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(runs[-1][-1]) + 1 == int(number):
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def matches(pattern: str, path: str) -> bool:
    """Whether a module path matches a pattern: `*`, `?` and `[...]` within a part between dots, `2-7` for numbers,
    `**` for any parts.
    """
    parts, there = pattern.split("."), path.split(".")
    # Several ** in a row are one, and every other part takes one of the path: so there are few ways to try.
    parts = [p for i, p in enumerate(parts) if p != "**" or parts[i - 1 : i] != ["**"]]
    return len(parts) - parts.count("**") <= len(there) and _match(parts, there)


def _match(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_match(pattern[1:], path[skip:]) for skip in range(len(path) + 1))
    return bool(path) and _match_part(pattern[0], path[0]) and _match(pattern[1:], path[1:])


def _match_part(pattern: str, part: str) -> bool:
    limits = re.fullmatch(r"(\d+)-(\d+)", pattern)
    if limits is None:
        return fnmatchcase(part, pattern)
    return part.isdigit() and int(limits[1]) <= int(part) <= int(limits[2])


def _matching(entry: Entry, paths: Sequence[str], blocks: Sequence[str]) -> list[str]:
    if callable(entry.blocks):
        found = [path for path in blocks if entry.blocks(path)]
        if not found:
            raise DiffcError("a predicate of a cache plan takes no block", fix=f"blocks: {spell(blocks)}")
        return found
    found = []
    for pattern in entry.blocks:
        matched = [path for path in paths if matches(pattern, path)]
        if not matched:
            raise DiffcError(
                f"no module matches {pattern!r} of the cache plan",
                fix=f"name blocks of this backbone ({spell(blocks)}), or modules inside them",
            )
        found += [path for path in matched if path not in found]
    return [path for path in found if not any(matches(pattern, path) for pattern in entry.exclude)]


def _check_nesting(paths: Sequence[str]) -> None:
    known = set(paths)
    for path in paths:
        parts = path.split(".")
        for outer in (".".join(parts[:length]) for length in range(1, len(parts))):
            if outer in known:
                raise DiffcError(
                    f"the cache plan has both {outer} and {path}, which is inside it",
                    fix="leave one of them out",
                )


def _keep(entry: Entry, path: str, module: nn.Module) -> Literal["output", "residual"]:
    streams = streams_of(module)
    if entry.keep == "residual" and streams is None:
        raise DiffcError(
            f"{path} is a {type(module).__name__}, whose output is not its input plus something",
            fix='keep its "output"',
        )
    if entry.keep == "auto":
        return "output" if streams is None else "residual"
    return entry.keep
