"""Dynamic dimensions as torch.export wants them: what it finds out about them is taken over, and it runs again.

A backbone compares sizes while it runs: is the height even, are there at least four rows? torch.export then refuses a
dimension that could be otherwise, and says in text what it has to be: `height = 2*_height`, or a least and a largest
size. Checks that are no more than that do not limit a model that runs at its own sizes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffc.errors import UnsupportedError
from diffc.models.spec import DimSpec

_LOG = logging.getLogger(__name__)
_TRIES = 6
_LINE = re.compile(r"^\s+(\w+) = (.+?)\s*$", re.MULTILINE)
_BOUND = re.compile(r"(min|max)=(\d+)")
_LINEAR = re.compile(r"^(?:(\d+)\*)?([A-Za-z_]\w*)(?: ([+-]) (\d+))?$")


def suggested_fixes(message: str) -> dict[str, str]:
    """What torch.export suggests in the message of an error: dimension -> the text of its new definition."""
    return dict(_LINE.findall(message.partition("Suggested fixes:")[2]))


class Symbols:
    """The dimensions of a family as torch.export's, by name, under the fixes that it suggested so far."""

    def __init__(self, dims: Sequence[DimSpec], fixes: Mapping[str, str]):
        self._specs = {dim.name: dim for dim in dims}
        self._fixes, self._made = fixes, dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Any:
        fix, spec = self._fixes.get(name, ""), self._specs.get(name)
        if fix.isdigit():
            raise UnsupportedError(
                f"the graph would hold for one {name} alone ({fix}): the backbone makes a constant of it",
                fix="this class cannot be compiled with a dynamic size; ask for support with its config.json",
            )
        if linear := _LINEAR.match(fix):
            factor, other, sign, plus = linear.groups()
            made = int(factor or 1) * self[other] if factor else self[other]
            return made + (int(plus) if sign == "+" else -int(plus)) if plus else made
        bounds = {kind: int(value) for kind, value in _BOUND.findall(fix)}
        if spec is None or spec.multiple == 1:
            most = bounds.get("max", spec.maximum if spec else None)
            return torch.export.Dim(name, min=1, max=most)
        most = None if spec.maximum is None else spec.maximum // spec.multiple
        return spec.multiple * torch.export.Dim(f"_{name}", min=1, max=most)


def export_under_constraints(export: Callable[[Symbols, bool], Any], dims: Sequence[DimSpec]) -> Any:
    """What `export` gives for symbols that torch.export agrees with; its second argument defers checks to run time.

    Raises UnsupportedError where a dimension turns into a constant, and what `export` raises where no fix helps.
    """
    fixes: dict[str, str] = {}
    defer = False
    for _ in range(_TRIES):
        try:
            return export(Symbols(dims, fixes), defer)
        except Exception as error:  # torch raises many kinds; those without a suggestion go on
            found = {k: v for k, v in suggested_fixes(str(error)).items() if fixes.get(k) != v}
            if found:
                _LOG.info("torch.export: %s", "; ".join(f"{k} = {v}" for k, v in found.items()))
                fixes |= found
            elif "onstraints violated" in str(error) and not defer:
                defer = True
            else:
                raise
    return export(Symbols(dims, fixes), True)
