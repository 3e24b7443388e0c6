"""The proof of a compile: ONNX Runtime on the compiled graph against ModelOpt's fake-quantized torch model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import torch

from diffc.models.family import Family
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sources.backbone import DTYPES, load_backbone
from diffc.models.sources.locate import ModelSource
from diffc.models.spec import Config, Shape
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import enabled_quantizers, role_of
from diffc.quantize.simulate import cpu_block_quant
from diffc.quantize.state import BOUNDS, kind_of, settings_of
from diffc.validate.compare import compare
from diffc.validate.float32 import cpu_session, feed, float32_twin, runs_on_cpu, smooth_twin
from diffc.validate.reports import SMOOTH, ShapeReport, Sizes
from diffc.validate.sequences import quantize_twice_as_graphs_do
from diffc.validate.tolerances import SMOOTH_REL_L2, tolerance_of
from diffc.validate.torch_hooks import quantized_softmax, softmax_scale

DRAWS = 5
"""How many random inputs are tried at a shape until one meets no flip that its reference is sensitive to."""
FLOOR_RUNS = 5
"""How often the reference is disturbed to see what roundings decide: a flip is a matter of chance."""


class Session(Protocol):
    """What runs a compiled model: arrays in the types of its inputs -> its outputs."""

    def run(self, feed: Mapping[str, npt.NDArray[Any]]) -> Mapping[str, npt.NDArray[Any]]:
        """The outputs by name."""
        ...


class AnyReference(Protocol):
    """What a compiled model is held against: torch (`Reference`), or another graph."""

    dtype: str
    quantized: bool

    def outputs(
        self, shape: Any, seed: int, *, smooth: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, npt.NDArray[Any]]]:
        """Random inputs, and the outputs for them; `smooth`: activations are not rounded."""
        ...

    def floor(self, shape: Any, seed: int, rounding: float) -> float:
        """Largest relative L2 change of the outputs when values are off by a rounding."""
        ...

    def with_quantized_softmax(self, scale: float | None) -> AbstractContextManager[None]:
        """Attention quantizes its probabilities while this is open."""
        ...


def validation_shapes(source: ModelSource, batch: int | None = None) -> tuple[Shape, Shape]:
    """Two small shapes that differ in batch (where a graph is not made for one), height, width and text length."""
    return usual_shapes(source.family, source.config, batch)


def usual_shapes(spec: Family, config: Config, batch: int | None = None) -> tuple[Shape, Shape]:
    """The same for a backbone of `spec` with `config`."""
    step = math.lcm(32, spec.pixel_multiple(config))
    return Shape(batch or 1, 2 * step, 3 * step, 24), Shape(batch or 2, 4 * step, 2 * step, 40)


def validation_arrays(
    source: ModelSource, dtype: str, seed: int, batch: int | None = None
) -> list[dict[str, npt.NDArray[Any]]]:
    """Random inputs at both validation shapes, as float32 arrays that `dtype` holds exactly."""
    spec = source.family
    shapes = validation_shapes(source, batch)
    values = (random_inputs(spec, source.config, s, dtype=DTYPES[dtype], seed=seed) for s in shapes)
    return [_arrays(v) for v in values]


def _arrays(values: dict[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.asarray(value.float().numpy()) for name, value in values.items()}


def torch_outputs(
    model: torch.nn.Module, source: ModelSource, values: dict[str, torch.Tensor]
) -> dict[str, npt.NDArray[Any]]:
    """The torch model's output under the graph output's name, as float32."""
    spec = source.family
    # A model with quantizers has imported ModelOpt; for any other, its seconds and its warning are not worth it.
    quantizers_run = cpu_block_quant if "modelopt" in sys.modules else nullcontext
    with torch.no_grad(), quantizers_run():
        out = model(**forward_kwargs(spec, source.config, values), return_dict=False)[0]
    return {spec.output: out.float().numpy()}


def reference_model(source: ModelSource, dtype: str, checkpoint: Checkpoint | None) -> torch.nn.Module:
    """The torch backbone, fake-quantized by ModelOpt: weights rounded to `dtype`, arithmetic in float32.

    Torch's own 16-bit arithmetic would put its roundings, and the quantizers that they flip, into the
    reference.
    """
    model = load_backbone(source, DTYPES[dtype])
    if checkpoint is not None:
        checkpoint.apply(model, source.family.name)
        quantize_twice_as_graphs_do(model, DTYPES[dtype])
    return model.float()


class Reference:
    """The torch model that graphs are held against, with what it gave so far: every case asks for it again."""

    def __init__(
        self,
        source: ModelSource,
        dtype: str,
        checkpoint: Checkpoint | None,
        *,
        model: torch.nn.Module | None = None,
    ):
        self.source, self.dtype, self.quantized = source, dtype, checkpoint is not None
        self.model = reference_model(source, dtype, checkpoint) if model is None else model
        self._softmax_scale: float | None = None
        self._known: dict[Any, tuple[dict[str, torch.Tensor], dict[str, npt.NDArray[Any]]]] = {}

    @contextmanager
    def with_quantized_softmax(self, scale: float | None) -> Iterator[None]:
        """Attention quantizes its probabilities while this is open, as the pass quantize-softmax makes graphs do."""
        self._softmax_scale = scale
        with nullcontext() if scale is None else quantized_softmax(scale):
            yield
        self._softmax_scale = None

    def outputs(
        self, shape: Shape, seed: int, *, smooth: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, npt.NDArray[Any]]]:
        """Random inputs at `shape`, and the outputs for them; `smooth`: activations are not rounded."""
        key = (shape, seed, smooth, self._softmax_scale)
        if key not in self._known:
            self._known[key] = self.forward(shape, seed, smooth=smooth)
        return self._known[key]

    def forward(
        self, shape: Shape, seed: int, *, smooth: bool, watched: AbstractContextManager[Any] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, npt.NDArray[Any]]]:
        """The same, computed anew; `watched` (hooks, which see what quantizers give here) is open around the run."""
        spec = self.source.family
        drawn = random_inputs(spec, self.source.config, shape, dtype=DTYPES[self.dtype], seed=seed)
        with unrounded(self.model) if smooth else nullcontext(), watched or nullcontext():
            expected = torch_outputs(self.model, self.source, {k: v.float() for k, v in drawn.items()})
        return drawn, expected

    def floor(self, shape: Shape, seed: int, rounding: float) -> float:
        """Largest relative L2 change of the output when every layer's output is off by a rounding."""
        drawn, expected = self.outputs(shape, seed, smooth=False)
        (name,) = expected
        changes = []
        for run in range(FLOOR_RUNS):
            with noisy(self.model, rounding, run):
                values = {k: v.float() for k, v in drawn.items()}
                other = torch_outputs(self.model, self.source, values)[name]
            changes.append(np.linalg.norm(other - expected[name]) / np.linalg.norm(expected[name]))
        return float(max(changes))


