"""What every manifest says, for tests that make an artifact without a compile."""

from __future__ import annotations

from typing import Any

_VALUE = {"dtype": "FLOAT", "dims": ["n", 64]}


def described(**content: Any) -> dict[str, Any]:
    """The entries that a manifest must have, with `content` in their place or beside them."""
    return {
        "model": {"name": "m"},
        "format": "none",
        "dtype": "float32",
        "targets": {},
        "inputs": [{"name": "x", **_VALUE}],
        "outputs": [{"name": "y", **_VALUE}],
        "profile": [],
        "engines": [],
        "validation": [],
        **content,
    }
