"""Errors that a user sees: what, the fix, and the exit code of each kind."""

from __future__ import annotations

import pytest

from diffc.errors import DiffcError, MismatchError, UnsupportedError, UsageError, unknown, unknown_value


@pytest.mark.parametrize(
    ("kind", "code"), [(DiffcError, 1), (UsageError, 2), (UnsupportedError, 1), (MismatchError, 3)]
)
def test_exit_codes(kind: type[DiffcError], code: int) -> None:
    error = kind("it is too small", fix="make it larger")
    assert error.exit_code == code
    assert str(error) == "it is too small\n  Fix: make it larger"
    assert (error.what, error.fix) == ("it is too small", "make it larger")
    assert isinstance(error, DiffcError)


def test_without_a_fix_there_is_no_line_for_it() -> None:
    assert str(DiffcError("it is too small")) == "it is too small"


def test_unknown_names_list_the_known_ones() -> None:
    made = unknown("colour", "read", iter(["red", "green"]), fix="choose one")
    assert str(made) == "unknown colour 'read'. Known: red, green. Did you mean red?\n  Fix: choose one"
    assert made.exit_code == 1
    assert unknown_value("colour", "read", ["red"]).exit_code == 2
