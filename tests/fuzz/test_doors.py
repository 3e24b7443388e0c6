"""A few lies at each door, the same in every run; `python -m tests.fuzz --long` tells thousands."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.doors import DOORS, Door, Place
from tests.fuzz.kept_doors import KEPT_DOORS

CASES, APART = 25, 8
"""Lies that are told in a test run, and those at a door that starts a process for each."""


@pytest.mark.parametrize("door", [*DOORS, *KEPT_DOORS], ids=lambda door: door.name)
def test_what_is_valid_comes_in_and_lies_are_refused_or_harmless(door: Door, tmp_path: Path) -> None:
    place = Place(door, tmp_path)
    assert place.valid()

    @settings(
        max_examples=APART if door.apart else CASES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(place.lies)
    def lies(lie: tuple[str, bytes]) -> None:
        place.open(lie)

    lies()
