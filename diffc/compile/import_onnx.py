"""`diffc import`: what ModelOpt's scripts exported, brought to the canonical form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx

from diffc.artifact.folder import check_model_output
from diffc.errors import DiffcError
from diffc.frontend.onnx_file import read_model
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from diffc.validate.compare import compare
from diffc.validate.float32 import Arrays, cpu_session, feed, float32_copy, unrounded_copy
from diffc.validate.passes import NUMERIC_LIMIT, random_feeds
from diffc.validate.tolerances import PASS_REL_L2
from passes import Pass, PassCheckError, Pipeline
from passes.graph.check import check_structure
from passes.graph.trt_ops import DOMAIN
from passes.graph.types import FLOATS
from passes.importing.rewrite_opset import RewriteOpset
from passes.pipeline import Event
from passes.presets import IMPORT, IMPORT_FILE
from passes.storage import save, weight_bytes

if TYPE_CHECKING:
    from passes import PipelineResult

_RAISE = Pipeline([RewriteOpset()])
"""The functions that stand for TensorRT's operators in ONNX Runtime need opset 21."""
Outputs = dict[str, npt.NDArray[Any]]
CANONICAL_TRT = frozenset({"TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"})


def import_model(path: Path) -> onnx.ModelProto:
    """The model in `path` in canonical form (opset 23, IR 11), its weights recipes. Raises as `import_result`."""
    return import_result(path).model


def import_result(
    path: Path,
    *,
    dump: Path | None = None,
    check_numbers: bool = True,
    steps: Sequence[Pass] = IMPORT,
    ui: Reporter | None = None,
) -> PipelineResult:
    """Read `path` and run the passes `steps`; records say what each did, and how far it was checked.

    Raises PassError and DiffcError for files that cannot be imported, each with what to do, and PassCheckError when
    a pass breaks the graph or changes numbers beyond its tolerance.
    """
    ui = ui or default_reporter()
    with ui.stage("read the model"):
        imported = read_model(path)
    for note in imported.notes:
        ui.note(note)
    check = ImportCheck(imported.model, numbers=check_numbers)
    valid_from = steps.index(RewriteOpset())  # types agree, and the opset is the newest
    with ui.stage("bring it to canonical form") as update:

        def follow(event: Event) -> None:
            update(event.index, event.total)
            check.strict = event.index >= valid_from

        result = Pipeline(steps).run(imported.model, check=check, dump=dump, on_event=follow)
    _require_canonical(result.model, path)
    _drop_imports(result.model)
    check_structure(None, result.model, None)
    return result


def import_file(
    path: Path, output: Path, *, dump: Path | None = None, force: bool = False, ui: Reporter
) -> PipelineResult:
    """`import_result`, written to `output`, weights streamed beside it."""
    check_model_output(output, model=path, force=force)
    result = import_result(path, dump=dump, steps=IMPORT_FILE, ui=ui)
    with ui.stage("write weights") as update:
        save(result.model, output, lambda done, total, name: update(done, total))
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


@dataclass
class ImportCheck:
    """The runner's check while a graph is still becoming valid.

    Exports often are no valid ONNX: `strict` says from which pass on the graph must be. Outputs are compared
    across every pass that starts from a graph which ONNX Runtime can run and which says what it means (see
    `marks`); the line says so where it does not. Weights over `NUMERIC_LIMIT` are not run.
    """

    model: onnx.ModelProto
    numbers: bool = True
    strict: bool = False
    _feeds: list[Arrays] = field(default_factory=list)
    _cache: list[tuple[onnx.ModelProto, bool, list[Outputs] | str]] = field(default_factory=list)

    def __call__(self, before: onnx.ModelProto | None, after: onnx.ModelProto, step: Pass | None) -> str:
        """One line on what was checked. Raises PassCheckError."""
        line = self._structure(before, after, step)
        if not self.numbers or before is None or step is None:
            return line
        if max(weight_bytes(before), weight_bytes(after)) > NUMERIC_LIMIT:
            return f"{line}; numbers not compared (weights over {NUMERIC_LIMIT >> 20} MiB)"
        return f"{line}; {self._compare(before, after, step)}"

    def _structure(self, before: onnx.ModelProto | None, after: onnx.ModelProto, step: Pass | None) -> str:
        try:
            return check_structure(before, after, step)
        except PassCheckError:
            if self.strict:
                raise
            return "not valid yet"

    def _compare(self, before: onnx.ModelProto, after: onnx.ModelProto, step: Pass) -> str:
        rounded = any(node.op_type in _UNSMOOTHED for node in before.graph.node)
        old = self._outputs(before, rounded)
        if isinstance(old, str):
            return f"numbers not compared: before it, {old}"
        new = self._outputs(after, rounded)
        if isinstance(new, str):
            raise PassCheckError(f"pass {step.name!r}: ONNX Runtime ran the graph before it; after it, {new}")
        limit = step.tolerance + PASS_REL_L2
        rows = [row for a, b in zip(old, new, strict=True) for row in compare(a, b, limit)]
        for row in (row for row in rows if not row.passed):
            raise PassCheckError(f"pass {step.name!r} changed output {row.name!r}: {row.reason}")
        return f"outputs within {max(row.rel_l2 or 0.0 for row in rows):.1e} (limit {limit:.1e})"

    def _outputs(self, model: onnx.ModelProto, rounded: bool) -> list[Outputs] | str:
        """Outputs of the float32 twin at all inputs, smooth unless `rounded`; or why there are none."""
        for known, how, outputs in self._cache:
            if known is model and how == rounded:
                return outputs
        found = marks(model)
        if found:
            made: list[Outputs] | str = (
                f"{len(found)} nodes only marked what should be quantized, such as {found[0]!r}"
            )
        else:
            made = self._run(model, rounded)
        self._cache = [*self._cache[-1:], (model, rounded, made)]
        return made

    def _run(self, model: onnx.ModelProto, rounded: bool) -> list[Outputs] | str:
        self._feeds = self._feeds or random_feeds(self.model, seed=0)
        try:
            raised = _RAISE.run(model, check=lambda before, after, step: "").model
            twin = float32_copy(raised) if rounded else unrounded_copy(raised)
            with cpu_session(twin) as session:
                return [session.run(feed(twin, values)) for values in self._feeds]
        except Exception as error:  # ONNX Runtime's are of many classes; the caller decides what it means
            lines = str(error).splitlines() or [type(error).__name__]
            return f"it did not run ({lines[0].strip()[:160]})"


def marks(model: onnx.ModelProto) -> list[str]:
    """Names of nodes that stand for a quantizer which the exporter should have put there.

    They are dequantizers of what was never quantized: a float weight (INT4), or any float tensor (MXFP8).
    """
    quantized = {t.name for t in model.graph.initializer if t.data_type not in FLOATS}
    quantized |= {name for n in model.graph.node if n.op_type.endswith(_QUANTIZERS) for name in n.output}
    moved = {name: n.input[0] for n in model.graph.node if n.op_type in _MOVES for name in n.output}

    def source(name: str) -> str:
        while name in moved:
            name = moved[name]
        return name

    return [
        node.name
        for node in model.graph.node
        if node.op_type.endswith("DequantizeLinear") and source(node.input[0]) not in quantized
    ]


# What drop-rounding does not know: graphs that have them are compared with all their roundings.
_UNSMOOTHED = ("TRT_FP8QuantizeLinear", "TRT_INT4QuantizeLinear", "TRT_FP4QDQ")
_QUANTIZERS = ("QuantizeLinear", "DynamicQuantize", "Constant")
_MOVES = frozenset({"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
