"""Sizes as polynomials of settings: found again from their values, and refused where they are none."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from diffc.models.relation import SETTINGS, Relation, fit, grid, relation

LOW = dict(zip(SETTINGS, (1, 64, 96, 9, 32), strict=True))
HIGH = dict(zip(SETTINGS, (2, 128, 160, 17, 48), strict=True))
MORE = [dict(zip(SETTINGS, (3, 192, 224, 25, 80), strict=True))]


def samples(function: object) -> tuple[list[dict[str, int]], list[int]]:
    settings = [*grid(LOW, HIGH), *MORE]
    assert callable(function)
    return settings, [function(**s) for s in settings]


@pytest.mark.parametrize(
    "function",
    [
        lambda batch, **_: 2 * batch,
        lambda text, **_: text + 7,
        lambda height, width, frames, **_: (frames + 7) // 8 * (height // 32) * (width // 32),
        lambda height, width, text, **_: height * width // 256 + text,
        lambda batch, frames, **_: 2 * batch * frames,
    ],
)
def test_a_relation_is_found_from_its_values(function: object) -> None:
    settings, sizes = samples(function)
    found = fit(settings, sizes)
    assert found is not None
    assert callable(function)
    for draw in range(20):
        dice = random.Random(draw)
        new = {
            "batch": dice.randint(1, 9),
            "height": 32 * dice.randint(1, 40),
            "width": 32 * dice.randint(1, 40),
            "frames": 8 * dice.randint(1, 20) + 1,
            "text": dice.randint(1, 600),
        }
        assert found.at(new) == function(**new)
    assert Relation.from_json(found.to_json()) == found


def test_what_is_rounded_is_no_relation() -> None:
    assert fit(*samples(lambda text, **_: -(-text // 37))) is None
    assert fit(*samples(lambda height, **_: height**2)) is None


def test_another_measure_of_a_setting() -> None:
    tokens = relation({("text",): Fraction(2), (): Fraction(5)})
    other = tokens.replaced("text", Fraction(2), Fraction(5))
    assert other == relation({("text",): Fraction(1)})
    assert other.line("text") == (1, 0)
    assert tokens.line("batch") is None


def test_a_grid_has_every_combination_of_what_differs() -> None:
    found = grid(LOW, {**HIGH, "frames": 9})
    assert len(found) == 16
    assert len({tuple(s.values()) for s in found}) == 16
    assert all(s["frames"] == 9 for s in found)
