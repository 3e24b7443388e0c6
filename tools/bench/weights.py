"""How fast weights are quantized and written, and in how much memory, beside a plain copy of the same bytes.

    python -m tools.bench.weights BACKBONE nvfp4 --folder DIR [--limit GB] [--loras COUNT] [--rank RANK]
                                  [--layers PATTERN ...]

Reads a backbone folder (such as `diffc models make flux-dev DIR --random-weights` writes), quantizes every matrix of
1,024 rows or more as a compile of that format does, and prints one line of JSON. The copy reads the sources and
writes as many bytes as the result has, through a buffer of 4 MB. Both end with fsync, and clear up. With --loras, so
many random LoRAs of every matrix, or of those whose layer fits a pattern, are in the weights, as by `diffc compile
--lora`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from diffc.memory import peak_rss
from diffc.models.sources.locate import ModelSource, locate
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.sources.loras import with_loras
from passes.storage import save
from passes.weights.recipe import Recipe, Source

BLOCK = 128
_BUFFER = 1 << 22
_ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def main() -> None:
    """Measure one format."""
    arguments = _arguments()
    source = locate(arguments.model)
    numbers = range(arguments.loras)
    files = [random_lora(source, arguments.folder, arguments.rank, n, arguments.layers) for n in numbers]
    source = with_loras(source, [LoraSpec(str(file)) for file in files])
    recipes = dict(_recipes(source, arguments.format, arguments.limit * 10**9))
    sources = {r.source for r in recipes.values() if r.source.path and r.source.path not in map(str, files)}
    read, written = sum(s.length for s in sources), sum(r.nbytes for r in recipes.values())
    copied = _timed(lambda: _copy(sources, written, arguments.folder / "copy"))
    ours = _timed(lambda: _save(recipes, arguments.folder / "bench.onnx"))
    peak = peak_rss() or 0
    figures = {
        "format": arguments.format,
        "loras": arguments.loras,
        "read_GB": read / 1e9,
        "written_GB": written / 1e9,
        "wall_s": ours[0],
        "cpu_s": ours[1],
        "copy_wall_s": copied[0],
        "copy_cpu_s": copied[1],
        "source_MB_per_cpu_s": read / 1e6 / ours[1],
        "peak_rss_GB": peak / 1e9,
    }
    for file in files:
        file.unlink()
    print(json.dumps({k: v if isinstance(v, str) else round(v, 2) for k, v in figures.items()}))


def random_lora(
    source: ModelSource, folder: Path, rank: int, number: int, layers: Sequence[str] = ("*",)
) -> Path:
    """A file with random factors for every matrix whose layer fits a pattern, as PEFT names them, in float16."""
    generator, tensors = np.random.default_rng(number), {}
    for name, weight in source.weights.items():
        layer = name.removesuffix(".weight")
        if len(weight.shape) == 2 and layer != name and any(fnmatchcase(layer, p) for p in layers):
            rows, columns = weight.shape
            for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                values = generator.standard_normal(shape, dtype=np.float32) * 0.01
                tensors[f"transformer.{layer}.{part}.weight"] = values.astype(np.float16)
    file = folder / f"lora-{number}.safetensors"
    save_file(tensors, file)
    return file


def _recipes(source: ModelSource, format: str, limit: int) -> Iterable[tuple[str, Recipe]]:
    """The weights of the backbone, as many as `limit` bytes of source hold, as `format` stores them."""
    kind, size = _ELEMENTS[source.dtype], 0
    for name, fused in sorted(source.weights.items()):
        weight = fused.cast(kind)
        size += weight.nbytes
        if size > limit:
            return
        if len(weight.shape) == 2 and weight.shape[0] >= 1024 and weight.shape[1] % BLOCK == 0:
            yield from ((f"{name}/{i}", r) for i, r in enumerate(_quantized(weight, format)))
        else:
            yield name, weight


def _quantized(weight: Recipe, format: str) -> list[Recipe]:
    amax = Recipe.of_array(np.float32(0.13))
    if format == "nvfp4":
        scale = Recipe.of_array(np.float32(0.13 / 2688))
        return [weight.nvfp4_values(scale), weight.nvfp4_scales(scale)]
    if format == "mxfp8":
        return [weight.mxfp8_values(), weight.mxfp8_scales()]
    if format == "fp8":
        return [weight.quantize(amax.scale_of_amax(448.0), TensorProto.FLOAT8E4M3FN).transpose((1, 0))]
    rows = np.linspace(0.1, 0.2, weight.shape[0], dtype=np.float32)
    if format == "int8":
        scale = Recipe.of_array(rows).scale_of_amax(127.0)
        return [weight.quantize(scale, TensorProto.INT8, 0).transpose((1, 0))]
    if format == "int4":
        blocks = np.broadcast_to(rows[:, None], (len(rows), weight.shape[1] // BLOCK)).astype(np.float32)
        return [weight.quantize(Recipe.of_array(blocks).scale_of_amax(7.0), TensorProto.INT4, 1, BLOCK)]
    return [weight]


def _save(recipes: dict[str, Recipe], path: Path) -> None:
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in recipes]
    outputs = [helper.make_tensor_value_info(f"{n}_out", r.dtype, r.shape) for n, r in recipes.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, [r.to_tensor(n) for n, r in recipes.items()])
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    for file in save(model, path):
        file.path.unlink()


def _copy(sources: Iterable[Source], size: int, target: Path) -> None:
    """Read every source, and write `size` bytes of what was read."""
    buffer = memoryview(bytearray(_BUFFER))
    with target.open("wb", buffering=0) as out:
        for source in sorted(sources, key=lambda s: (s.path, s.offset)):
            with Path(source.path).open("rb", buffering=0) as file:
                file.seek(source.offset)
                left = source.length
                while left and (count := file.readinto(buffer[: min(left, _BUFFER)])):
                    left -= count
                    size -= out.write(buffer[: min(count, max(0, size))]) or 0
        os.fsync(out.fileno())
    target.unlink()


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("format", choices=["none", "fp8", "int8", "int4", "nvfp4", "mxfp8"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=1000.0, help="GB of source to take at most")
    parser.add_argument("--loras", type=int, default=0, help="how many random LoRAs are in the weights")
    parser.add_argument("--layers", nargs="+", default=["*"], help="which layers they change (* and ?)")
    parser.add_argument("--rank", type=int, default=16, help="of each LoRA")
    return parser.parse_args()


if __name__ == "__main__":
    main()
