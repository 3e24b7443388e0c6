"""Cached steps of a backbone of real size in ONNX Runtime: what they save by the clock, and on paper.

    python -m tools.bench.cache sd35-medium blocks:every=2 --provider cuda --dtype float16 --batch 2 --size 1024
    python -m tools.bench.cache sdxl deepcache:every=2 --depth 2 --size 512 --repeat 5 --json sdxl.json

Weights are random. `--depth` leaves so many transformer blocks of SD3 and FLUX, and at most so many in a row of SDXL.
The models of the plan run in turns, forwards and backwards, on new inputs each time. On CUDA a step is waited for, with
a CUDA graph; on the CPU the processor's seconds count, so that other work on the machine does little. `reached` is the
saving by the clock (medians) in percent of that in floating-point operations (of matrix products, from the shapes in
the graph). Error: what the reduced model makes of what was kept of the same inputs, against the model without a plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch

from diffc.backends.onnx_graph import element_types, read
from diffc.backends.onnxruntime.arrays import session_options
from diffc.backends.torch_types import TORCH_TYPES
from diffc.cache.layout import LAYOUTS
from diffc.compile.cached.operations import count_operations
from diffc.compile.cached.split import split
from diffc.compile.cached.stages import resolve_for
from diffc.compile.cached.variants import CacheBuild
from diffc.frontend.trace import trace
from diffc.models.embedded import random_model
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.models.embedded.real import REAL, RealModel
from diffc.models.inputs import random_inputs
from diffc.models.sizes import size_of
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import ModelSource, locate
from diffc.models.spec import Shape
from diffc.progress import Silent
from passes import Pipeline
from passes.presets import CANONICAL, target_passes
from passes.storage import save_all

Tensors = dict[str, torch.Tensor]
TARGET = {"cpu": "ort", "cuda": "ort-cuda"}
PLAIN = "model"
_DTYPES = {int(onnx.TensorProto.DataType.Value(name)): dtype for name, dtype in TORCH_TYPES.items()}
_ONNX_TYPES = {dtype: kind for kind, dtype in _DTYPES.items()}


class Shallow(RealModel):
    """A real model with fewer blocks: `name` is the release's, and a depth behind a slash."""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The release's config, cut."""
        name, _, depth = self.name.partition("/")
        return _cut(dict(REAL[name].config), int(depth))


def _cut(config: dict[str, Any], depth: int) -> dict[str, Any]:
    if "num_layers" in config:
        singles = {"num_single_layers": 2 * depth} if "num_single_layers" in config else {}
        return config | {"num_layers": depth} | singles
    rows = [min(count, depth) for count in config["transformer_layers_per_block"]]
    return config | {"transformer_layers_per_block": rows}


@dataclass
class Step:
    """A denoising step of one kind: floating-point operations, and seconds of each turn.

    `reuse` has the groups that it uses again, None without a plan.
    """

    name: str
    reuse: frozenset[int] | None
    operations: int
    nodes: int
    run: Callable[[], None]
    seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """What JSON says of it."""
        return {
            "model": self.name,
            "gflop": self.operations / 1e9,
            "ms": 1e3 * statistics.median(self.seconds),
            "least_ms": 1e3 * min(self.seconds),
            "most_ms": 1e3 * max(self.seconds),
            "nodes": self.nodes,
        }


@dataclass(frozen=True)
class Opened:
    """A model in a session, bound."""

    session: Any
    binding: Any
    nodes: int

    def run(self) -> None:
        """Once."""
        self.session.run_with_iobinding(self.binding)


@dataclass(frozen=True)
class Saving:
    """A share of time and operations that is saved: of a step, or of a generation."""

    what: str
    operations: float
    clock: float

    @property
    def reached(self) -> float:
        """The saving by the clock, in percent of that in operations."""
        return 100 * self.clock / self.operations


def main() -> None:
    """Measure, and print a line for each model and each saving."""
    options = _options()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(prefix="diffc-bench-", dir=options.folder) as place:
        source = source_of(options, Path(place) / "source")
        build, files, graphs = models_of(source, options, Path(place))
        spec = source.family
        shape = replace(spec.native(source.config), batch=options.batch)
        shape = replace(shape, height=options.size, width=options.size) if options.size else shape
        shape = spec.check(source.config, replace(shape, text=options.text or shape.text))
        tensors = buffers(build, graphs, source, shape, options)
        opened = {name: open_one(files[name], tensors, options) for name in files}
        counted = {
            name: sum(count_operations(graph, spec.sizes(shape), build.dims).values())
            for name, graph in graphs.items()
        }
        steps = steps_of(build, opened, counted, tensors)
        errors = run_in_turns(steps, tensors, source, shape, options)
    report(options, build, steps, shape, errors)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=[*REAL, *EMBEDDED])
    parser.add_argument("plan", help="a cache plan of `diffc cache list`, or a file")
    parser.add_argument("--layout", default=LAYOUTS[0], choices=LAYOUTS)
    parser.add_argument("--provider", default="cpu", choices=list(TARGET))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--depth", type=int, default=0, help="how many blocks are left, 0: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=0, help="pixels, 0: the model's")
    parser.add_argument("--text", type=int, default=0, help="tokens, 0: the model's")
    parser.add_argument("--steps", type=int, default=20, help="of a generation")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--provider-option", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--no-cuda-graph", action="store_true")
    parser.add_argument("--folder", type=Path, help="where weights and graphs lie while it runs")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def source_of(options: argparse.Namespace, folder: Path) -> ModelSource:
    """A backbone folder with random weights, or an embedded model."""
    if options.model in EMBEDDED:
        return locate(options.model)
    if not options.depth:
        return locate(str(random_model.make_random(options.model, folder, seed=options.seed)))
    known = REAL[options.model]
    folder.mkdir()
    model = Shallow(f"{known.name}/{options.depth}", known.family, known.dtype, 0, known.description)
    random_model.write_backbone(model, folder, options.seed, Silent())
    return locate(str(folder))


def models_of(
    source: ModelSource, options: argparse.Namespace, folder: Path
) -> tuple[CacheBuild, dict[str, Path], dict[str, onnx.ModelProto]]:
    """The plan's models in the provider's form over one file of weights; and their canonical graphs, for counting."""
    canonical = Pipeline(CANONICAL).run(trace(source, dtype=options.dtype, checkpoint=None)).model
    backbone = FakeBackbone(source)
    build = split(canonical, resolve_for(backbone, options.plan), backbone, options.layout)
    if not build.variants:
        raise SystemExit(f"{options.plan} uses nothing again")
    graphs = {PLAIN: canonical} | {PLAIN + v.suffix: v.model for v in build.variants}
    steps = target_passes(TARGET[options.provider])
    made = {folder / f"{name}.onnx": Pipeline(steps).run(graph).model for name, graph in graphs.items()}
    save_all(made)
    return build, {file.stem: file for file in made}, graphs


def shape_of(value: onnx.ValueInfoProto, build: CacheBuild, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input or output of a canonical graph."""
    dims = value.type.tensor_type.shape.dim
    named = build.dims.get(value.name) or [d.dim_param or d.dim_value for d in dims]
    return tuple(size_of(dim, sizes) for dim in named)


