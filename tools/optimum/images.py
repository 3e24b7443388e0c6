"""Images from a packaged folder, by optimum-onnx's own pipelines; runs in their environment and needs no diffc.

    python tools/optimum/images.py FOLDER --prompt "a handwritten seven" --size 64 --out seven.png
    python tools/optimum/images.py FOLDER --prompt "..." --provider rtx --device 0 --out image.png

`--provider` runs the backbone: cpu, cuda (with onnxruntime-gpu installed), or rtx, the TensorRT-RTX provider that the
package onnxruntime-ep-nv-tensorrt-rtx-cu13 brings. optimum cannot name that provider, so the session is made here and
handed to the pipeline; text encoders and VAE run on the CPU then. `--latents` (an .npy) takes the place of the seed's
noise, and an --out that ends in .npy gets the images as float32 [n, height, width, 3] in 0..1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PIPELINES = {
    "StableDiffusion3Pipeline": "ORTStableDiffusion3Pipeline",
    "FluxPipeline": "ORTFluxPipeline",
    "StableDiffusionXLPipeline": "ORTStableDiffusionXLPipeline",
}
RTX = "NvTensorRTRTXExecutionProvider"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the images; 0, or 1 with a line on why not."""
    given = parser().parse_args(arguments)
    try:
        images = generate(given)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(images, given.out)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("--prompt", action="append", required=True, help="repeat for a batch")
    made.add_argument("--out", type=Path, required=True, help=".png (numbered when there are more), or .npy")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--guidance", type=float, help="[default: the pipeline's]")
    made.add_argument("--size", type=int, help="pixels of a side [default: the model's]")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--latents", type=Path, help=".npy of the first noise, as the pipeline shapes it")
    made.add_argument("--provider", choices=("cpu", "cuda", "rtx"), default="cpu")
    made.add_argument("--device", type=int, default=0, help="which GPU, with rtx")
    return made


def load(folder: Path, provider: str, device: int = 0) -> Any:
    """The ORT pipeline of a folder, its backbone on `provider`."""
    import optimum.onnxruntime as ort_pipelines

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = index["_class_name"]
    kind = getattr(ort_pipelines, PIPELINES.get(name, name))
    if provider == "rtx":
        return kind.from_pretrained(folder, **rtx_session(folder, device))
    return kind.from_pretrained(folder, provider=f"{provider.upper()}ExecutionProvider")


def rtx_session(folder: Path, device: int) -> dict[str, Any]:
    """The backbone's session on the TensorRT-RTX provider, as the pipeline's keyword for it.

    Raises RuntimeError where there is no such GPU, or ONNX Runtime would run the model elsewhere.
    """
    import onnxruntime as ort
    import onnxruntime_ep_nv_tensorrt_rtx as rtx

    component = "unet" if (folder / "unet").is_dir() else "transformer"
    ort.register_execution_provider_library(rtx.get_ep_name(), rtx.get_library_path())
    devices = [found for found in ort.get_ep_devices() if found.ep_name == rtx.get_ep_name()]
    if device >= len(devices):
        raise RuntimeError(
            f"TensorRT-RTX sees {len(devices)} GPUs here; --device {device} is not one of them"
        )
    cache = folder / component / "rtx_cache"
    cache.mkdir(exist_ok=True)
    options = ort.SessionOptions()
    # ONNX Runtime's own rewrites of quantizers are for its own kernels; TensorRT-RTX takes the graph as it is.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(
        [devices[device]], profile(folder) | {"nv_runtime_cache_path": str(cache)}
    )
    session = ort.InferenceSession(str(folder / component / "model.onnx"), sess_options=options)
    if session.get_providers()[0] != RTX:
        raise RuntimeError(f"ONNX Runtime took {session.get_providers()[0]} and not {RTX}")
    return {f"{component}_session": session}


def profile(folder: Path) -> dict[str, str]:
    """The provider's shape options, from the ranges that the backbone was compiled for.

    Without them it plans for 0 to 32767 in every dimension, which asks for more memory than any GPU has.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    shapes = manifest["input_shapes"]
    return {
        f"nv_profile_{key}_shapes": ",".join(
            f"{name}:{'x'.join(str(size) for size in dims)}" for name, dims in shapes[key].items() if dims
        )
        for key in ("min", "opt", "max")
    }


def generate(given: argparse.Namespace) -> Any:
    """The images, float32 [n, height, width, 3] in 0..1."""
    import numpy as np
    import torch

    pipeline = load(given.folder, given.provider, given.device)
    options: dict[str, Any] = {
        "prompt": given.prompt,
        "num_inference_steps": given.steps,
        "generator": torch.Generator().manual_seed(given.seed),
        "output_type": "np",
    }
    if given.size is not None:
        options |= {"height": given.size, "width": given.size}
    if given.guidance is not None:
        options["guidance_scale"] = given.guidance
    if given.latents is not None:
        options["latents"] = torch.from_numpy(np.load(given.latents))
    return pipeline(**options).images


def write(images: Any, out: Path) -> None:
    """One .npy of them all, or a PNG of each."""
    import numpy as np
    from PIL import Image

    if out.suffix == ".npy":
        np.save(out, np.asarray(images, dtype=np.float32))
        return
    for index, image in enumerate(images):
        file = out if len(images) == 1 else out.with_name(f"{out.stem}-{index}{out.suffix}")
        Image.fromarray((image * 255).round().astype("uint8")).save(file)
        print(file)


if __name__ == "__main__":
    sys.exit(main())
