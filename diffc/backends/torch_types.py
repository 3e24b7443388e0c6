"""ONNX's element types in torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}
"""Names of `diffc.backends.signature.TYPES` -> torch's types."""
