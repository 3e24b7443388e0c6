"""What LoRA slots cost a step in ONNX Runtime's CUDA provider: none, empty, and filled with some ranks.

    python -m tools.bench.lora_slots_cuda make FOLDER [--model sd35-medium] [--depth 4] [--pixels 1024] [--batch 2]
    python tools/bench/lora_slots_cuda.py run FOLDER [--ranks 16 64] [--provider cuda]

`make` needs diffc: it traces a backbone of the release's width with a few blocks, and writes the canonical graph, the
same with slots, and what target ort-cuda makes of it, all without weights (megabytes). `run` needs onnx, numpy, torch
and onnxruntime alone: it fills the weights with random numbers, binds inputs, factors and the output to the device's
memory, and prints a line of JSON for each variant: milliseconds of a step (median, least) and the ratio to the graph
without slots, with kernels launched one by one and as a recorded CUDA graph. Rounds of all variants follow one another.
"fused" has its weights at other places of the same random file, so its output says nothing.
`--provider cpu` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch

NOTES = "notes.json"
_TORCH = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT64: torch.int64,
}
_NAMED = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int64)": torch.int64}


def make(asked: argparse.Namespace) -> None:
    """Write the graphs, and what `run` must know of inputs and slots."""
    from dataclasses import replace

    from diffc.frontend.trace import trace
    from diffc.models.inputs import random_inputs
    from diffc.models.sources.locate import locate
    from passes import Pipeline
    from passes.presets import CANONICAL, TargetOptions, target_passes
    from passes.storage import save_all
    from passes.targets.ort.lora_slots import slots_to_json, with_lora_slots
    from tools.bench.compile import weights

    asked.folder.mkdir(parents=True)
    source = locate(str(weights(asked.model, str(asked.depth), asked.folder / "source")))
    native = source.family.native(source.config)
    shape = replace(native, batch=asked.batch, height=asked.pixels, width=asked.pixels)
    base = Pipeline(CANONICAL).run(trace(source, dtype=asked.dtype, checkpoint=None)).model
    slotted, slots = with_lora_slots(base)
    fused = Pipeline(target_passes("ort-cuda", TargetOptions(tokens=shape.text))).run(base).model
    graphs = {"base": base, "slots": slotted, "fused": fused}
    save_all({asked.folder / f"{name}.onnx": model for name, model in graphs.items()})
    data = asked.folder / "base.onnx_data"
    values = random_inputs(source.family, source.config, shape, dtype=getattr(torch, asked.dtype), seed=0)
    notes = {
        "model": f"{asked.model}, depth {asked.depth}, {shape}",
        "bytes": data.stat().st_size,
        "inputs": {name: list(value.shape) for name, value in values.items()},
        "slots": slots_to_json(slots),
    }
    (asked.folder / NOTES).write_text(json.dumps(notes), encoding="utf-8")
    data.unlink()
    shutil.rmtree(asked.folder / "source")


def run(asked: argparse.Namespace) -> None:
    """Measure every variant, and print a line for each."""
    notes = json.loads((asked.folder / NOTES).read_text(encoding="utf-8"))
    fill(asked.folder / "base.onnx_data", notes["bytes"])
    inputs = {name: torch.rand(shape, device=asked.provider) for name, shape in notes["inputs"].items()}
    for recorded in (False, True) if asked.provider == "cuda" else (False,):
        variants = {"without slots": Variant(asked, "base", inputs, {}, recorded=recorded)}
        for rank in (0, *asked.ranks):
            name = f"rank {rank}" if rank else "empty"
            variants[name] = Variant(
                asked, "slots", inputs, factors(notes["slots"], rank, asked), recorded=recorded
            )
        variants["fused, without slots"] = Variant(asked, "fused", inputs, {}, recorded=recorded)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(asked.repeat + 3):
            for name, variant in variants.items():
                taken = variant.step()
                if turn >= 3:  # the first ones set memory up
                    times[name].append(taken)
        plain = variants["without slots"].output.float()
        for name, taken_by in times.items():
            row = {
                "model": notes["model"],
                "slots": len(notes["slots"]),
                "variant": name,
                "cuda_graph": recorded,
            }
            row |= {"ms": 1e3 * median(taken_by), "least_ms": 1e3 * min(taken_by)}
            row["ratio"] = median(taken_by) / median(times["without slots"])
            difference = variants[name].output.float() - plain
            row["changes_output"] = float(difference.norm() / plain.norm())
            print(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )


def fill(path: Path, size: int) -> None:
    """Weights of small random float16 values, as many bytes as the graphs read."""
    if path.is_file() and path.stat().st_size == size:
        return
    generator = np.random.default_rng(0)
    piece = (generator.standard_normal(1 << 24, dtype=np.float32) * 0.02).astype(np.float16).tobytes()
    with path.open("wb") as file:
        for begin in range(0, size, len(piece)):
            file.write(piece[: size - begin])


def factors(slots: dict[str, list[int]], rank: int, asked: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Small random values for every slot, or of rank 0."""
    values = {}
    for module, (inputs, outputs, dtype) in slots.items():
        for name, shape in (("A", (inputs, rank)), ("B", (rank, outputs))):
            random = torch.randn(shape, device=asked.provider) * 0.02
            values[f"lora.{module}.{name}"] = random.to(_TORCH[dtype])
    return values


class Variant:
    """A session with all inputs and its output bound; as a CUDA graph when `recorded`."""

    def __init__(
        self,
        asked: argparse.Namespace,
        graph: str,
        inputs: dict[str, torch.Tensor],
        given: dict[str, torch.Tensor],
        *,
        recorded: bool,
    ) -> None:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options = {"use_tf32": "0", "enable_cuda_graph": str(int(recorded))}
        providers: dict[str, list[Any]] = {
            "cuda": [("CUDAExecutionProvider", options)],
            "cpu": ["CPUExecutionProvider"],
        }
        path = str(asked.folder / f"{graph}.onnx")
        self._session = ort.InferenceSession(path, settings, providers=providers[asked.provider])
        self._device, self._binding = asked.provider, self._session.io_binding()
        types = {item.name: item.type for item in self._session.get_inputs()}
        self._held = [value.to(_NAMED[types[name]]) for name, value in inputs.items() if name in types]
        names = [name for name in inputs if name in types]
        for name, tensor in (*zip(names, self._held, strict=True), *given.items()):
            self._bind(self._binding.bind_input, name, tensor)
        self._held += given.values()
        output = self._session.get_outputs()[0]
        self.output = torch.full(
            inputs["hidden_states"].shape, torch.nan, dtype=_NAMED[output.type], device=asked.provider
        )  # of the same shape as the input in these models
        self._bind(self._binding.bind_output, output.name, self.output)

    def _bind(self, call: Any, name: str, tensor: torch.Tensor) -> None:
        element = next(key for key, kind in _TORCH.items() if kind == tensor.dtype)
        call(name, self._device, 0, element, tuple(tensor.shape), tensor.data_ptr())

    def step(self) -> float:
        """Seconds of one call, waited for."""
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return time.perf_counter() - started


def main() -> int:
    """Make the graphs or measure them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="sd35-medium")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    asked = parser.parse_args()
    {"make": make, "run": run}[asked.what](asked)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
