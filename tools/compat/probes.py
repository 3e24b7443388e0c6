"""The list of probes of `tools.compat`: families of small networks, one probe per combination of their options."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.compat.net import NAMES, Net

Family = Callable[..., None]
PROBES: dict[str, Probe] = {}
"""Every probe by name, as the modules register them."""

_TYPE_OPTIONS = ("hp", "scale", "out", "x")


@dataclass(frozen=True)
class Probe:
    """A small network that shows whether something is taken.

    `shows` is the first sentence of the family's docstring. `weights` counts the elements of the one weight
    whose stored size is of interest, 0 where it is not.
    """

    name: str
    section: str
    shows: str
    family: Family
    options: dict[str, Any]
    weights: int

    def net(self) -> Net:
        """The network, made anew."""
        net = Net(self.options.get("opset", 23))
        asked = inspect.signature(self.family).parameters
        self.family(net, **{k: v for k, v in self.options.items() if k in asked})
        return net


def family(
    section: str, title: str, weights: int = 0, **options: tuple[Any, ...]
) -> Callable[[Family], Family]:
    """Register a function that fills a Net, once per combination of `options` (which name its arguments).

    An option "opset" also sets the opset of the network. Raises ValueError for a name that is taken.
    """

    def register(function: Family) -> Family:
        shows = (inspect.getdoc(function) or "").split("\n", 1)[0]
        for values in itertools.product(*options.values()):
            chosen = dict(zip(options, values, strict=True))
            name = ", ".join([title, *(_word(k, v) for k, v in chosen.items() if v != "")])
            if name in PROBES:
                raise ValueError(f"two probes are called {name!r}")
            PROBES[name] = Probe(name, section, shows, function, chosen, weights)
        return function

    return register


def _word(option: str, value: Any) -> str:
    """How an option reads in the name of a probe."""
    if option in _TYPE_OPTIONS:
        return NAMES[value] if option == "hp" else f"{option} {NAMES[value]}"
    return value if isinstance(value, str) else f"{option.replace('_', ' ')} {value}"
