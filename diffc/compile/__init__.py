"""From a model to an artifact: the only room that knows a Plan."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from diffc.compile.plan import Plan as Plan
    from diffc.compile.plan import check as check
    from diffc.compile.plan import check_targets as check_targets
    from diffc.compile.request import CompileRequest as CompileRequest
    from diffc.compile.request import CompileResult as CompileResult
    from diffc.compile.spine import compile_model as compile_model

__all__ = ["CompileRequest", "CompileResult", "Plan", "check", "check_targets", "compile_model"]

_PLACES = {
    "CompileRequest": "diffc.compile.request",
    "CompileResult": "diffc.compile.request",
    "Plan": "diffc.compile.plan",
    "check": "diffc.compile.plan",
    "check_targets": "diffc.compile.plan",
    "compile_model": "diffc.compile.spine",
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__`, and torch with most, when somebody asks for it: `diffc opt` works without torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffc.compile' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


class _Package(ModuleType):
    """This package, which says what to call when somebody calls it."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("diffc.compile is a package. Call diffc.compile_model(model, output, format=...)")


sys.modules[__name__].__class__ = _Package
