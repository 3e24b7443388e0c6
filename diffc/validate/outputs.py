"""Judging a compiled model by its outputs: the same random inputs through it and through a reference.

The reference is the torch model (`torch_reference.py`) or another ONNX graph (`onnx_reference.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import torch

from diffc.errors import MismatchError
from diffc.progress import Update
from diffc.validate.compare import compare
from diffc.validate.float32 import cpu_session, feed, float32_copy, runs_on_cpu, unrounded_copy
from diffc.validate.reports import UNROUNDED, ShapeReport, Sizes
from diffc.validate.tolerances import UNROUNDED_REL_L2, tolerance_of

DRAWS = 5
"""How many random inputs are tried at a shape until the reference is stable at one of them."""
FLOOR_RUNS = 5
"""How often the reference is disturbed to measure what roundings decide: whether a value flips is chance."""
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Relative step of each compute type."""
Outputs = dict[str, npt.NDArray[Any]]
Drawn = dict[str, torch.Tensor]
"""Random inputs by name, in the types that the model takes."""


class Session(Protocol):
    """Runs a compiled model."""

    def run(self, feed: Mapping[str, npt.NDArray[Any]]) -> Mapping[str, npt.NDArray[Any]]:
        """Arrays in the types of the model's inputs -> its outputs by name."""
        ...


class Reference(Protocol):
    """What a compiled model is compared with. `quantized`: its activations are rounded by quantizers."""

    dtype: str
    quantized: bool

    def outputs(self, shape: Any, seed: int, *, unrounded: bool) -> tuple[Drawn, Outputs]:
        """Random inputs at `shape`, and the outputs for them; `unrounded`: activations are not rounded."""
        ...

    def floor(self, shape: Any, seed: int, rounding: float) -> float:
        """Largest relative L2 change of the outputs when values are off by `rounding`."""
        ...

    def with_quantized_softmax(
        self, scale: float | None, *, rounds: bool = True
    ) -> AbstractContextManager[None]:
        """While this is open, attention quantizes its probabilities in steps of `scale`, and scales its scores as
        graphs do; without `rounds`, only the latter.
        """
        ...


@dataclass(frozen=True)
class _Case:
    """One way to run the compiled model, and the limit of its error. `rounding` is the step of its arithmetic."""

    arithmetic: str
    graph: onnx.ModelProto
    limit: float
    rounding: float


def validate_model(
    model: onnx.ModelProto,
    reference: Reference,
    *,
    format: str,
    shapes: Sequence[Sizes],
    seed: int,
    limit: float | None = None,
    update: Update = lambda done, total: None,
) -> list[ShapeReport]:
    """Run `model` in ONNX Runtime at every shape and compare its outputs with the reference's.

    1. Without rounding of activations on either side: a wrong weight, scale or connection shows at any depth.
    2. With rounding: the float32 copy, within the float32 tolerance of the format.
    3. A float16 model itself, within the 16-bit tolerance: overflow and 16-bit types in wrong places show.

    `limit` replaces all tolerances. The error that case 1 finds is how far values are apart before anything is
    rounded, so the later cases take roundings to be at least that large.
    """
    reports: list[ShapeReport] = []
    apart, cases = 0.0, _cases(model, reference, format)
    for case in cases:
        case = replace(case, rounding=max(case.rounding, apart))
        case = case if limit is None else replace(case, limit=limit)
        attention = reference.with_quantized_softmax(
            softmax_scale(model), rounds=case.arithmetic != UNROUNDED
        )
        with cpu_session(case.graph) as session, attention:
            for i, shape in enumerate(shapes):
                reports.append(_judge(case, session, reference, shape, seed + i * DRAWS))
                if len(reports) == 1:
                    require_alive(case.graph, session, reports[0])
                update(len(reports), len(cases) * len(shapes))
        if case.arithmetic == UNROUNDED and all(report.passed for report in reports):
            apart = max(row.rel_l2 or 0.0 for report in reports for row in report.rows)
    return reports