@dataclass(frozen=True)
class _Case:
    """One way of running the compiled model, and the limit."""

    arithmetic: str
    graph: onnx.ModelProto
    limit: float
    rounding: float  # relative step of the arithmetic


def validate(
    model: onnx.ModelProto,
    reference: AnyReference,
    *,
    format: str,
    shapes: Sequence[Sizes],
    seed: int,
    limit: float | None = None,
) -> list[ShapeReport]:
    """Run both at every shape on the same random inputs and compare the outputs.

    First without rounding of activations on either side: any wrong weight, scale or wire shows, at any depth.
    Then quantized: the float32 twin at the float32 tolerance, and a float16 model itself at the 16-bit one,
    which shows overflow and 16-bit types in wrong places. `limit` takes the place of all tolerances.

    How far the two are apart before anything is rounded is how far roundings are taken to put values off after.
    """
    reports: list[ShapeReport] = []
    apart = 0.0
    for case in _cases(model, reference, format):
        case = replace(case, rounding=max(case.rounding, apart))
        case = case if limit is None else replace(case, limit=limit)
        scale = None if case.arithmetic == SMOOTH else softmax_scale(model)
        with cpu_session(case.graph) as session, reference.with_quantized_softmax(scale):
            for i, shape in enumerate(shapes):
                reports.append(_judge(case, session, reference, shape, seed + i * DRAWS))
        if case.arithmetic == SMOOTH and all(report.passed for report in reports):
            apart = max(row.rel_l2 or 0.0 for report in reports for row in report.rows)
    return reports


def validate_session(
    name: str,
    model: onnx.ModelProto,
    session: Session,
    reference: AnyReference,
    *,
    limit: float,
    shapes: Sequence[Sizes],
    seed: int,
) -> list[ShapeReport]:
    """The same for a runtime that computes as `model` says: `name` is how the reports call it."""
    case = _Case(name, model, limit, {"float32": 2.0**-23, "float16": 2.0**-11}.get(reference.dtype, 2.0**-8))
    with reference.with_quantized_softmax(softmax_scale(model)):
        return [_judge(case, session, reference, shape, seed + i * DRAWS) for i, shape in enumerate(shapes)]


