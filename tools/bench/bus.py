"""How fast weights come to a GPU: from pinned memory, as torch copies a mapped file, and through `Staging`.

    python -m tools.bench.bus FILE.safetensors [--threads 1 2 4 8 16] [--GB 6]

Prints a line of JSON for each way, in GB/s, the second of two passes over the first GB of the file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffc.quantize.staging import Staging
from diffc.tensors import mapped_tensor
from passes.weights.mapped import MappedFiles
from passes.weights.sources import safetensors_tensors


def main() -> None:
    """Measure each way."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = list(_tensors(options.file, options.GB * 1e9))
    if device.type == "cuda":
        pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        _tell("pinned", _each(lambda tensor: tensor.to(device, non_blocking=True)), [pinned] * 4)
    _tell("mapped", _each(lambda tensor: tensor.to(device, copy=True)), tensors)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    staging = Staging(device, side)
    for threads in options.threads:
        pool = ThreadPoolExecutor(threads)
        _tell(f"staging, {threads} threads", partial(_together, pool, staging), tensors)
        pool.shutdown()
    staging.close()


def _together(pool: ThreadPoolExecutor, staging: Staging, tensors: list[Tensor]) -> None:
    for _ in pool.map(staging.copy, tensors):
        pass


def _tensors(file: Path, most: float) -> Iterator[Tensor]:
    files, total = MappedFiles(), 0.0
    for recipe in safetensors_tensors(file).values():
        tensor = mapped_tensor(recipe, files)
        total += tensor.nbytes
        if total > most:
            return
        yield tensor


def _each(copy: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], object]:
    def copies(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            copy(tensor)

    return copies


def _tell(way: str, copy: Callable[[list[Tensor]], object], tensors: list[Tensor]) -> None:
    for last in (False, True):
        begun = time.perf_counter()
        copy(tensors)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        if last:
            total = sum(tensor.nbytes for tensor in tensors)
            print(json.dumps({"way": way, "GB_a_second": round(total / seconds / 1e9, 2)}), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--GB", type=float, default=6.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
