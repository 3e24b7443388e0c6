"""Times trace and passes of FLUX.1 over its depth, without weights and without a GPU.

    python -m tools.bench.profile_trace [--depths 4+4 19+38 38+76] [--format fp8] [--target trt-rtx] [--repeat 1]
                                          [--whole] [--json FILE] [--profile FILE]

A depth is double-stream + single-stream blocks, each in the size of FLUX.1-dev (12 billion weights at 19+38). Its
files are a header over a sparse file, and its checkpoint has an amax of no meaning: neither is ever read. Times
are CPU seconds, so that other programs on the machine count little; each depth runs in a process of its own, `--repeat`
times, and the fastest is printed. `--whole` traces every block, `--profile` writes cProfile's data of the last depth.
Needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.frontend.trace import trace
from diffc.memory import peak_rss
from diffc.models.registry import find_family
from diffc.models.sources.backbone import build_backbone
from diffc.models.sources.safetensors_files import file_weights
from diffc.models.sources.source import ModelSource
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import enabled_quantizers, insert_quantizers, layer_of, role_of
from diffc.quantize.fingerprint import backbone_config
from diffc.quantize.formats import FORMATS, find_format
from diffc.quantize.kinds import Settings, block_size_of, kind_of
from diffc.quantize.options import QuantOptions
from diffc.quantize.state import Amax, settings_of
from passes import Pipeline
from passes.presets import CANONICAL, TARGETS, target_passes

FLUX_DEV: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


def main() -> int:
    """Measure the depths asked for and print a table."""
    options = _options()
    rows = []
    for depth in options.depths:
        profile = options.profile if depth == options.depths[-1] else None
        jobs = (depth, options.format, options.target, options.whole, profile)
        runs = [_in_a_process(measure, *jobs) for _ in range(options.repeat)]
        rows.append(min(runs, key=lambda row: row["trace"] + row["passes"]))
        print(_line(rows[-1], rows[0]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", nargs="+", default=["4+4", "19+38", "38+76"])
    parser.add_argument("--format", default="fp8", choices=list(FORMATS))
    parser.add_argument("--target", default="trt-rtx", choices=list(TARGETS))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="trace every block")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path)
    return parser.parse_args()


def _in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(depth: str, format: str, target: str, whole: bool, profile: Path | None) -> dict[str, Any]:
    """CPU seconds of each stage at one depth, the nodes that it leaves, and the peak of resident memory in GB."""
    double, single = (int(number) for number in depth.split("+"))
    config = FLUX_DEV | {"num_layers": double, "num_single_layers": single}
    with tempfile.TemporaryDirectory() as folder:
        source = fake_source("flux", config, Path(folder))
        checkpoint = fake_checkpoint(source, format)
        recorder = cProfile.Profile() if profile else None
        with recorder or nullcontext():
            start = time.process_time()
            model = trace(source, dtype="bfloat16", checkpoint=checkpoint, whole=whole)
            traced = time.process_time()
            canonical = Pipeline(CANONICAL).run(model)
            result = Pipeline(target_passes(target)).run(canonical.model)
            end = time.process_time()
        if recorder and profile:
            recorder.dump_stats(profile)
    records = [*canonical.records, *result.records]
    return {
        "depth": depth,
        "format": format,
        "trace": traced - start,
        "passes": end - traced,
        "nodes": [len(m.graph.node) for m in (model, canonical.model, result.model)],
        "peak_gb": (peak_rss() or 0) / 1e9,
        "wall_seconds_of_passes": [[record.name, round(record.seconds, 3)] for record in records],
    }


def _line(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    total, base = row["trace"] + row["passes"], first["trace"] + first["passes"]
    nodes = " -> ".join(str(count) for count in row["nodes"])
    return (
        f"{row['depth']:>8} {row['format']}: trace {row['trace']:.1f} s, passes {row['passes']:.1f} s, together"
        f" {total:.1f} s ({total / base:.2f} times the first); {nodes} nodes; peak {row['peak_gb']:.2f} GB"
    )


def fake_source(family: str, config: Mapping[str, Any], folder: Path) -> ModelSource:
    """A model of that config with bfloat16 weights that are all holes: a header over a sparse file."""
    with FakeTensorMode():
        state = build_backbone(find_family(family), config, torch.float32).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / "diffusion_pytorch_model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return ModelSource("fake", folder, None, config, find_family(family), file_weights(path))


def fake_checkpoint(
    source: ModelSource, format: str, options: QuantOptions | None = None
) -> Checkpoint | None:
    """The checkpoint of a format with scales of 1, as no calibration would find them; None for "none"."""
    spec, fmt = source.family, find_format(format)
    if not fmt.quantizes:
        return None
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = build_backbone(spec, source.config, torch.float32)
        insert_quantizers(backbone, fmt, spec.unquantized, options)
        quantizers = enabled_quantizers(backbone)
        settings = {name: settings_of(q.get_modelopt_state()) for name, q in quantizers.items()}
        amax = {
            name: _ones(value, _weight_shape(backbone, name))
            for name, value in settings.items()
            if kind_of(value).has_amax
        }
        return Checkpoint(spec.name, fmt.name, backbone_config(backbone), settings, amax)


def _weight_shape(backbone: torch.nn.Module, quantizer: str) -> Sequence[int]:
    if role_of(quantizer) != "weight_quantizer":
        return ()
    return tuple(backbone.get_parameter(f"{layer_of(quantizer)}.weight").shape)


def _ones(settings: Settings, weight: Sequence[int]) -> Amax:
    """The amax of scales that are 1, in ModelOpt's shape: of all, of a channel [N, 1, ...] or of blocks [B, 1]."""
    kind, block = kind_of(settings), block_size_of(settings)
    shape: tuple[int, ...] = ()
    if kind.blocks == "static" and block:
        shape = (math.prod(weight) // block, 1)
    elif settings["axis"] is not None:
        shape = (weight[0], *(1 for _ in weight[1:]))
    return np.full(shape, kind.bound, np.float32)


if __name__ == "__main__":
    raise SystemExit(main())
