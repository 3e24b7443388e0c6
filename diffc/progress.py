"""What a running compile tells: stages, progress and notes. The spine knows the protocol, the CLI draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Update = Callable[[int, int], None]
"""Called with the amount done and the amount in all."""


class Reporter(Protocol):
    """Receives the progress of a compile."""

    def stage(self, title: str) -> AbstractContextManager[Update]:
        """A named piece of work with a progress bar; closing it ends the bar."""
        ...

    def note(self, text: str) -> None:
        """A line that stays."""
        ...


class Silent:
    """Says nothing: for use from Python."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """Nothing is drawn."""
        del title
        yield lambda done, total: None

    def note(self, text: str) -> None:
        """Nothing is printed."""