def _cases(model: onnx.ModelProto, reference: AnyReference, format: str) -> list[_Case]:
    dtype = reference.dtype
    twin = model if dtype == "float32" else float32_twin(model)
    cases = [_Case("float32", twin, tolerance_of(format, "float32"), 2.0**-23)]
    if reference.quantized:
        cases.insert(0, _Case(SMOOTH, smooth_twin(model), SMOOTH_REL_L2, 2.0**-23))
    if dtype == "float16" and runs_on_cpu(model):
        cases.append(_Case(dtype, model, tolerance_of(format, dtype), 2.0**-11))
    return cases


def _judge(case: _Case, session: Session, reference: AnyReference, shape: Sizes, seed: int) -> ShapeReport:
    """The report at one shape: of the first draw that passes, or of the first that the reference condemns.

    Quantizers make a network chaotic: a value on the edge between two steps goes either way by the last bit,
    and deep networks multiply that. Whether a difference is of that kind is measured: the reference runs again
    with roundings in every layer. If it moves as much, the draw says nothing, and the next one is taken. If it
    does not, the compiled model is wrong.
    """
    for draw in range(1, DRAWS + 1):
        drawn, expected = reference.outputs(shape, seed + draw - 1, smooth=case.arithmetic == SMOOTH)
        arrays = _arrays(drawn)
        result = dict(session.run(feed(case.graph, arrays)))
        rows = compare(expected, result, case.limit)
        report = ShapeReport(
            shape, case.arithmetic, rows, arrays, expected, result, draw, seed=seed + draw - 1
        )
        if report.passed or case.arithmetic == SMOOTH:
            return report
        report = replace(report, floor=reference.floor(shape, seed + draw - 1, case.rounding))
        if not report.chaotic:
            return report
    return report


@contextmanager
def noisy(reference: torch.nn.Module, rounding: float, seed: int) -> Iterator[None]:
    """What every layer gives and every quantizer of activations takes is off by up to `rounding` while this is open.

    `rounding` is relative to a value and to the root mean square of its tensor: sums that cancel are small, and their
    error is that of their terms. Quantizers, because ModelOpt multiplies by bound / amax where ONNX divides by the
    scale: 16-bit inputs of the graph, which no layer made, often lie exactly between two steps, and the two then take
    one each. What a sinusoidal embedding takes, too: its angles go to thousands, and their roundings with them.
    """
    from diffusers.models.embeddings import Timesteps
    from modelopt.torch.quantization.nn import TensorQuantizer

    generator = torch.Generator().manual_seed(seed)

    def disturb(_: Any, __: Any, out: Any) -> Any:
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return out
        size = out.abs() + out.square().mean().sqrt()
        return out + rounding * size * (torch.rand(out.shape, generator=generator) * 2 - 1)

    layers = (m for m in reference.modules() if hasattr(m, "weight") or not list(m.children()))
    handles = [m.register_forward_hook(disturb) for m in layers if not isinstance(m, TensorQuantizer)]
    for name, quantizer in enabled_quantizers(reference).items():
        if role_of(name) != "weight_quantizer":
            before = quantizer.register_forward_pre_hook(lambda q, x: (disturb(q, x, x[0]), *x[1:]))
            handles.append(before)
    for module in (m for m in reference.modules() if isinstance(m, Timesteps)):
        handles.append(module.register_forward_pre_hook(lambda m, x: (disturb(m, x, x[0]), *x[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unrounded(
    reference: torch.nn.Module, chosen: Callable[[str], bool] = lambda name: True
) -> Iterator[None]:
    """ModelOpt's activation quantizers saturate, and do not round, while this is open: those with `chosen` names."""
    handles = []
    for name, quantizer in enabled_quantizers(reference).items():
        if role_of(name) != "weight_quantizer" and chosen(name):
            handles.append(quantizer.register_forward_hook(_saturate))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _saturate(quantizer: Any, inputs: Any, _: Any) -> torch.Tensor:
    """A quantizer's output without its rounding; dynamic blocks are scaled to their largest value."""
    x: torch.Tensor = inputs[0]
    if quantizer.pre_quant_scale is not None:
        x = x * quantizer.pre_quant_scale
    kind = kind_of(settings_of(quantizer.get_modelopt_state()))
    if kind in ("nvfp4", "mxfp8"):
        return x
    high = BOUNDS[kind]
    low = -high - 1 if kind == "int8" else -high
    scale = quantizer.amax.float() / high
    return x.clamp(low * scale, high * scale)
