"""Small files of quantized layers by the libraries that make them, for `tests/models/stored/test_libraries.py`.

    python -m tools.prove.library_files FOLDER

Needs gguf 0.19.0 and comfy-kitchen 0.2.40, which no extra of diffc brings: in an environment of its own.

Writes FOLDER/comfy_kitchen.npz (for each of ComfyUI's formats the tensors of a layer as its files hold them, and what
comfy_kitchen dequantizes them to) and FOLDER/library.gguf (a tensor of each block type in gguf's own container: the
blocks of `tests/data/gguf/blocks.npz`, two rows of one). Runs on a CPU. Neither library is needed to run the tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "float8_e4m3fn": ("TensorCoreFP8Layout", (48, 80)),
    "nvfp4": ("TensorCoreNVFP4Layout", (200, 144)),
    "mxfp8": ("TensorCoreMXFP8Layout", (136, 160)),
    "int8_tensorwise": ("TensorWiseINT8Layout", (40, 64)),
}
"""Format of ComfyUI -> comfy_kitchen's class, rows and columns; some are no multiple of a tile."""


def comfy_layers() -> dict[str, Any]:
    """`FORMAT.weight...` as in a file (8-bit floats by their bits), and `FORMAT.expected` in float32."""
    import comfy_kitchen.tensor as layouts  # type: ignore[import-not-found]  # not among diffc's own libraries

    torch.manual_seed(0)
    made = {}
    for format, (name, shape) in LAYERS.items():
        layout = getattr(layouts, name)
        codes, parameters = layout.quantize(torch.randn(shape) * 0.05)
        for suffix, tensor in layout.state_dict_tensors(codes, parameters).items():
            plain = tensor.contiguous()
            narrow = plain.is_floating_point() and plain.itemsize == 1
            made[f"{format}.weight{suffix}"] = (plain.view(torch.uint8) if narrow else plain).numpy()
        made[f"{format}.expected"] = layout.dequantize(codes, parameters).float().numpy()
    return made


def write_gguf(path: Path) -> None:
    """Every block type that diffc reads, as gguf's own writer lays a file out."""
    import gguf  # type: ignore[import-not-found]  # not among diffc's own libraries

    blocks = np.load(ROOT / "tests/data/gguf/blocks.npz")
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("general.name", "blocks of every type")
    for name in (name.removesuffix("_raw") for name in blocks.files if name.endswith("_raw")):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(f"{name}.weight", blocks[f"{name}_raw"][:2], raw_dtype=kind)
    writer.add_tensor("plain.bias", np.linspace(-1, 1, 6, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    np.savez_compressed(folder / "comfy_kitchen.npz", **comfy_layers())
    write_gguf(folder / "library.gguf")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
