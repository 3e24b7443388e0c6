"""What a manifest says of an artifact."""

from __future__ import annotations

IMPORTED = "as imported"
"""The format of an artifact that was compiled from an ONNX file."""
