"""diffc: a compiler for diffusion backbones."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffc.version import VERSION as __version__

__all__ = ["CompileRequest", "__version__", "compile_model", "load"]

if TYPE_CHECKING:
    from diffc.compile.request import CompileRequest as CompileRequest
    from diffc.compile.spine import compile_model as compile_model
    from diffc.runtime.load import load as load

_PLACES = {
    "load": "diffc.runtime.load",
    "compile_model": "diffc.compile.spine",
    "CompileRequest": "diffc.compile.request",
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__`, and torch with it, when somebody asks for it; `diffc.compile` is the package."""
    if name == "compile":
        return import_module("diffc.compile")
    if name not in _PLACES:
        raise AttributeError(f"module 'diffc' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
