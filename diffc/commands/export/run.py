"""`diffc checkpoint export`: finds model and calibration, writes one layout whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffc.artifact.folder import MANIFEST, Artifact
from diffc.artifact.model import compiled_model
from diffc.commands.export.layouts import LAYOUTS, Calibrated, Written
from diffc.errors import DiffcError, UsageError, unknown_value
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import locate
from diffc.output_folders import one_writer, written_folder
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from diffc.quantize.checkpoint import Checkpoint
from passes.base import PassError
from passes.files.atomic import replace


@dataclass(frozen=True)
class ExportRequest:
    """What to write where.

    `what` is an artifact or a calibration's folder; `model` is where its model lies, None for where a compile found
    it. `output` is the folder or file to write; `force` replaces one that is there.
    """

    what: Path
    layout: str
    output: Path
    model: str | None = None
    force: bool = False


def export(request: ExportRequest, ui: Reporter | None = None) -> Written:
    """Write a calibrated model in the layout of another tool.

    Raises DiffcError when there is no calibration, or not this model's; UsageError when something is at the output.
    """
    if request.layout not in LAYOUTS:
        raise unknown_value("layout", request.layout, LAYOUTS)
    layout, output = LAYOUTS[request.layout], request.output
    if layout.suffix and output.suffix != layout.suffix:
        raise UsageError(
            f"layout {request.layout} is one file, and {output} does not end in {layout.suffix}",
            fix=f"give -o {output.with_suffix(layout.suffix)}",
        )
    if output.exists() and not request.force:
        raise UsageError(f"{output} is there already", fix="give another -o, or --force")
    found = find_calibrated(request.what, request.model)
    with (ui or default_reporter()).stage(f"write {output.name} ({request.layout})"):
        return _write(found, request, layout.suffix)


def find_calibrated(what: Path, model: str | None) -> Calibrated:
    """The model and calibration of an artifact, or of a calibration's folder and `model`."""
    if (what / MANIFEST).is_file():
        artifact = Artifact.load(what)
        if not (what / "checkpoint").is_dir():
            raise DiffcError(
                f"{what} has no calibration: it was compiled to {artifact.manifest['format']}",
                fix="give an artifact of a quantized format",
            )
        source, dtype = compiled_model(artifact, model, "--model MODEL"), str(artifact.manifest["dtype"])
        what = what / "checkpoint"
    elif model is None:
        raise UsageError(f"{what} does not say which model it is of", fix="name it: --model MODEL")
    else:
        source = locate(model)
        dtype = source.dtype
    checkpoint = Checkpoint.load(what)
    if not checkpoint.scales_weights:
        source = source.as_held()
    checkpoint.check(FakeBackbone(source, dtype).module, source.family.name, source.fingerprint)
    return Calibrated(source, checkpoint, dtype)


def _write(found: Calibrated, request: ExportRequest, suffix: str) -> Written:
    """Write beside the output, and rename what is whole."""
    output, write = request.output.absolute(), LAYOUTS[request.layout].write
    try:
        if not suffix:
            with written_folder(output) as folder:
                return write(found, folder)
        with one_writer(output) as partial:
            return _write_file(found, write, partial, output)
    except PassError as error:
        raise DiffcError(str(error), fix="choose another --layout") from error


def _write_file(
    found: Calibrated, write: Callable[[Calibrated, Path], Written], folder: Path, output: Path
) -> Written:
    """`written_folder` for one file, which is written in the unfinished folder."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        folder.mkdir()
        written = write(found, folder / output.name)
        replace(folder / output.name, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return written
