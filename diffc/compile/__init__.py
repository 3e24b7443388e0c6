"""From a model to an artifact: the only room that knows a Plan."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from diffc.compile.plan import Plan, check, check_targets
from diffc.compile.request import CompileRequest, CompileResult

__all__ = ["CompileRequest", "CompileResult", "Plan", "check", "check_targets", "compile_model"]

if TYPE_CHECKING:
    from diffc.compile.spine import compile_model as compile_model


def __getattr__(name: str) -> Any:
    """Import `compile_model`, and torch with it, when somebody asks for it: a plan is checked without torch."""
    if name != "compile_model":
        raise AttributeError(f"module 'diffc.compile' has no attribute {name!r}")
    from diffc.compile.spine import compile_model

    return compile_model


class _Package(ModuleType):
    """This package, which says what to call when somebody calls it."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("diffc.compile is a package. Call diffc.compile_model(model, output, format=...)")


sys.modules[__name__].__class__ = _Package
