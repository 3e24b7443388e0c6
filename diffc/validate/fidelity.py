"""The proof of a compile: ONNX Runtime's outputs of the compiled graph against ModelOpt's fake-quantized torch model."""

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
from diffc.validate.twin import cpu_session, feed


@dataclass(frozen=True)
class ShapeReport:
    """The comparison at one shape, with the inputs and outputs behind it."""

    shape: Shape
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
    """The torch backbone with its weights in `dtype`, fake-quantized by ModelOpt where there is a checkpoint."""
    model = load_backbone(source, DTYPES[dtype])
    if checkpoint is not None:
        checkpoint.apply(model, source.family)
    return model


def validate(
    model: onnx.ModelProto,
    source: ModelSource,
    *,
    dtype: str,
    checkpoint: Checkpoint | None,
    shapes: Sequence[Shape],
    max_rel_l2: float,
    seed: int,
) -> list[ShapeReport]:
    """Run both at every shape on the same random inputs and compare the outputs."""
    spec = find_spec(source.family)
    reference = reference_model(source, dtype, checkpoint)
    reports = []
    with cpu_session(model) as session:
        for i, shape in enumerate(shapes):
            values = random_inputs(spec, source.config, shape, dtype=DTYPES[dtype], seed=seed + i)
            expected = torch_outputs(reference, source, values)
            arrays = _arrays(values)
            result = dict(session.run(feed(model, arrays)))
            reports.append(
                ShapeReport(shape, compare(expected, result, max_rel_l2), arrays, expected, result)
            )
    return reports


def require_match(reports: Sequence[ShapeReport]) -> None:
    """Raise MismatchError (exit code 3) naming the first output and shape out of tolerance."""
    for report in reports:
        for row in report.rows:
            if not row.passed:
                raise MismatchError(
                    f"the compiled model differs from torch: output {row.name!r} at {report.shape}: {row.reason}",
                    mend="the artifact was not written; compile with --dump DIR to see every pass,"
                    " and report this with the command",
                )


def save_reports(reports: Sequence[ShapeReport], folder: Path) -> None:
    """Write per shape the comparison (JSON), and inputs and outputs as `polygraphy run` loads them."""
    folder.mkdir(exist_ok=True)
    for i, report in enumerate(reports):
        save_json(report.rows, folder / f"shape{i}.json")
        save_inputs(report.inputs, folder / f"shape{i}-inputs.json")
        save_outputs(report.reference, "torch", folder / f"shape{i}-torch.json")
        save_outputs(report.result, "onnxruntime", folder / f"shape{i}-onnxruntime.json")
