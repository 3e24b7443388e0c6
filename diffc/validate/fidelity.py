"""The proof of a compile: ONNX Runtime on the compiled graph against ModelOpt's fake-quantized torch model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from diffc.errors import MismatchError
from diffc.frontend.inputs import forward_kwargs, random_inputs
from diffc.models.backbone import DTYPES, load_backbone
from diffc.models.locate import ModelSource
from diffc.models.spec import Shape
from diffc.models.specs import find_spec
from diffc.quantize.checkpoint import Checkpoint
from diffc.validate.compare import OutputComparison, compare, save_inputs, save_json, save_outputs
from diffc.validate.tolerances import tolerance_of
from diffc.validate.twin import cpu_session, feed, float32_twin, runs_on_cpu


@dataclass(frozen=True)
class ShapeReport:
    """The comparison at one shape, with the inputs and outputs behind it.

    `arithmetic` is the type in which ONNX Runtime computed: "float32" for the model or its twin, "float16"
    for a float16 model itself.
    """

    shape: Shape
    arithmetic: str
    rows: list[OutputComparison]
    inputs: dict[str, npt.NDArray[Any]]
    reference: dict[str, npt.NDArray[Any]]
    result: dict[str, npt.NDArray[Any]]


def validation_shapes(source: ModelSource) -> tuple[Shape, Shape]:
    """Two small shapes that differ in batch, height, width and text length."""
    step = find_spec(source.family).pixel_multiple(source.config)
    return Shape(1, 4 * step, 6 * step, 24), Shape(2, 8 * step, 4 * step, 40)


def validation_arrays(source: ModelSource, dtype: str, seed: int) -> list[dict[str, npt.NDArray[Any]]]:
    """Random inputs at both validation shapes, as float32 arrays that `dtype` holds exactly."""
    spec = find_spec(source.family)
    shapes = validation_shapes(source)
    values = (random_inputs(spec, source.config, s, dtype=DTYPES[dtype], seed=seed) for s in shapes)
    return [_arrays(v) for v in values]


def _arrays(values: dict[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.asarray(value.float().numpy()) for name, value in values.items()}


def torch_outputs(
    model: torch.nn.Module, source: ModelSource, values: dict[str, torch.Tensor]
) -> dict[str, npt.NDArray[Any]]:
    """The torch model's output under the graph output's name, as float32."""
    spec = find_spec(source.family)
    with torch.no_grad():
        out = model(**forward_kwargs(spec, source.config, values), return_dict=False)[0]
    return {spec.output: out.float().numpy()}


def reference_model(source: ModelSource, dtype: str, checkpoint: Checkpoint | None) -> torch.nn.Module:
    """The torch backbone, fake-quantized by ModelOpt: weights rounded to `dtype`, arithmetic in float32.

    Torch's own 16-bit arithmetic would put its roundings, and the quantizers that they flip, into the
    reference.
    """
    model = load_backbone(source, DTYPES[dtype])
    if checkpoint is not None:
        checkpoint.apply(model, source.family)
    return model.float()


def validate(
    model: onnx.ModelProto,
    source: ModelSource,
    *,
    dtype: str,
    format: str,
    checkpoint: Checkpoint | None,
    shapes: Sequence[Shape],
    seed: int,
) -> list[ShapeReport]:
    """Run both at every shape on the same random inputs and compare the outputs.

    The float32 twin is held to the float32 tolerance: it shows any fault of the graph. A float16 model then
    runs itself as well, held to the 16-bit tolerance: that shows overflow, and 16-bit types in wrong places.
    """
    spec = find_spec(source.family)
    reference = reference_model(source, dtype, checkpoint)
    drawn = [
        random_inputs(spec, source.config, s, dtype=DTYPES[dtype], seed=seed + i)
        for i, s in enumerate(shapes)
    ]
    inputs = [_arrays(values) for values in drawn]
    expected = [
        torch_outputs(reference, source, {n: torch.from_numpy(v) for n, v in arrays.items()})
        for arrays in inputs
    ]
    runs = [("float32", model if dtype == "float32" else float32_twin(model))]
    if dtype != "float32" and runs_on_cpu(model):
        runs.append((dtype, model))
    reports = []
    for arithmetic, graph in runs:
        limit = tolerance_of(format, arithmetic)
        with cpu_session(graph) as session:
            for shape, arrays, outputs in zip(shapes, inputs, expected, strict=True):
                result = dict(session.run(feed(graph, arrays)))
                rows = compare(outputs, result, limit)
                reports.append(ShapeReport(shape, arithmetic, rows, arrays, outputs, result))
    return reports


def require_match(reports: Sequence[ShapeReport]) -> None:
    """Raise MismatchError (exit code 3) naming the first output and shape out of tolerance."""
    for report in reports:
        for row in report.rows:
            if not row.passed:
                raise MismatchError(
                    f"the compiled model differs from torch: output {row.name!r} at {report.shape}"
                    f" in {report.arithmetic}: {row.reason}",
                    mend="the artifact was not written; compile with --dump DIR to see every pass,"
                    " and report this with the command",
                )


def save_reports(reports: Sequence[ShapeReport], folder: Path) -> None:
    """Write per shape the comparison (JSON), and inputs and outputs as `polygraphy run` loads them."""
    folder.mkdir(exist_ok=True)
    for report in reports:
        shape = report.shape
        name = f"b{shape.batch}-{shape.height}x{shape.width}-t{shape.text}-{report.arithmetic}"
        save_json(report.rows, folder / f"{name}.json")
        save_inputs(report.inputs, folder / f"{name}-inputs.json")
        save_outputs(report.reference, "torch", folder / f"{name}-torch.json")
        save_outputs(report.result, "onnxruntime", folder / f"{name}-onnxruntime.json")