def buffers(
    build: CacheBuild,
    graphs: Mapping[str, onnx.ModelProto],
    source: ModelSource,
    shape: Shape,
    options: argparse.Namespace,
) -> Tensors:
    """A tensor on the device for every input and output, which all models share: nothing is copied between them."""
    sizes = source.family.sizes(shape)
    values = {v.name: v for g in graphs.values() for v in (*g.graph.input, *g.graph.output)}
    return {
        name: torch.zeros(
            shape_of(value, build, sizes),
            dtype=_DTYPES[value.type.tensor_type.elem_type],
            device=options.provider,
        )
        for name, value in values.items()
    }


def open_one(file: Path, tensors: Tensors, options: argparse.Namespace) -> Opened:
    """A session on the provider alone, at fixed sizes, its inputs and outputs bound."""
    written = read(file)
    settings = session_options(element_types(written))
    settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for value in (*written.graph.input, *written.graph.output):
        for dim, size in zip(value.type.tensor_type.shape.dim, tensors[value.name].shape, strict=True):
            if dim.dim_param:
                settings.add_free_dimension_override_by_name(dim.dim_param, size)
    session = ort.InferenceSession(str(file), sess_options=settings, providers=[_provider(options)])
    if session.get_providers()[0] != _provider(options)[0]:
        raise SystemExit(
            f"ONNX Runtime took {session.get_providers()}, and {_provider(options)[0]} is wanted"
        )
    binding = session.io_binding()
    ends = ((binding.bind_input, session.get_inputs()), (binding.bind_output, session.get_outputs()))
    for bind, values in ends:
        for value in values:
            tensor = tensors[value.name]
            kind, shape = _ONNX_TYPES[tensor.dtype], tuple(tensor.shape)
            bind(value.name, options.provider, 0, kind, shape, tensor.data_ptr())
    return Opened(session, binding, len(written.graph.node))


def steps_of(
    build: CacheBuild, opened: Mapping[str, Opened], counted: Mapping[str, int], tensors: Tensors
) -> list[Step]:
    """The step without a plan, that which runs all, and those that use something again."""

    def step(name: str, reuse: frozenset[int] | None, names: list[str], run: Callable[[], None]) -> Step:
        nodes = sum(opened[item].nodes for item in names)
        return Step(name, reuse, sum(counted[item] for item in names), nodes, run)

    found = [step(PLAIN, None, [PLAIN], opened[PLAIN].run)]
    if build.layout != "segments":
        for variant in build.variants:
            name = PLAIN + variant.suffix
            found.append(step(name, frozenset(variant.reuse), [name], opened[name].run))
        return found
    held = {item.tensor: torch.zeros_like(tensors[item.tensor]) for item in build.kept}
    for number, reuse in enumerate([frozenset[int](), *build.plan.reuse_sets()]):
        names = [PLAIN + v.suffix for v in build.variants if v.group not in reuse]
        run = partial(_run_parts, build, opened, tensors, held, reuse)
        found.append(step(f"parts-reuse-{number}" if reuse else "parts", reuse, names, run))
    return found


