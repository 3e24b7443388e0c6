"""diffc: a compiler for diffusion backbones."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError as DiffcError
from diffc.version import VERSION as __version__

# ONNX Runtime 1.31 keeps an id of the machine and a data base of events in the user's cache, and a file in the
# temporary folder, unless it is told not to before its first session. Who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["CompileRequest", "DiffcError", "__version__", "compile_model", "load", "session"]

if TYPE_CHECKING:
    from diffc.compile.request import CompileRequest as CompileRequest
    from diffc.compile.spine import compile_model as compile_model
    from diffc.runtime.arrays import session as session
    from diffc.runtime.load import load as load

_PLACES = {
    "load": "diffc.runtime.load",
    "session": "diffc.runtime.arrays",
    "compile_model": "diffc.compile.spine",
    "CompileRequest": "diffc.compile.request",
}
_WITHOUT_TORCH = {
    "load": (
        "diffc.load makes a torch module, and torch is not installed",
        "pip install torch==2.13.0, or run the artifact over numpy arrays: diffc.session(ARTIFACT)",
    ),
    "compile_model": ("a compile takes torch, which is not installed", "pip install torch==2.13.0"),
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when somebody asks for it, and torch with most; `diffc.compile` is the package."""
    if name == "compile":
        return import_module("diffc.compile")
    if name not in _PLACES:
        raise AttributeError(f"module 'diffc' has no attribute {name!r}")
    try:
        return getattr(import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch" or name not in _WITHOUT_TORCH:
            raise
        what, fix = _WITHOUT_TORCH[name]
        raise DiffcError(what, fix=fix) from error
