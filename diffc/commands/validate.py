"""`diffc validate`: a finished artifact, hashed and run again, compared with torch or with another graph."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from diffc.artifact.describe import is_imported
from diffc.artifact.folder import Artifact
from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.backends.target import TARGETS, find_target
from diffc.errors import DiffcError, UnsupportedError
from diffc.models.family import Family
from diffc.models.inputs import forward_kwargs
from diffc.models.registry import family_of_manifest
from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.paths import AnyPath, Converted, as_path, as_text_or_none
from diffc.progress import Reporter, estimated
from diffc.progress_bar import default_reporter
from diffc.runtime.interface import Interface
from diffc.runtime.load import load as load_runtime
from diffc.runtime.load import signature_of
from diffc.validate.comparisons import (
    Comparison,
    format_and_dtype,
    graph_reference,
    shapes_of,
    torch_reference_of,
)
from diffc.validate.float32 import emulated, runs_on_cpu
from diffc.validate.modules import ModuleReport, compare_modules, require_right_modules
from diffc.validate.onnx_reference import GraphReference
from diffc.validate.outputs import Session
from diffc.validate.reports import ShapeReport, require_match
from diffc.validate.script import RtxGraph, check_folder, write_script
from diffc.validate.tolerances import tolerance_of
from diffc.validate.torch_reference import TorchReference
from passes.storage import load, save

if TYPE_CHECKING:
    from diffc.runtime.module import CompiledBackbone


_LOADING = 10.0
"""Seconds that loading a torch model takes at least: that is what importing diffusers and ModelOpt takes."""


@dataclass(frozen=True)
class ValidateRequest:
    """What to compare with what.

    `target` "ort" runs every model of the artifact on the CPU, exactly as the graph says; any other target runs what
    `diffc.load` loads for it. `against` is "torch", "ort" (the artifact's own graph in float32 on the CPU), an
    artifact, or an .onnx file; None is torch where there is a torch model. `model` is where the torch model lies now,
    None for where the compile found it. `shapes` are texts of --shape; none means the two of a compile. Without
    `seeds`, one that the compile did not use. `limit` replaces all tolerances. `hub` says which files of the torch
    model are read.
    """

    artifact: Converted[AnyPath, Path] = Converted(as_path)
    target: str = "ort"
    against: Converted[AnyPath | None, str | None] = Converted(as_text_or_none, None)
    model: Converted[AnyPath | None, str | None] = Converted(as_text_or_none, None)
    shapes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    limit: float | None = None
    hub: HubOptions = DEFAULT_HUB


@dataclass(frozen=True)
class Validated:
    """What `validate_artifact` found: the comparisons, modules by file if they were asked for, and the reference."""

    reports: Sequence[ShapeReport]
    modules: Mapping[str, Sequence[ModuleReport]]
    against: str

    def to_json(self) -> dict[str, Any]:
        """What --json writes."""
        modules = {name: [asdict(report) for report in found] for name, found in self.modules.items()}
        return {
            "against": self.against,
            "passed": all(report.passed or report.chaotic for report in self.reports),
            "outputs": [report.described() for report in self.reports],
            "modules": modules,
        }

    def require_match(self) -> None:
        """Raise MismatchError (exit code 3) with the first module that is wrong, or else the first output.

        Modules come first because they are the sharper test: with a wrong module, outputs can still be within their
        limit, or beyond it by no more than roundings explain.
        """
        fix = "compile again; if it differs again, report this with the command"
        for model, found in self.modules.items():
            require_right_modules(found, model, against=self.against, fix=fix)
        fix = fix if self.modules else "find out where: give --bisect"
        require_match(self.reports, against=self.against, fix=fix)


def validate_artifact(
    request: ValidateRequest, ui: Reporter | None = None, *, bisect: bool = False, script: Path | None = None
) -> Validated:
    """Compare every model at every seed and shape; see `Validated.require_match`.

    `bisect`: every module by itself too, at the first shape and seed. `script` is a folder to write what
    `polygraphy run` repeats the comparisons with. Raises DiffcError when a file of the artifact was changed, when
    there is nothing to compare it with, or when the target does not run on this machine.
    """
    ui = ui or default_reporter()
    if script is not None:
        check_folder(script)
    reports: list[ShapeReport] = []
    modules: dict[str, Sequence[ModuleReport]] = {}
    with comparisons(request, ui) as found:
        for comparison in found:
            reports += _outputs(comparison, request, ui)
            if bisect:
                modules[comparison.name] = _modules(comparison, ui)
        if script is not None:
            write_script(script, {c.name: c.model for c in found}, reports, _rtx(request.artifact, found))
    return Validated(reports, modules, found[0].against)


def _rtx(folder: Path, found: Sequence[Comparison]) -> RtxGraph | None:
    """What an engine of TensorRT-RTX is built of; None where the artifact was not compiled for it."""
    artifact = Artifact.load(folder)
    file = artifact.manifest["targets"].get("trt-rtx")
    mine = next((c for c in found if c.name == file), None)
    if mine is None:
        return None
    profiles = signature_of(artifact, TARGETS["trt-rtx"]).profiles
    limit = tolerance_of(mine.format, mine.dtype)
    return RtxGraph(mine.name, profiles[0] if profiles else None, limit)


def _outputs(comparison: Comparison, request: ValidateRequest, ui: Reporter) -> list[ShapeReport]:
    """The reports of one model at all seeds.

    The outputs of another target show how far its roundings go; that the graph is right shows in ONNX Runtime on the
    CPU, which can run it without them. So the target "ort" always runs.
    """
    reports: list[ShapeReport] = []
    for seed in comparison.seeds:
        for target in dict.fromkeys(("ort", request.target)):
            where = "" if target == "ort" else f" in {target}"
            with ui.stage(f"validate {comparison.name}{where} against {comparison.against}") as update:
                if target == "ort" and comparison.against != "ort":
                    reports += comparison.validate_graph(seed, request.limit, update)
                    continue
                with _session(comparison, request.artifact, target) as session:
                    name = f"{target}, {comparison.dtype}"
                    reports += comparison.validate_session(name, session, seed, request.limit, update)
    return [replace(report, model=comparison.name) for report in reports]


def _modules(comparison: Comparison, ui: Reporter) -> Sequence[ModuleReport]:
    with ui.stage(f"examine {comparison.name} module by module") as update:
        return compare_modules(
            comparison.model,
            comparison.reference,
            format=comparison.format,
            shape=comparison.shapes[0],
            seed=comparison.seeds[0],
            update=update,
        )


class LoadedSession:
    """A backbone of `diffc.load` as a session over arrays: it runs what a pipeline runs."""

    def __init__(self, backbone: CompiledBackbone, family: Family, interface: Interface | None = None):
        self._backbone, self._spec, self._names = backbone, family, interface

    def run(self, feed: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name, in float32."""
        device = self._backbone.device
        values = {n: torch.from_numpy(np.asarray(a, np.float32)).to(device) for n, a in feed.items()}
        if self._names is not None:
            values = {own: values[name] for own, name in self._names.inputs.items()}
        kwargs = forward_kwargs(self._spec, self._backbone.config, values)
        found = self._backbone(**kwargs, return_dict=False)
        names = [item.name for item in self._spec.outputs(self._backbone.config)]
        if self._names is not None:
            names = [self._names.outputs[name] for name in names]
        return {n: np.asarray(out.float().cpu().numpy()) for n, out in zip(names, found, strict=True)}


@contextmanager
def _session(comparison: Comparison, artifact: Path, target: str) -> Iterator[Session]:
    """The model as a user of the target runs it: with all optimizations of the runtime."""
    if target != "ort":
        with load_runtime(artifact, target=target) as backbone:
            manifest = Artifact.load(artifact).manifest
            family = family_of_manifest(manifest["model"])
            yield LoadedSession(backbone, family, Interface.of_manifest(manifest))
        return
    if not runs_on_cpu(comparison.model):
        raise UnsupportedError(
            f"{comparison.name} computes in bfloat16, and ONNX Runtime has no bfloat16 arithmetic on the CPU",
            fix="compare its float32 copy with another graph: --against ARTIFACT or FILE.onnx",
        )
    with TemporaryDirectory(prefix="diffc-") as folder:
        save(emulated(comparison.model), Path(folder) / "model.onnx")
        with OrtSession(Path(folder) / "model.onnx") as session:
            yield session


@contextmanager
def comparisons(request: ValidateRequest, ui: Reporter) -> Iterator[list[Comparison]]:
    """The models of the artifact, each with its reference; references are freed at the end."""
    artifact = Artifact.load(request.artifact)
    files = _files(artifact, request.target)
    with ui.stage("hash the files"):
        artifact.verify()
    if artifact.missing:
        ui.note(f"not in this copy, and not checked: {', '.join(_by_folder(artifact.missing))}")
    with ExitStack() as stack:
        yield list(_comparisons(artifact, files, request, stack, ui))


def _by_folder(names: Sequence[str]) -> list[str]:
    """Names of files for people: those of one folder as the folder and their number."""
    folders = Counter(str(PurePosixPath(name).parent) for name in names)
    return [f"{folder}/ ({count} files)" for folder, count in folders.items() if folder != "."] + [
        name for name in names if "/" not in name
    ]


def _comparisons(
    artifact: Artifact, files: Sequence[str], request: ValidateRequest, stack: ExitStack, ui: Reporter
) -> Iterator[Comparison]:
    against = _against(artifact, request.against, ui)
    seeds = request.seeds or (int(artifact.manifest.get("request", {}).get("seed", 0)) + 1,)
    family = artifact.manifest["model"].get("family", "")
    torch_reference: TorchReference | None = None
    for name in files:
        model = load(artifact.present(name))
        format, dtype = format_and_dtype(artifact, model)
        shapes = shapes_of(artifact, model, request.shapes, request.target)
        reference: TorchReference | GraphReference
        if against == "torch":
            with (
                ui.stage("load the torch model") as update,
                quiet_libraries(),
                estimated(update, _LOADING),
            ):
                torch_reference = torch_reference or torch_reference_of(artifact, request.model, request.hub)
            reference = torch_reference
        else:
            reference = graph_reference(artifact, model, against, format, dtype)
            stack.callback(reference.close)
        yield Comparison(name, model, reference, format, dtype, shapes, seeds, against, family)


def _against(artifact: Artifact, against: str | None, ui: Reporter) -> str:
    """What to compare with. Raises DiffcError for torch where there is no torch model."""
    if not is_imported(artifact):
        return against or "torch"
    if against == "torch":
        raise DiffcError(
            f"{artifact.folder} was compiled from an ONNX file: there is no torch model to compare it with",
            fix=f"compare it with the file: --against {shlex.quote(str(artifact.manifest['model']['name']))}",
        )
    if against is None:
        ui.note(
            "compiled from an ONNX file: compared with its own graph in float32. --against FILE.onnx says more"
        )
    return against or "ort"


def _files(artifact: Artifact, target: str) -> list[str]:
    """The models that `target` runs. Raises DiffcError for an unknown target, and for one without a model here."""
    files: dict[str, str] = artifact.manifest["targets"]
    if target == "ort":
        TARGETS["ort"].require()
        return sorted(set(files.values()), key=lambda name: (len(name), name))
    taken = "tensorrt" if target == "ort-tensorrt" else target
    find_target(taken)
    if taken not in files:
        raise DiffcError(
            f"{artifact.folder} was not compiled for {taken}, but for {', '.join(files)}",
            fix=f"compile with --target {taken}",
        )
    return [files[taken]]
