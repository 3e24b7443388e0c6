"""Functions in turns."""

from __future__ import annotations

import pytest

from diffc.quantize.lanes import Lanes


def test_functions_go_on_in_turns_until_each_is_over() -> None:
    seen: list[str] = []

    def letters(name: str, count: int) -> None:
        for number in range(count):
            seen.append(f"{name}{number}")
            lanes.pass_on()

    lanes = Lanes([lambda: letters("a", 1), lambda: letters("b", 3), lambda: letters("c", 2)])
    lanes.run()
    assert seen == ["a0", "b0", "c0", "b1", "c1", "b2"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_an_error_of_one_stops_the_others(error: BaseException) -> None:
    turns = [0]

    def endless() -> None:
        while True:
            turns[0] += 1
            lanes.pass_on()

    def fails() -> None:
        for _ in range(3):
            lanes.pass_on()
        raise error

    lanes = Lanes([endless, fails, endless])
    with pytest.raises(type(error)):
        lanes.run()
    assert turns == [7]
