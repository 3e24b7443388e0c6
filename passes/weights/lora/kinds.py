"""The kinds of adapters: which tensors each has, and the difference that it makes, of one layer of a file.

LoRA arXiv:2106.09685; LoCon, LoHa, LoKr: LyCORIS, arXiv:2309.14859. Scales: alpha / rank, where the rank is the first
axis of the tensor named here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from passes.weights.deltas import kron, product, spread_kernel
from passes.weights.recipe import Recipe

Tensors = Mapping[str, Recipe]
"""The tensors of a layer by their role."""


@dataclass(frozen=True)
class Factors:
    """A difference as the product of `left` [N, r, ...] and `right` [r, K, ...]."""

    left: Recipe
    right: Recipe


@dataclass(frozen=True)
class Kind:
    """One kind of adapter: the roles that it needs (any of the sets), and those that it may have besides.

    `make` gives factors or a dense difference of any shape with as many elements. `ranked` are the roles whose first
    axis is the rank; the first that is there counts, and without one the scale is 1. `target` is what it changes.
    """

    name: str
    needs: tuple[frozenset[str], ...]
    takes: frozenset[str]
    make: Callable[[Tensors], Factors | Recipe]
    ranked: tuple[str, ...] = ()
    target: str = "weight"

    @property
    def roles(self) -> frozenset[str]:
        """Every role that such an adapter may have."""
        return self.takes.union(*self.needs)

    def is_whole(self, tensors: Tensors) -> bool:
        """Whether all tensors are there that a difference needs."""
        return any(needed <= tensors.keys() for needed in self.needs)


def _lora(tensors: Tensors) -> Factors | Recipe:
    up, down = tensors["up"], tensors["down"]
    if "mid" in tensors:
        return spread_kernel(tensors["mid"], up, down)
    return Factors(up, down)


def _loha(tensors: Tensors) -> Recipe:
    first = _hadamard_part(tensors, "w1_a", "w1_b", "t1")
    return first.multiply(_hadamard_part(tensors, "w2_a", "w2_b", "t2"))


def _hadamard_part(tensors: Tensors, a: str, b: str, core: str) -> Recipe:
    if core not in tensors:
        return product(tensors[a], tensors[b])
    return spread_kernel(tensors[core], tensors[a].transpose((1, 0)), tensors[b])


def _lokr(tensors: Tensors) -> Recipe:
    first = tensors.get("kron_1") or product(tensors["kron_1_a"], tensors["kron_1_b"])
    return kron(first, _kron_2(tensors))


def _kron_2(tensors: Tensors) -> Recipe:
    if "kron_2" in tensors:
        return tensors["kron_2"]
    a, b = tensors["kron_2_a"], tensors["kron_2_b"]
    if "kron_t2" in tensors:
        return spread_kernel(tensors["kron_t2"], a.transpose((1, 0)), b)
    made = product(a, b)
    return made.reshape((made.shape[0], *b.shape[1:])) if len(b.shape) > 2 else made


def _one(role: str) -> Callable[[Tensors], Recipe]:
    return lambda tensors: tensors[role]


_KRON = tuple(
    frozenset({*first, *second})
    for first in (("kron_1",), ("kron_1_a", "kron_1_b"))
    for second in (("kron_2",), ("kron_2_a", "kron_2_b"))
)
_SCALED = frozenset({"alpha", "magnitude", "row_magnitude"})
KINDS: tuple[Kind, ...] = (
    Kind("LoRA", (frozenset({"down", "up"}),), _SCALED | {"mid"}, _lora, ("down",)),
    Kind("LoHa", (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),), _SCALED | {"t1", "t2"}, _loha, ("w1_b",)),
    Kind("LoKr", _KRON, _SCALED | {"kron_t2"}, _lokr, ("kron_2_b", "kron_1_b")),
    Kind("difference", (frozenset({"diff"}),), frozenset(), _one("diff")),
    Kind("difference", (frozenset({"diff_b"}),), frozenset(), _one("diff_b"), target="bias"),
    Kind("difference", (frozenset({"diff_m"}),), frozenset(), _one("diff_m"), target="scale_shift_table"),
    Kind("LoRA", (frozenset({"up_bias"}),), frozenset({"alpha"}), _one("up_bias"), target="bias"),
    Kind("whole tensor", (frozenset({"whole"}),), frozenset(), _one("whole")),
    Kind("whole tensor", (frozenset({"whole_bias"}),), frozenset(), _one("whole_bias"), target="bias"),
)


def size_of(made: Factors | Recipe) -> tuple[int, int]:
    """Rows and columns of a difference; of a dense one, the first axis and the rest."""
    if isinstance(made, Factors):
        rank = max(1, made.right.shape[0])
        return made.left.shape[0], math.prod(made.right.shape) // rank
    return (made.shape[0] if made.shape else 1), math.prod(made.shape[1:])
