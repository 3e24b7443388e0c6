"""How a size follows from what a user asks for: a polynomial of batch, height, width, frames and text.

A video of 17 frames at 64 x 96 pixels has (17 + 7) / 8 * 64 / 32 * 96 / 32 tokens in LTX-Video: that is
height*width*frames/8192 + 7*height*width/8192. Every size that a pipeline makes is at most linear in each of the five
settings, so the sizes at two values of each setting determine it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod

SETTINGS = ("batch", "height", "width", "frames", "text")
Setting = Mapping[str, int]
"""Values of all SETTINGS: images or videos, pixels, pixels, frames, tokens."""


@dataclass(frozen=True)
class Relation:
    """A sum of products of settings: `terms` has the names of each, in the order of SETTINGS, and its factor."""

    terms: tuple[tuple[tuple[str, ...], Fraction], ...]

    def at(self, setting: Setting) -> Fraction:
        """The size at these settings; not whole where they do not fit."""
        return sum((f * prod(setting[n] for n in names) for names, f in self.terms), Fraction(0))

    @property
    def settings(self) -> frozenset[str]:
        """The settings that the size depends on."""
        return frozenset(name for names, _ in self.terms for name in names)

    def replaced(self, setting: str, scale: Fraction, plus: Fraction) -> Relation:
        """The same size in terms of another measure of `setting`, which is `scale` * the old one + `plus`."""
        terms: dict[tuple[str, ...], Fraction] = {}
        for names, factor in self.terms:
            if setting not in names:
                terms[names] = terms.get(names, Fraction(0)) + factor
                continue
            rest = tuple(name for name in names if name != setting)
            terms[names] = terms.get(names, Fraction(0)) + factor / scale
            terms[rest] = terms.get(rest, Fraction(0)) - factor * plus / scale
        return relation(terms)

    def line(self, setting: str) -> tuple[Fraction, Fraction] | None:
        """Factor and constant where the size is a line in `setting` alone, otherwise None."""
        if self.settings != {setting}:
            return None
        terms = dict(self.terms)
        return terms[(setting,)], terms.get((), Fraction(0))

    def to_json(self) -> dict[str, str]:
        """`{"height*width": "1/256"}`; the constant has the key ""."""
        return {"*".join(names): str(factor) for names, factor in self.terms}

    @classmethod
    def from_json(cls, values: Mapping[str, str]) -> Relation:
        """What `to_json` wrote."""
        return relation({tuple(filter(None, k.split("*"))): Fraction(v) for k, v in values.items()})

    def __str__(self) -> str:
        parts = ["*".join(filter(None, [str(f) if f != 1 or not n else "", *n])) for n, f in self.terms]
        return " + ".join(parts) or "0"


def relation(terms: Mapping[tuple[str, ...], Fraction]) -> Relation:
    """The relation with these terms, without those that are zero."""
    return Relation(tuple(sorted((names, f) for names, f in terms.items() if f)))


def fit(settings: Sequence[Setting], sizes: Sequence[int]) -> Relation | None:
    """The relation that gives `sizes` at `settings`; None where there is none.

    `settings` begins with all combinations of two values of each setting that has two (`grid`); the rest is checked
    against what these give.
    """
    levels = {name: sorted({s[name] for s in settings}) for name in SETTINGS}
    active = [name for name in SETTINGS if len(levels[name]) > 1]
    first = settings[: 2 ** len(active)]
    low = {name: min(s[name] for s in first) for name in active}
    high = {name: max(s[name] for s in first) for name in active}
    table = {
        tuple(int(s[n] == high[n]) for n in active): Fraction(size)
        for s, size in zip(first, sizes, strict=False)
    }
    for axis, name in enumerate(active):
        step = high[name] - low[name]
        for key in [k for k in table if k[axis] == 0]:
            other = (*key[:axis], 1, *key[axis + 1 :])
            slope = (table[other] - table[key]) / step
            table[key], table[other] = table[key] - slope * low[name], slope
    found = relation(
        {tuple(n for n, there in zip(active, key, strict=True) if there): f for key, f in table.items()}
    )
    fits = all(found.at(s) == size for s, size in zip(settings, sizes, strict=True))
    return found if fits else None


def grid(low: Setting, high: Setting) -> list[dict[str, int]]:
    """All combinations of two values of each setting in which `low` and `high` differ."""
    choices = [tuple(dict.fromkeys((low[name], high[name]))) for name in SETTINGS]
    return [dict(zip(SETTINGS, values, strict=True)) for values in product(*choices)]