def validate_session(
    name: str,
    model: onnx.ModelProto,
    session: Session,
    reference: Reference,
    *,
    limit: float,
    shapes: Sequence[Sizes],
    seed: int,
    update: Update = lambda done, total: None,
) -> list[ShapeReport]:
    """The same for a runtime that computes what `model` says; the reports call its arithmetic `name`."""
    case = _Case(name, model, limit, ROUNDING[reference.dtype])
    reports: list[ShapeReport] = []
    with reference.with_quantized_softmax(softmax_scale(model)):
        for i, shape in enumerate(shapes):
            reports.append(_judge(case, session, reference, shape, seed + i * DRAWS))
            if len(reports) == 1:
                require_alive(model, session, reports[0])
            update(len(reports), len(shapes))
    return reports


def _cases(model: onnx.ModelProto, reference: Reference, format: str) -> list[_Case]:
    dtype, step = reference.dtype, ROUNDING["float32"]
    copy = model if dtype == "float32" else float32_copy(model)
    cases = [_Case("float32", copy, tolerance_of(format, "float32"), step)]
    if reference.quantized:
        cases.insert(0, _Case(UNROUNDED, unrounded_copy(model), UNROUNDED_REL_L2, step))
    if dtype == "float16" and runs_on_cpu(model):
        cases.append(_Case(dtype, model, tolerance_of(format, dtype), ROUNDING[dtype]))
    return cases


def _judge(case: _Case, session: Session, reference: Reference, shape: Sizes, seed: int) -> ShapeReport:
    """The report of the first draw that passes, or of the first that shows the compiled model to be wrong.

    Quantizers make a network chaotic: a value between two steps goes either way by its last bit, and deep networks
    multiply the difference. Whether an error is of that kind is measured: the reference runs again with roundings
    in every layer. If its outputs move as far, the draw decides nothing, and the next one is taken. If they do not,
    the compiled model is wrong.
    """
    for draw in range(1, DRAWS + 1):
        unrounded = case.arithmetic == UNROUNDED
        drawn, expected = reference.outputs(shape, seed + draw - 1, unrounded=unrounded)
        arrays = as_float32(drawn)
        result = dict(session.run(feed(case.graph, arrays)))
        rows = compare(expected, result, case.limit)
        report = ShapeReport(
            shape, case.arithmetic, rows, arrays, expected, result, draw, seed=seed + draw - 1
        )
        if report.passed or unrounded:
            return report
        report = replace(report, floor=reference.floor(shape, seed + draw - 1, case.rounding))
        if not report.chaotic:
            return report
    return report


def require_alive(graph: onnx.ModelProto, session: Session, report: ShapeReport) -> None:
    """Raise MismatchError when the outputs are the same whatever goes in: no comparison can tell that from right.

    The session runs once more, on the inputs of `report` with their signs turned.
    """
    turned = {n: -v if v.ndim > 1 and v.dtype.kind == "f" else v for n, v in report.inputs.items()}
    if all(turned[name] is value for name, value in report.inputs.items()) or not report.result:
        return
    result = session.run(feed(graph, turned))
    if all(np.array_equal(result[name], value, equal_nan=True) for name, value in report.result.items()):
        names = ", ".join(report.result)
        raise MismatchError(
            f"the outputs ({names}) of the compiled model are the same whatever goes in, at {report.shape}: it computes"
            " nothing, and an equal reference proves nothing",
            fix="look at the weights and at the scales of the checkpoint: zeros, or values that saturate everything",
        )


def softmax_scale(model: onnx.ModelProto) -> float | None:
    """The scale of the quantizers after Softmax, as the pass quantize-softmax leaves them; None without any.

    It is 1 / 448, since a probability is at most 1, rounded up to what every compute type holds.
    """
    softmax = {node.output[0] for node in model.graph.node if node.op_type == "Softmax"}
    found = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in softmax}
    values = {float(onnx.numpy_helper.to_array(t)) for t in model.graph.initializer if t.name in found}
    if found and len(values) != 1:
        raise RuntimeError(f"the quantizers of probabilities have the scales {sorted(values)}")
    return next(iter(values), None)


def as_float32(values: Drawn) -> Outputs:
    """Tensors as float32 arrays, by the same names."""
    return {name: np.asarray(value.float().numpy()) for name, value in values.items()}
