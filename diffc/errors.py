"""The exceptions that a user sees, and their exit codes.

    DiffcError               exit 1   the user can fix it: what happened, what was expected, the fix
    +-- UsageError           exit 2   an option has a value that it does not take
    +-- UnsupportedError     exit 1   this combination of model, format, target and SM does not exist
    +-- MismatchError        exit 3   outputs differ beyond the named tolerance
    passes.PassError         exit 1   the same, raised by `passes`, which does not import diffc
    +-- passes.PassCheckError exit 3  a pass changed numbers beyond its tolerance

Any other exception is our bug and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DiffcError(Exception):
    """What happened and where; `fix` names the command or option that fixes it."""

    exit_code = 1

    def __init__(self, what: str, *, fix: str = ""):
        super().__init__(what + (f"\n  Fix: {fix}" if fix else ""))
        self.what, self.fix = what, fix


class UsageError(DiffcError):
    """A value that an option does not take: unknown, out of range, or not together with another option."""

    exit_code = 2


class UnsupportedError(DiffcError):
    """A combination that the hardware or its compiler does not have."""


class MismatchError(DiffcError):
    """Outputs differ beyond the tolerance of their format."""

    exit_code = 3


def unknown(kind: str, value: str, known: Iterable[str], *, fix: str = "") -> DiffcError:
    """The error for a name that is not one of `known`, which it lists."""
    return DiffcError(_unknown(kind, value, known), fix=fix)


def unknown_value(kind: str, value: str, known: Iterable[str], *, fix: str = "") -> UsageError:
    """The same for the value of an option."""
    return UsageError(_unknown(kind, value, known), fix=fix)


def _unknown(kind: str, value: str, known: Iterable[str]) -> str:
    names = list(known)
    close = get_close_matches(value.lower().replace("-", "_"), names, 1)
    meant = f". Did you mean {close[0]}?" if close else ""
    return f"unknown {kind} {value!r}. Known: {', '.join(names)}{meant}"
