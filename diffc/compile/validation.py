"""The validation of a compile: every model that was written, in ONNX Runtime, against torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from diffc.models.spec import Shape
from diffc.progress import Reporter
from diffc.validate.modules import compare_modules, require_right_modules
from diffc.validate.outputs import validate_model
from diffc.validate.reports import NOT_WRITTEN, ShapeReport
from diffc.validate.streamed import StreamedReference, validate_streamed
from diffc.validate.torch_reference import TorchReference
from passes.storage import load


def validate_whole(
    models: Mapping[str, Path],
    reference: TorchReference,
    *,
    format: str,
    shapes: Sequence[Shape],
    seed: int,
    ui: Reporter,
) -> list[ShapeReport]:
    """The model files, by name, against torch at the `shapes`.

    Raises MismatchError when a module is off whose fault roundings could hide in the outputs.
    """
    reports = []
    for name, path in models.items():
        with ui.stage(f"validate {name} against torch") as update:
            found = validate_model(
                load(path), reference, format=format, shapes=shapes, seed=seed, update=update
            )
        reports += [replace(report, model=name) for report in found]
        if chaotic := next((report for report in found if report.chaotic), None):
            _examine(name, load(path), reference, chaotic, format, ui)
    return reports


def _examine(
    name: str,
    model: onnx.ModelProto,
    reference: TorchReference,
    chaotic: ShapeReport,
    format: str,
    ui: Reporter,
) -> None:
    """Compare every module by itself, where roundings hide what the outputs would say. Raises MismatchError."""
    with ui.stage(f"examine {name} module by module: its outputs are at the mercy of roundings") as update:
        found = compare_modules(
            model, reference, format=format, shape=chaotic.shape, seed=chaotic.seed, update=update
        )
    require_right_modules(found, name, against="torch", fix=NOT_WRITTEN)


def validate_by_layer(
    models: Mapping[str, Path],
    reference: StreamedReference,
    *,
    format: str,
    shape: Shape,
    seed: int,
    ui: Reporter,
) -> list[ShapeReport]:
    """The same for a model that is too large to be held at once: layer by layer on both sides, at one shape."""
    ui.note("too large to be validated at once in the memory that is free: layer by layer, at one shape")
    reports = []
    for name, path in models.items():
        with ui.stage(f"validate {name} against torch, layer by layer") as update:
            found = validate_streamed(
                load(path), reference, format=format, shape=shape, seed=seed, update=update
            )
        reports += [replace(report, model=name) for report in found]
    return reports