def _run_parts(
    build: CacheBuild,
    opened: Mapping[str, Opened],
    tensors: Tensors,
    held: Tensors,
    reuse: frozenset[int],
) -> None:
    """A step of a chain: as diffc.cache.chain.run_chain, in the tensors that the segments are bound to."""
    for part in build.variants:
        own = [item for item in build.kept if item.tensor in part.gives]
        if part.group not in reuse:
            opened[PLAIN + part.suffix].run()
        for item in own:
            tensor, kept = tensors[item.tensor], held[item.tensor]
            source = torch.zeros_like(tensor) if item.source is None else tensors[item.source]
            if part.group in reuse:
                torch.add(source, kept, out=tensor)
            else:
                torch.sub(tensor, source, out=kept)
        if own and tensors[own[0].tensor].is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime's stream is another


def _provider(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    if options.provider == "cpu":
        return "CPUExecutionProvider", {}
    graph = "0" if options.no_cuda_graph else "1"
    extra = dict(item.split("=", 1) for item in options.provider_option)
    return "CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": graph, **extra}


def run_in_turns(
    steps: list[Step], tensors: Tensors, source: ModelSource, shape: Shape, options: argparse.Namespace
) -> dict[str, float]:
    """Fill `seconds` of every step. Returns the error of each model that uses something again, by name."""
    spec = source.family
    clock = time.perf_counter if options.provider == "cuda" else time.process_time
    output, errors = tensors[spec.output], dict[str, float]()
    for turn in range(-3 if options.provider == "cuda" else -1, options.repeat):
        dtype = getattr(torch, options.dtype)
        values = random_inputs(spec, source.config, shape, dtype=dtype, seed=options.seed + 10 + turn)
        for name, value in values.items():
            tensors[name].copy_(value)
        order = steps if turn % 2 == 0 else steps[::-1]
        expected = None
        for step in order:
            output.fill_(torch.nan)  # what the model before it wrote
            _wait(options)
            started = clock()
            step.run()
            _wait(options)
            if turn >= 0:
                step.seconds.append(clock() - started)
            if turn == 0:  # forwards: a reduced model is given what was kept of these inputs
                found = output.double()
                expected = found.clone() if expected is None else expected
                errors[step.name] = float((found - expected).norm() / expected.norm())
    return errors


def _wait(options: argparse.Namespace) -> None:
    if options.provider == "cuda":
        torch.cuda.synchronize()


def savings(build: CacheBuild, steps: list[Step], count: int) -> list[Saving]:
    """Of each model that uses something again; and of a generation of `count` steps."""
    plain = steps[0]
    took = {step.name: statistics.median(step.seconds) for step in steps}
    found = [
        Saving(step.name, 1 - step.operations / plain.operations, 1 - took[step.name] / took[plain.name])
        for step in steps
        if step.reuse
    ]
    by_reuse = {step.reuse: step for step in steps if step.reuse is not None}
    run = [by_reuse[reuse] for reuse in build.plan.schedule(count)]
    operations = sum(step.operations for step in run) / (count * plain.operations)
    clock = sum(took[step.name] for step in run) / (count * took[plain.name])
    return [*found, Saving(f"generation of {count} steps", 1 - operations, 1 - clock)]


def report(
    options: argparse.Namespace,
    build: CacheBuild,
    steps: list[Step],
    shape: Shape,
    errors: Mapping[str, float],
) -> None:
    """Lines, and JSON where asked for."""
    device = torch.cuda.get_device_name() if options.provider == "cuda" else f"CPU, {options.threads} threads"
    depth = f", depth {options.depth}" if options.depth else ""
    print(
        f"{options.model}{depth}, {options.plan}, {options.layout}, {options.dtype}, {shape};"
        f" {device}, ORT {ort.__version__}"
    )
    rows = [step.row() | {"rel_l2": errors[step.name]} for step in steps]
    for row in rows:
        error = f"error {row['rel_l2']:.1e}"
        print(
            f"{row['model']:16} {row['gflop']:10.1f} GFLOP {row['ms']:9.1f} ms {row['nodes']:5d} nodes, {error}"
        )
    found = savings(build, steps, options.steps)
    for item in found:
        print(
            f"{item.what:24} saves {item.operations:6.1%} of operations, {item.clock:6.1%} by the clock: "
            f"{item.reached:.1f} % reached, {1 / (1 - item.clock):.2f} times as fast"
        )
    if options.json:
        about = {"model": options.model, "depth": options.depth, "plan": options.plan, "dtype": options.dtype}
        about |= {"layout": options.layout}
        about |= {"shape": asdict(shape), "device": device, "ort": ort.__version__}
        content = about | {"models": rows, "savings": [asdict(s) | {"reached": s.reached} for s in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
