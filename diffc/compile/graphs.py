"""The graphs of a compile: canonical, as each target takes them, and written with their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from diffc.artifact.resume import journal
from diffc.backends.target import Target
from diffc.compile.cached.variants import CacheBuild
from diffc.compile.lora_slots import FILE, SlottedGraph
from diffc.progress import Reporter
from passes import Pass, Pipeline, PipelineResult
from passes.canonical.fix_size import FixSize
from passes.canonical.keep_stored_codes import KeepStoredCodes
from passes.graph.check import Check
from passes.pipeline import PassRecord
from passes.presets import CANONICAL, DEFAULT_OPTIONS, TargetOptions, target_passes
from passes.storage import save_all


@dataclass(frozen=True)
class Graphs:
    """The models to write, by file name, which of them each target takes, and what the passes did.

    model.onnx is the first target's. `cache`: the models that a cache plan adds. `lora`: the one with LoRA slots.
    """

    models: Mapping[str, onnx.ModelProto]
    files: Mapping[str, str]
    records: Sequence[PassRecord]
    cache: CacheBuild | None = None
    lora: SlottedGraph | None = None


def canonicalize(
    model: onnx.ModelProto,
    batch: int | None,
    own: Sequence[Pass],
    check: Check,
    dump: Path | None,
    ui: Reporter,
    *,
    keep_codes: bool = False,
) -> PipelineResult:
    """The traced `model` after the passes that every target gets, and the user's `own`.

    It is made for `batch` images, None for any number. `keep_codes`: weights that a file holds as codes stay these.
    """
    fixed = () if batch is None else (FixSize("batch", batch),)
    stored = (KeepStoredCodes(),) if keep_codes else ()  # after the layouts: it takes them over to the codes
    result = run_passes((*fixed, *CANONICAL, *stored, *own), model, "rewrite the graph", check, dump, ui)
    ui.note(f"{len(model.graph.node)} -> {len(result.model.graph.node)} nodes")
    return result


def run_passes(
    steps: Sequence[Pass],
    model: onnx.ModelProto,
    title: str,
    check: Check,
    dump: Path | None,
    ui: Reporter,
) -> PipelineResult:
    """Run `steps` on `model` as one stage; `check` follows each, and `dump` gets the graph after each."""
    with ui.stage(title) as update:
        return Pipeline(steps).run(model, check=check, dump=dump, on_event=lambda e: update(e.index, e.total))


def legalize(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    check: Check,
    dump: Path | None,
    ui: Reporter,
    options: TargetOptions = DEFAULT_OPTIONS,
) -> Graphs:
    """The canonical `model` after each target's own passes. Targets that want the same graph share its file."""
    records: list[PassRecord] = []
    wanted = {}
    for target in targets:
        steps, folder = target_passes(target.name, options), None if dump is None else dump / target.name
        result = run_passes(steps, model, f"legalize for {target.name}", check, folder, ui)
        records += [replace(record, graph=target.name) for record in result.records]
        wanted[target.name] = result.model
    return Graphs(*_share(wanted), records)


def passes_of(target: Target, options: TargetOptions) -> tuple[Pass, ...]:
    """The passes of a target: its own ones where it brings some, else those of `passes.presets`."""
    return target_passes(target.name, options) if target.passes is None else target.passes


def _share(wanted: Mapping[str, onnx.ModelProto]) -> tuple[dict[str, onnx.ModelProto], dict[str, str]]:
    """The distinct models by file name, and the file of each target."""
    known: dict[bytes, str] = {}
    models, files = {}, {}
    for target, model in wanted.items():
        text = model.SerializeToString(deterministic=True)
        if text not in known:
            known[text] = f"model-{target}.onnx" if known else "model.onnx"
            models[known[text]] = model
        files[target] = known[text]
    return models, files


def write(graphs: Graphs, folder: Path, ui: Reporter) -> dict[str, str]:
    """Compute the weights recipe by recipe and stream them to model.onnx_data; SHA-256 by file name."""
    models = {folder / name: model for name, model in graphs.models.items()}
    for variant in graphs.cache.variants if graphs.cache else ():
        models |= {folder / name: model for name, model in variant.legalized.items()}
    if graphs.lora is not None:
        models[folder / FILE] = graphs.lora.model
    with ui.stage("write weights") as update:
        files = save_all(models, lambda done, total, name: update(done, total), journal(folder))
    return {file.path.name: file.sha256 for file in files}
