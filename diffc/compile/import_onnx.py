"""`diffc import`: what ModelOpt's scripts exported, brought to the canonical form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from diffc.artifact.folder import check_model_output
from diffc.compile.import_check import ImportCheck
from diffc.errors import DiffcError
from diffc.frontend.onnx_file import Imported, read_model
from diffc.frontend.onnx_interface import fix_dimensions
from diffc.paths import AnyPath, as_path, as_path_or_none
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from diffc.validate.fitting_sizes import FittingSizes
from diffc.validate.float32 import emulated
from passes import Pass, Pipeline
from passes.graph.check import check_structure
from passes.graph.trt_ops import DOMAIN
from passes.importing.rewrite_opset import RewriteOpset
from passes.pipeline import Event
from passes.presets import IMPORT, IMPORT_FILE
from passes.storage import save

if TYPE_CHECKING:
    from passes import PipelineResult

CANONICAL_TRT = frozenset({"TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"})


def import_model(path: AnyPath) -> onnx.ModelProto:
    """The model in `path` in canonical form (opset 23, IR 11), its weights recipes. Raises as `import_result`."""
    return import_result(path).model


def import_result(
    path: AnyPath,
    *,
    dump: AnyPath | None = None,
    check_numbers: bool = True,
    steps: Sequence[Pass] = IMPORT,
    ui: Reporter | None = None,
) -> PipelineResult:
    """Read `path` and run the passes `steps`; records say what each did, and how far it was checked.

    Raises PassError and DiffcError for files that cannot be imported, each with what to do, and PassCheckError when
    a pass breaks the graph or changes numbers beyond its tolerance.
    """
    ui, path = ui or default_reporter(), as_path(path)
    check = ImportCheck(numbers=check_numbers)
    return canonical(read(path, ui), path, check, dump=as_path_or_none(dump), steps=steps, ui=ui)


def read(path: Path, ui: Reporter) -> Imported:
    """The file, read for the passes; what was done to its interface is told. Raises as `read_model`."""
    with ui.stage("read the model"):
        imported = read_model(path)
    for note in imported.notes:
        ui.note(note)
    return imported


def canonical(
    imported: Imported,
    path: Path,
    check: ImportCheck,
    *,
    dump: Path | None = None,
    steps: Sequence[Pass] = IMPORT,
    ui: Reporter,
) -> PipelineResult:
    """The passes `steps` on a file that was read, which came from `path`. Raises as `import_result`."""
    valid_from = steps.index(RewriteOpset())  # types agree by then, and the opset is the newest
    with ui.stage("bring it to canonical form") as update:

        def follow(event: Event) -> None:
            update(event.index, event.total)
            check.strict = event.index >= valid_from

        result = Pipeline(steps).run(imported.model, check=check, dump=dump, on_event=follow)
    check.strict = True
    for record in (r for r in result.records if r.name == RewriteOpset.name):
        for note in record.notes[1:]:  # the first says what every import does
            ui.note(note)
    _require_canonical(result.model, path)
    _drop_imports(result.model)
    _fix_dimensions((imported.model, result.model), ui)
    check_structure(None, result.model, None)
    return result


def _fix_dimensions(models: tuple[onnx.ModelProto, onnx.ModelProto], ui: Reporter) -> None:
    """Make dimensions numbers that constants of the second model, which is canonical, leave one size, in both."""
    with ui.stage("see which sizes it takes"):
        sizes = FittingSizes(emulated(models[1])).only_sizes()
    for model in models if sizes else ():
        fix_dimensions(model.graph, sizes)
    for name, size in sizes.items():
        ui.note(
            f"{name} is {size}: constants of the graph hold that size, though the file says that it is dynamic"
        )


def import_file(
    path: AnyPath,
    output: AnyPath,
    *,
    dump: AnyPath | None = None,
    force: bool = False,
    ui: Reporter | None = None,
) -> PipelineResult:
    """`import_result`, written to `output`, weights streamed beside it."""
    ui, path, output = ui or default_reporter(), as_path(path), as_path(output)
    check_model_output(output, model=path, force=force)
    result = import_result(path, dump=dump, steps=IMPORT_FILE, ui=ui)
    with ui.stage("write weights") as update:
        save(result.model, output, lambda done, total, name: update(done, total))
    if any(node.domain == DOMAIN for node in result.model.graph.node):
        ui.note(
            "the file holds operators of TensorRT, which ONNX Runtime's own providers lack: for them,"
            f" diffc compile {path} --target ort"
        )
    return result


def _drop_imports(model: onnx.ModelProto) -> None:
    """Drop the import of TensorRT's domain where nothing of it is left."""
    if not model.functions and all(node.domain != DOMAIN for node in model.graph.node):
        kept = [
            onnx.helper.make_opsetid(i.domain, i.version) for i in model.opset_import if i.domain != DOMAIN
        ]
        del model.opset_import[:]
        model.opset_import.extend(kept)


def _require_canonical(model: onnx.ModelProto, path: Path) -> None:
    """Raise DiffcError naming the first operator of TensorRT that could not be rewritten."""
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type not in CANONICAL_TRT:
            raise DiffcError(
                f"{path}: {DOMAIN}::{node.op_type} node {node.name!r} could not be brought to canonical form: "
                "its weight or scale is not a constant of the shape that its block size asks for",
                fix="run again with --dump and see the refusals, or export that layer unquantized",
            )
