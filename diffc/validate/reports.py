"""The comparison of a compiled model with its reference at one shape: as it is kept, judged and written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from diffc.errors import MismatchError
from diffc.models.spec import Shape
from diffc.validate.compare import OutputComparison, save_inputs, save_json, save_outputs
from passes.files.contained import safe_name

UNROUNDED = "float32, activations not rounded"


@dataclass(frozen=True)
class GraphSizes:
    """The sizes at which an imported graph is run: those of its dynamic dimensions, by name."""

    dims: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.dims) or "fixed"


Sizes = Shape | GraphSizes


@dataclass(frozen=True)
class ShapeReport:
    """The comparison at one shape, with the inputs and outputs that were compared.

    `arithmetic` says what ONNX Runtime computed: UNROUNDED, "float32" (the model or its float32 copy), or "float16" (a
    float16 model itself). `draw` counts the random inputs that were tried, from 1. `floor` is the relative L2 change
    of the reference's own outputs under roundings in its layers, None where it was not measured. `model` is the name
    of the file that was run, `seed` that of the inputs.
    """

    shape: Sizes
    arithmetic: str
    rows: list[OutputComparison]
    inputs: dict[str, npt.NDArray[Any]]
    reference: dict[str, npt.NDArray[Any]]
    result: dict[str, npt.NDArray[Any]]
    draw: int = 1
    floor: float | None = None
    model: str = "model.onnx"
    seed: int = 0

    @property
    def passed(self) -> bool:
        """Whether every output is within its limit."""
        return all(row.passed for row in self.rows)

    @property
    def chaotic(self) -> bool:
        """Whether it is over its limit by no more than roundings move the reference's own outputs."""
        floor = self.floor or 0.0
        return not self.passed and all(r.rel_l2 is not None and r.rel_l2 <= 3 * floor for r in self.rows)

    def described(self) -> dict[str, Any]:
        """The report without its arrays, as a manifest and --json hold it."""
        return {
            "model": self.model,
            "shape": self.shape.described() if isinstance(self.shape, Shape) else dict(self.shape.dims),
            "arithmetic": self.arithmetic,
            "seed": self.seed,
            "draw": self.draw,
            "floor": self.floor,
            "outputs": [asdict(row) for row in self.rows],
        }


NOT_WRITTEN = (
    "the artifact was not written; compile with --dump DIR to see every pass,"
    " and report this with the command"
)


def require_match(reports: Sequence[ShapeReport], *, against: str = "torch", fix: str = NOT_WRITTEN) -> None:
    """Raise MismatchError (exit code 3) with the first output and shape out of tolerance.

    A chaotic report is not a mismatch: the unrounded comparison at the same shape has shown that the graph is right.
    """
    for report in (r for r in reports if not r.chaotic):
        for row in report.rows:
            if not row.passed:
                raise MismatchError(
                    f"the compiled {report.model} differs from {against}: output {row.name!r} at {report.shape}"
                    f" in {report.arithmetic}: {row.reason}{_floor_note(report)}",
                    fix=fix,
                )


def save_reports(reports: Sequence[ShapeReport], folder: Path) -> None:
    """Write the comparison of each shape (JSON), and its inputs and outputs as `polygraphy run` loads them."""
    folder.mkdir(exist_ok=True)
    for report in reports:
        name = file_name(report)
        save_json(report.rows, folder / f"{name}.json")
        save_inputs(report.inputs, folder / f"{name}-inputs.json")
        save_outputs(report.reference, "torch", folder / f"{name}-torch.json")
        save_outputs(report.result, "onnxruntime", folder / f"{name}-onnxruntime.json")


def file_name(report: ShapeReport) -> str:
    """How the files of a report begin: model, shape and arithmetic."""
    return case_name(report.model, report.shape, report.arithmetic)


def case_name(model: str, shape: Sizes, arithmetic: str) -> str:
    """How the files of the comparison of `model` at a shape begin."""
    kind = "unrounded" if arithmetic == UNROUNDED else arithmetic.replace(", ", "-")
    prefix = "" if model == "model.onnx" else f"{Path(model).stem}-"
    if isinstance(shape, Shape):
        frames = f"-f{shape.frames}" if shape.frames > 1 else ""
        return safe_name(f"{prefix}b{shape.batch}-{shape.height}x{shape.width}-t{shape.text}{frames}-{kind}")
    return safe_name(f"{prefix}{re.sub(r'[^A-Za-z0-9]+', '-', str(shape))}-{kind}")


def _floor_note(report: ShapeReport) -> str:
    if report.floor is None:
        return ""
    return f" (draw {report.draw}; roundings in its layers move the reference by {report.floor:.1e})"
