"""Small adapter files, and a small model's weights as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from passes.weights.lora.spellings import Shapes
from passes.weights.recipe import Array, Recipe
from passes.weights.sources import safetensors_tensors

FLUX: Shapes = {
    f"{block}.{n}.{name}.{leaf}": (rows, columns) if leaf == "weight" else (rows,)
    for block, layers in {
        "transformer_blocks": {
            "attn.to_q": (8, 8), "attn.to_k": (8, 8), "attn.to_v": (8, 8), "attn.to_out.0": (8, 8),
            "attn.add_q_proj": (8, 8), "attn.add_k_proj": (8, 8), "attn.add_v_proj": (8, 8),
            "attn.to_add_out": (8, 8), "norm1.linear": (48, 8), "ff.net.0.proj": (32, 8), "ff.net.2": (8, 32),
        },
        "single_transformer_blocks": {
            "attn.to_q": (8, 8), "attn.to_k": (8, 8), "attn.to_v": (8, 8), "proj_mlp": (32, 8), "proj_out": (8, 40),
        },
    }.items()
    for n in range(2)
    for name, (rows, columns) in layers.items()
    for leaf in ("weight", "bias")
} | {"norm_out.linear.weight": (16, 8), "proj_out.weight": (6, 8), "x_embedder.weight": (8, 6)}  # fmt: skip
"""The names of a FLUX of two blocks each, of width 8."""


def arrays(shapes: Shapes, seed: int = 0, dtype: Any = np.float32) -> dict[str, Array]:
    """Random values in the order of `shapes`."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def written(path: Path, tensors: dict[str, Array], metadata: dict[str, str] | None = None) -> Path:
    """`tensors` as a safetensors file."""
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata)
    return path


def weights(
    path: Path, shapes: Shapes, dtype: Any = np.float16
) -> tuple[dict[str, Array], dict[str, Recipe]]:
    """A model's weights: as arrays, and as recipes over a file."""
    values = arrays(shapes, 7, dtype)
    return values, safetensors_tensors(written(path, values))


def factors(layer: str, rows: int, columns: int, rank: int = 3, seed: int = 1) -> dict[str, Array]:
    """A LoRA of kohya's spelling for one layer, without alpha."""
    made = arrays({"up": (rows, rank), "down": (rank, columns)}, seed)
    return {f"{layer}.lora_up.weight": made["up"], f"{layer}.lora_down.weight": made["down"]}
