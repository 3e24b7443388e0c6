"""A real-size backbone in ONNX Runtime's CUDA provider, beside torch eager and torch.compile, in one run.

    python -m tools.bench.ort_cuda [--model sd35-medium] [--dtype float16] [--batch 2] [--size 1024]
                                      [--graphs plain fused fixed] [--torch eager compile] [--folder DIR] [--json FILE]
                                      [--profile 25]

`plain` is the canonical form, `fused` what target ort-cuda makes of it with fold-value-bias, `fixed` the same for this
batch alone (pass fix-size before it). Weights are random. A step is one call of the
backbone at fixed shapes, waited for; in ONNX Runtime with bound inputs and outputs and a CUDA graph. Median of --repeat
steps after warming up. Outputs are compared with torch eager's, as relative L2 error.
`--profile N` prints the N kernels that take most of an ONNX Runtime step. Needs a CUDA device and onnxruntime-gpu.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch

from diffc.frontend.trace import trace
from diffc.models.embedded import random_model, real
from diffc.models.family import Family
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import find_family
from diffc.models.sources.locate import locate
from diffc.models.spec import Shape
from passes import Pipeline
from passes.canonical.fix_size import FixSize
from passes.presets import CANONICAL, TargetOptions, target_passes
from passes.storage import save_all

Tensors = dict[str, torch.Tensor]
GRAPHS = ("plain", "fused", "fixed")
LEVELS = ("basic", "extended", "all")


def main() -> None:
    """Measure everything asked for and print a line for each."""
    options = _options()
    source = random_model.make_random(options.model, options.folder / options.model)
    spec = find_family(real.REAL[options.model].family)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shape = replace(spec.native(config), batch=options.batch, height=options.size, width=options.size)
    dtype = getattr(torch, options.dtype)
    values = {n: t.cuda() for n, t in random_inputs(spec, config, shape, dtype=dtype, seed=0).items()}
    rows: list[dict[str, Any]] = []
    reference = None
    for mode in options.torch:
        output, row = run_torch(mode, spec, config, source, values, dtype, options.repeat)
        reference = output if reference is None else reference
        report(rows, row, output, reference)
    tokens = spec.tokens(config, shape)
    files = graphs(source, options, tokens) if options.graphs else {}
    for name, file in files.items():
        output, row = run_ort(name, file, spec, shape, values, options)
        report(rows, row, output, reference)
    if options.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ort": ort.__version__}
        content = {**about, "model": options.model, "shape": str(shape), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sd35-medium", choices=list(real.REAL))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--graphs", nargs="*", default=list(GRAPHS), choices=GRAPHS)
    parser.add_argument("--torch", nargs="*", default=["eager", "compile"], choices=("eager", "compile"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for weights and graphs")
    parser.add_argument("--provider-option", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--level", default="all", choices=LEVELS, help="of ONNX Runtime's own optimizer")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def report(
    rows: list[dict[str, Any]], row: dict[str, Any], output: torch.Tensor, reference: torch.Tensor | None
) -> None:
    """Print and keep a row, with the error against the reference."""
    if reference is not None:
        difference = (output.double() - reference.double()).norm() / reference.double().norm()
        row["rel_l2"] = float(difference)
    rows.append(row)
    print(json.dumps(row), flush=True)


def timed(step: Callable[[], Any], repeat: int) -> dict[str, float]:
    """Median, least and largest milliseconds of `repeat` steps, each waited for, after three."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": statistics.median(times), "least": min(times), "most": max(times)}


def run_torch(
    mode: str,
    spec: Family,
    config: Mapping[str, Any],
    source: Path,
    values: Tensors,
    dtype: Any,
    repeat: int,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """diffusers' own module, as it is or through torch.compile."""
    import diffusers

    started = time.perf_counter()
    module = getattr(diffusers, spec.backbone_class).from_pretrained(source, torch_dtype=dtype).cuda().eval()
    call = torch.compile(module) if mode == "compile" else module
    kwargs = forward_kwargs(spec, config, dict(values)) | {"return_dict": False}
    with torch.inference_mode():
        output = call(**kwargs)[0].clone()
        ready = time.perf_counter() - started
        row = {"what": f"torch {mode}", "ready_s": ready, **timed(lambda: call(**kwargs), repeat)}
    row["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return output, row


def graphs(source: Path, options: argparse.Namespace, tokens: int) -> dict[str, Path]:
    """The graphs asked for, over one file of weights."""
    model = Pipeline(CANONICAL).run(trace(locate(str(source)), dtype=options.dtype, checkpoint=None)).model
    made = {"plain": model}
    for name, batch in (("fused", 0), ("fixed", options.batch)):
        if name in options.graphs:
            steps = target_passes("ort-cuda", TargetOptions(tokens=tokens))
            made[name] = Pipeline([FixSize("batch", batch), *steps]).run(model).model
    folder = options.folder / f"{options.model}-onnx"
    folder.mkdir(exist_ok=True)
    save_all({folder / f"{name}.onnx": made[name] for name in options.graphs})
    return {name: folder / f"{name}.onnx" for name in options.graphs}


def run_ort(
    name: str,
    file: Path,
    spec: Family,
    shape: Shape,
    values: Tensors,
    options: argparse.Namespace,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A graph in ONNX Runtime: inputs and outputs bound to torch's memory, the step captured as a CUDA graph."""
    extra = dict(item.split("=", 1) for item in options.provider_option)
    started = time.perf_counter()
    session = open_session(file, spec.sizes(shape), {"enable_cuda_graph": "1", **extra}, options.level)
    output = torch.full_like(values["hidden_states"], float("nan"))  # of the same shape in these models
    binding = bind(session, values, output)
    session.run_with_iobinding(binding)  # captures
    ready = time.perf_counter() - started

    def step() -> None:
        session.run_with_iobinding(binding)

    row = {"what": f"ORT CUDA {name}", "ready_s": ready, **timed(step, options.repeat)}
    row["nodes"] = len(onnx.load(file, load_external_data=False).graph.node)
    if options.profile:
        print_profile(step, options.profile)
    return output.clone(), row


def open_session(file: Path, sizes: Mapping[str, int], extra: Mapping[str, str], level: str = "all") -> Any:
    """A session on the CUDA provider alone, at fixed sizes."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    for name, size in sizes.items():
        settings.add_free_dimension_override_by_name(name, size)
    provider = ("CUDAExecutionProvider", {"use_tf32": "0", **extra})
    session = ort.InferenceSession(str(file), sess_options=settings, providers=[provider])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise SystemExit(f"ONNX Runtime took {session.get_providers()} instead of its CUDA provider")
    return session


def bind(session: Any, values: Tensors, output: torch.Tensor) -> Any:
    """Inputs and the output as they lie in torch's memory."""
    binding = session.io_binding()
    wanted = {item.name for item in session.get_inputs()}
    pairs = [(binding.bind_input, n, t) for n, t in values.items() if n in wanted]
    pairs.append((binding.bind_output, session.get_outputs()[0].name, output))
    for call, name, tensor in pairs:
        call(name, "cuda", 0, _ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    return binding


_ELEMENT = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}


def print_profile(step: Callable[[], Any], lines: int) -> None:
    """The kernels of one step by their time: torch's profiler sees those of the whole process."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorder:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in recorder.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name] += event.device_time_total / 3
            count[event.name] += 1
    print(f"kernels: {sum(count.values()) // 3} a step, {sum(total.values()) / 1e3:.2f} ms")
    for name, micros in total.most_common(lines):
        print(f"  {micros / 1e3:7.3f} ms {count[name] // 3:5d} x  {name[:150]}")


if __name__ == "__main__":
    main()
