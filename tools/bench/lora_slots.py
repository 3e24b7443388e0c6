"""What LoRA slots cost: a step of an artifact's model without slots, with empty ones, and with LoRAs of some ranks.

    python -m tools.bench.lora_slots ARTIFACT [--ranks 16 64] [--repeat 20] [--pixels N] [--tokens N]

ARTIFACT is of `diffc compile --lora-slots RANK`. Every slot is filled, on one thread of the CPU by ONNX Runtime. Rounds
of all variants follow one another, and the median of the CPU time of a round counts, so that other work on the machine
changes little.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch

from diffc.artifact.folder import Artifact
from diffc.backends.onnxruntime.arrays import session_options
from diffc.models.inputs import random_inputs
from diffc.models.registry import find_family
from diffc.models.spec import Shape
from passes.weights.sources import np_dtype


def session(path: Path) -> Any:
    """ONNX Runtime's session of a graph, with the options of diffc's own."""
    import onnxruntime as ort

    types = {tensor.data_type for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    options = session_options(types)
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def factors(slots: dict[str, list[int]], rank: int) -> dict[str, Any]:
    """Small random values for every slot."""
    generator, values = np.random.default_rng(0), {}
    for module, (inputs, outputs, dtype) in slots.items():
        for name, shape in (("A", (inputs, rank)), ("B", (rank, outputs))):
            array = generator.standard_normal(shape) * 0.01
            values[f"lora.{module}.{name}"] = array.astype(np_dtype(dtype))
    return values


def main() -> int:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=77)
    asked = parser.parse_args()
    manifest = Artifact.load(asked.artifact.absolute()).manifest
    family, config = find_family(manifest["model"]["family"]), manifest["model"]["config"]
    shape = Shape(1, asked.pixels, asked.pixels, asked.tokens)
    dtype = getattr(torch, manifest["dtype"])
    feed = {
        name: value.numpy()
        for name, value in random_inputs(family, config, shape, dtype=dtype, seed=0).items()
    }
    slots = manifest["lora_slots"]["layers"]
    base = session(asked.artifact / manifest["targets"]["ort"])
    slotted = session(asked.artifact / manifest["lora_slots"]["files"]["ort"])
    runs: dict[str, tuple[Any, dict[str, Any]]] = {"without slots": (base, feed), "empty": (slotted, feed)}
    runs |= {f"rank {rank}": (slotted, feed | factors(slots, rank)) for rank in asked.ranks}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(asked.repeat + 2):
        for name, (model, values) in runs.items():
            started = time.process_time()
            model.run(None, values)
            if turn >= 2:  # the first ones set memory up
                seconds[name].append(time.process_time() - started)
    first = median(seconds["without slots"])
    figures = {
        n: {"ms": round(1e3 * median(s), 2), "ratio": round(median(s) / first, 3)} for n, s in seconds.items()
    }
    print(
        json.dumps(
            {"artifact": asked.artifact.name, "shape": str(shape), "slots": len(slots), "runs": figures}
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
