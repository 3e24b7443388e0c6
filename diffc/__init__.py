"""diffc: a compiler for diffusion backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from diffc.runtime.load import load as load


def __getattr__(name: str) -> Any:
    """`diffc.load` imports torch, and only when it is asked for."""
    if name != "load":
        raise AttributeError(f"module 'diffc' has no attribute {name!r}")
    from diffc.runtime.load import load

    return load
