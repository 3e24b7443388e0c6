"""diffc: a compiler for diffusion backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffc.version import VERSION as __version__

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from diffc.runtime.load import load as load


def __getattr__(name: str) -> Any:
    """Import `diffc.load`, and torch with it, when somebody asks for it."""
    if name != "load":
        raise AttributeError(f"module 'diffc' has no attribute {name!r}")
    from diffc.runtime.load import load

    return load
