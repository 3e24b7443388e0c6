"""One step of a chain of models (cache layout `segments`), on numpy arrays or torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, TypeVar

from diffc.cache.layout import KeptTensor


class Part(Protocol):
    """A model of a chain."""

    @property
    def group(self) -> int | None:
        """The number of the group that leaves this model out when it is used again; None: no step leaves it out."""
        ...

    @property
    def gives(self) -> Sequence[str]:
        """The names of the model's outputs."""
        ...


P = TypeVar("P", bound=Part)
T = TypeVar("T")


def run_chain(
    parts: Sequence[P],
    kept: Sequence[KeptTensor],
    reuse: AbstractSet[int],
    inputs: Mapping[str, T],
    held: MutableMapping[str, T],
    run: Callable[[P, Mapping[str, T]], Mapping[str, T]],
) -> dict[str, T]:
    """All tensors of one step by name: `inputs`, and what crosses from part to part. T: arrays or tensors.

    Parts of the groups `reuse` do not run: what they would give is computed from `held`. What parts that run give
    replaces it there.
    """
    flow = dict(inputs)
    for part in parts:
        own = [item for item in kept if item.tensor in part.gives]
        if part.group is None or part.group not in reuse:
            flow |= run(part, flow)
            held.update({item.tensor: _value_to_keep(item, flow) for item in own})
        else:
            flow |= {item.tensor: _value_from_kept(item, flow, held[item.tensor]) for item in own}
    return flow


def _value_to_keep(item: KeptTensor, flow: Mapping[str, Any]) -> Any:
    tensor = flow[item.tensor]
    return tensor if item.source is None else tensor - flow[item.source]


def _value_from_kept(item: KeptTensor, flow: Mapping[str, Any], held: Any) -> Any:
    return held if item.source is None else flow[item.source] + held
