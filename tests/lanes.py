"""The lanes: which tests compile a backbone is told by what they take, and held against what they do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

FIXTURES = {"compiled", "traced"}
"""Fixtures that compile or trace a backbone; who takes one, or takes a fixture that does, is marked."""
MARK = "compiles"


class Lanes:
    """A pytest plugin: marks what compiles, and fails what traces a backbone without the mark."""

    def __init__(self) -> None:
        self._running: pytest.Item | None = None
        self._guarded = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark the tests, and let those that compile begin: a long test that begins last leaves processes idle.

        Tests of one file stay in one process, for the sake of its fixtures, unless they name their own group.
        """
        for item in items:
            if FIXTURES & set(getattr(item, "fixturenames", ())):
                item.add_marker(MARK)
            if item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(item.location[0]))
        slow = {item.location[0] for item in items if item.get_closest_marker(MARK)}
        items.sort(key=lambda item: item.location[0] not in slow)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Know which test runs, its fixtures included."""
        if not self._guarded:
            self._guard()
        self._running = item
        try:
            return (yield)
        finally:
            self._running = None

    def _guard(self) -> None:
        import torch

        self._guarded = True
        torch.export.export = self.guarded(torch.export.export)

    def guarded(self, export: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.export.export`, which every trace of a backbone goes through, for the tests that are marked."""

        @functools.wraps(export)
        def checked(module: Any, *args: Any, **kwargs: Any) -> Any:
            if is_backbone(module):
                self.require_mark()
            return export(module, *args, **kwargs)

        return checked

    def require_mark(self) -> None:
        """Fail the test that runs, which wants a trace of a backbone, unless it is marked."""
        item = self._running
        if item is not None and item.get_closest_marker(MARK) is None:
            pytest.fail(
                f"{item.nodeid} traces a backbone and is in the first lane\n  Fix: take the fixture `compiled` or "
                f"`traced`, which are made once for all tests, or mark the test pytest.mark.{MARK}"
            )


def is_backbone(module: Any) -> bool:
    """Whether a module is one of diffusers' models, and not a layer or a network of a test."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == BACKBONE for cls in type(module).__mro__)


BACKBONE = "diffusers.models.modeling_utils.ModelMixin"
