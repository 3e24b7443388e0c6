"""`diffc opt`: passes over an existing .onnx file, weights streamed through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from inspect import cleandoc

import onnx

from diffc.artifact.folder import check_model_output
from diffc.compile.import_check import ImportCheck
from diffc.errors import unknown_value
from diffc.frontend.first_look import first_look
from diffc.frontend.onnx_file import check_places
from diffc.frontend.onnx_interface import fix_channels, name_dimensions
from diffc.frontend.onnx_values import check_values
from diffc.paths import AnyPath, as_path, as_path_or_none
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from passes import Pipeline, PipelineResult, all_passes, find_pass
from passes.graph.check import Check, check_structure
from passes.storage import load, save

CHECKS = ("structure", "numeric")


def optimize(
    model: AnyPath,
    passes: str,
    output: AnyPath,
    *,
    check: str = "structure",
    dump: AnyPath | None = None,
    force: bool = False,
    ui: Reporter | None = None,
) -> PipelineResult:
    """Run the pipeline written in `passes` over `model` and write the result to `output`.

    `check` "numeric" also runs the model before and after each pass in ONNX Runtime on random inputs, at sizes at which
    it runs; a model that runs at none of those tried is not compared, and each record says why. Raises PassError for
    what the passes cannot take, DiffcError when `output` exists and `force` is not given.
    """
    model, output, dump = as_path(model), as_path(output), as_path_or_none(dump)
    if check not in CHECKS:
        raise unknown_value("check", check, CHECKS)
    check_model_output(output, model=model, force=force)
    ui = ui or default_reporter()
    pipeline = Pipeline.parse(passes)
    loaded = load(model)
    check_places(loaded, model)
    check_values(loaded, model)
    first_look(loaded, model)
    checker: Check = check_structure
    if check == "numeric":
        checker = ImportCheck(strict=True, interface=_interface(loaded))
    with ui.stage("rewrite the graph") as update:
        result = pipeline.run(loaded, check=checker, dump=dump, on_event=lambda e: update(e.index, e.total))
    with ui.stage("write weights") as update:
        save(result.model, output, lambda done, total, name: update(done, total))
    return result


def _interface(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that says of its inputs what the weights decide, for drawing inputs; the file keeps what it says."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    fix_channels(copy.graph)
    name_dimensions(copy.graph)
    return copy


def known_passes(name: str | None = None) -> Sequence[tuple[str, str, str]]:
    """(name, options, docstring) of every pass, or of the one with `name`. Raises PassError for an unknown name."""
    rows = []
    found = all_passes() if name is None else {name: find_pass(name)}
    for name, cls in found.items():
        options = [f.name if f.default is MISSING else f"{f.name}={_shown(f.default)}" for f in fields(cls)]
        rows.append((name, ", ".join(options), cleandoc(cls.__doc__ or "")))
    return rows


def _shown(value: object) -> str:
    return ";".join(map(str, value)) if isinstance(value, tuple) else str(value)
