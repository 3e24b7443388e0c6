"""diffc: a compiler for diffusion backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError as DiffcError
from diffc.version import VERSION as __version__

__all__ = ["DiffcError", "__version__", "load", "session"]

if TYPE_CHECKING:
    from diffc.runtime.arrays import session as session
    from diffc.runtime.load import load as load


def __getattr__(name: str) -> Any:
    """Import `diffc.load`, and torch with it, or `diffc.session` when somebody asks for it."""
    if name == "session":
        from diffc.runtime.arrays import session

        return session
    if name != "load":
        raise AttributeError(f"module 'diffc' has no attribute {name!r}")
    try:
        from diffc.runtime.load import load
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise DiffcError(
            "diffc.load makes a torch module, and torch is not installed",
            fix="pip install torch==2.13.0, or run the artifact over numpy arrays: diffc.session(ARTIFACT)",
        ) from error
    return load
