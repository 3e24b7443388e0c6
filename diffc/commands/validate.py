"""`diffc validate`: an artifact, hashed and then run again, against torch or against another graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from diffc.artifact.folder import Artifact
from diffc.backends.onnx_graph import element_types
from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.backends.target import TARGETS, find_target
from diffc.cli.tables import IMPORTED
from diffc.compile.plan import CompileRequest, check
from diffc.errors import DiffcError, UnsupportedError
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import find_family
from diffc.models.sources.backbone import DTYPES
from diffc.progress import Reporter, Silent
from diffc.validate import torch_reference as fidelity
from diffc.validate.float32 import emulated, runs_on_cpu
from diffc.validate.modules import Bisection, require_no_finding
from diffc.validate.modules import bisect as modules_off
from diffc.validate.onnx_reference import Draw, GraphReference, draw_by_graph
from diffc.validate.reports import ShapeReport, Sizes, require_match
from diffc.validate.script import check_folder, write_script
from diffc.validate.shapes import fixed_batch, parse_graph_sizes, parse_shape
from diffc.validate.tolerances import tolerance_of
from passes.storage import load, save

if TYPE_CHECKING:
    from diffc.runtime.module import CompiledBackbone

AGAINST = ("torch", "ort")


@dataclass(frozen=True)
class ValidateRequest:
    """What to hold against what.

    `target` "ort" runs every model of the artifact on the CPU, exactly as the graph says; any other is one of
    `diffc.load`, and what it loads is run. `against`: "torch", "ort" (the artifact's own graph in float32 on the
    CPU), an artifact, or an .onnx file; None is torch where there is one. `model` is where the torch model lies
    now, None for where the compile found it. `shapes` are texts of --shape; none means the two of a compile.
    `seeds` likewise. `limit` takes the place of the tolerances.
    """

    artifact: Path
    target: str = "ort"
    against: str | None = None
    model: str | None = None
    shapes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    limit: float | None = None


@dataclass(frozen=True)
class Case:
    """One model of the artifact with all that a comparison needs."""

    name: str
    model: onnx.ModelProto
    reference: fidelity.Reference | GraphReference
    format: str
    dtype: str
    shapes: Sequence[Sizes]
    seeds: Sequence[int]
    against: str
    family: str = ""


@dataclass(frozen=True)
class Validated:
    """What `validate_artifact` found: the comparisons, the pieces if they were asked for, against what."""

    reports: Sequence[ShapeReport]
    bisections: Mapping[str, Sequence[Bisection]]
    against: str

    def require_match(self) -> None:
        """Raise MismatchError (exit code 3) naming the first module that is off, or else the first output.

        Modules by themselves are the sharper test: outputs can be within their limit, or beyond it by no more than
        roundings explain, with a module that is off.
        """
        fix = "compile again; if it differs again, report this with the command"
        for model, found in self.bisections.items():
            require_no_finding(found, model, against=self.against, fix=fix)
        require_match(
            self.reports,
            against=self.against,
            fix=fix if self.bisections else "find out where: give --bisect",
        )


def validate_artifact(
    request: ValidateRequest, ui: Reporter | None = None, *, bisect: bool = False, script: Path | None = None
) -> Validated:
    """The comparisons of every model, seed and shape; see `Validated.require_match`.

    `bisect`: every module by itself too, at the first shape and seed. `script` is a folder to write what `polygraphy
    run` repeats the comparisons with. Raises DiffcError when a file of the artifact was changed, when there is
    nothing to hold it against, or when the target does not run on this machine.
    """
    ui = ui or Silent()
    if script is not None:
        check_folder(script)
    reports: list[ShapeReport] = []
    bisections: dict[str, Sequence[Bisection]] = {}
    with cases(request, ui) as found:
        for case in found:
            with ui.stage(f"validate {case.name} against {case.against}"):
                for seed in case.seeds:
                    reports += [replace(r, model=case.name) for r in _compare(case, request, seed)]
            if bisect:
                bisections[case.name] = _bisect(case, ui)
        if script is not None:
            write_script(script, {case.name: case.model for case in found}, reports)
    return Validated(reports, bisections, found[0].against)


def _bisect(case: Case, ui: Reporter) -> Sequence[Bisection]:
    with ui.stage(f"examine {case.name} module by module") as update:
        return modules_off(
            case.model,
            case.reference,
            format=case.format,
            shape=case.shapes[0],
            seed=case.seeds[0],
            update=update,
        )


class LoadedSession:
    """A backbone of `diffc.load` as a session over arrays: what runs is what a pipeline runs."""

    def __init__(self, backbone: CompiledBackbone, family: str):
        self._backbone, self._spec = backbone, find_family(family)

    def run(self, feed: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The output by name, in float32."""
        device = self._backbone.device
        values = {n: torch.from_numpy(np.asarray(a, np.float32)).to(device) for n, a in feed.items()}
        kwargs = forward_kwargs(self._spec, self._backbone.config, values)
        (sample,) = self._backbone(**kwargs, return_dict=False)
        return {self._spec.output: np.asarray(sample.float().cpu().numpy())}


def _compare(case: Case, request: ValidateRequest, seed: int) -> list[ShapeReport]:
    if request.target == "ort" and case.against != "ort":
        return fidelity.validate(
            case.model,
            case.reference,
            format=case.format,
            shapes=case.shapes,
            seed=seed,
            limit=request.limit,
        )
    limit = request.limit or tolerance_of(case.format, case.dtype)
    # How far roundings go is measured at the outputs of a runtime; that the graph is right is shown without them.
    graph = [] if request.target == "ort" else _compare(case, replace(request, target="ort"), seed)
    with _session(case, request) as session:
        return graph + fidelity.validate_session(
            f"{request.target}, {case.dtype}",
            case.model,
            session,
            case.reference,
            limit=limit,
            shapes=case.shapes,
            seed=seed,
        )


@contextmanager
def _session(case: Case, request: ValidateRequest) -> Iterator[fidelity.Session]:
    """The model as a user of the target runs it: with all that the runtime optimizes."""
    if request.target != "ort":
        from diffc.runtime.load import load as load_runtime

        with load_runtime(request.artifact, target=request.target) as backbone:
            yield LoadedSession(backbone, case.family)
        return
    if not runs_on_cpu(case.model):
        raise UnsupportedError(
            f"{case.name} computes in bfloat16, and ONNX Runtime has no bfloat16 arithmetic on the CPU",
            fix="hold its float32 twin against another graph: --against ARTIFACT or FILE.onnx",
        )
    with TemporaryDirectory(prefix="diffc-") as folder:
        save(emulated(case.model), Path(folder) / "model.onnx")
        with OrtSession(Path(folder) / "model.onnx") as session:
            yield session


@contextmanager
def cases(request: ValidateRequest, ui: Reporter) -> Iterator[list[Case]]:
    """The models of the artifact with their reference; closing it frees the reference."""
    artifact = Artifact.load(request.artifact)
    files = _files(artifact, request.target)
    with ui.stage("hash the files"):
        artifact.verify()
    with ExitStack() as stack:
        yield list(_cases(artifact, files, request, stack, ui))


def _cases(
    artifact: Artifact, files: Sequence[str], request: ValidateRequest, stack: ExitStack, ui: Reporter
) -> Iterator[Case]:
    imported = artifact.manifest["format"] == IMPORTED
    against = request.against or ("ort" if imported else "torch")
    if imported and against == "torch":
        raise DiffcError(
            f"{artifact.folder} was compiled from an ONNX file: there is no torch model to hold it against",
            fix=f"hold it against the file: --against {artifact.manifest['model']['name']}",
        )
    if imported and request.against is None:
        ui.note(
            "compiled from an ONNX file: held against its own graph in float32. --against FILE.onnx says more"
        )
    torch_reference = None
    for name in files:
        model = load(artifact.folder / name)
        format, dtype = _kind(artifact, model)
        shapes = _shapes(artifact, model, request.shapes)
        seeds = request.seeds or (int(artifact.manifest.get("request", {}).get("seed", 0)) + 1,)
        reference: fidelity.Reference | GraphReference
        if against == "torch":
            with ui.stage("load the torch model"):
                torch_reference = torch_reference or torch_reference_of(artifact, request.model)
            reference = torch_reference
        else:
            other = model if against == "ort" else load(_other(Path(against)))
            quantized = against != "ort" and format != "none"
            graph = GraphReference(other, dtype, _draw(artifact, model, dtype), quantized=quantized)
            stack.callback(graph.close)
            reference = graph
        family = artifact.manifest["model"].get("family", "")
        yield Case(name, model, reference, format, dtype, shapes, seeds, against, family)


def torch_reference_of(artifact: Artifact, model: str | None = None) -> fidelity.Reference:
    """The fake-quantized torch model that the artifact was compiled from, rebuilt from its manifest.

    Raises DiffcError when the model is not where it was, or is another one now.
    """
    from diffc.compile.calibration import given

    manifest = artifact.manifest
    quantized = (artifact.folder / "checkpoint").is_dir()
    plan = check(
        CompileRequest(
            model or manifest["request"]["model"],
            artifact.folder,
            format=manifest["format"],
            dtype=manifest["dtype"],
            from_checkpoint=artifact.folder / "checkpoint" if quantized else None,
            force=True,  # nothing is written
        )
    )
    if dict(plan.source.config) != dict(manifest["model"]["config"]):
        raise DiffcError(
            f"{plan.source.path} is another model than the one that {artifact.folder} was compiled from:"
            " its config.json differs",
            fix="name the model: --model FOLDER",
        )
    return fidelity.Reference(plan.source, plan.dtype, given(plan) if quantized else None)


def _files(artifact: Artifact, target: str) -> list[str]:
    """The models that `target` runs. Raises DiffcError for a target that is not validated, or has no model here."""
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


def _kind(artifact: Artifact, model: onnx.ModelProto) -> tuple[str, str]:
    """The format and the compute type, or for an imported graph those of its kind: they name the tolerance."""
    manifest = artifact.manifest
    if manifest["format"] != IMPORTED:
        return manifest["format"], manifest["dtype"]
    types, weights = element_types(model), {t.name for t in model.graph.initializer}
    rounded = {n.op_type for n in model.graph.node if n.input and n.input[0] not in weights}
    format = "int8" if "QuantizeLinear" in rounded else "none"
    if any(op.startswith("TRT_") and "DynamicQuantize" in op for op in rounded):
        format = "nvfp4"
    for dtype, number in (("float16", onnx.TensorProto.FLOAT16), ("bfloat16", onnx.TensorProto.BFLOAT16)):
        if number in types:
            return format, dtype
    return format, "float32"


def _shapes(artifact: Artifact, model: onnx.ModelProto, texts: Sequence[str]) -> Sequence[Sizes]:
    manifest = artifact.manifest
    if manifest["format"] == IMPORTED:
        wanted = [(text, 2) for text in texts] or [("", 2), ("", 4)]
        return [parse_graph_sizes(text, model, default) for text, default in wanted]
    spec, config = find_family(manifest["model"]["family"]), manifest["model"]["config"]
    batch = fixed_batch(model)
    usual = fidelity.usual_shapes(spec, config, batch)
    shapes = tuple(parse_shape(text, spec, config, usual[0]) for text in texts) or usual
    if other := next((s for s in shapes if batch not in (None, s.batch)), None):
        raise DiffcError(
            f"shape ({other}): {artifact.folder} was compiled for a batch of {batch}",
            fix=f"use --shape batch={batch},..., or compile with --profile batch=min:opt:max",
        )
    return shapes


def _draw(artifact: Artifact, model: onnx.ModelProto, dtype: str) -> Draw:
    manifest = artifact.manifest
    if manifest["format"] == IMPORTED:
        return draw_by_graph(model)
    spec, config = find_family(manifest["model"]["family"]), manifest["model"]["config"]

    def draw(shape: Any, seed: int) -> dict[str, torch.Tensor]:
        return random_inputs(spec, config, shape, dtype=DTYPES[dtype], seed=seed)

    return draw


def _other(path: Path) -> Path:
    """The model of an artifact, or an .onnx file. Raises DiffcError that says what --against can be."""
    if path.suffix == ".onnx" and path.is_file():
        return path
    if path.is_dir():
        other = Artifact.load(path)
        other.verify()
        return other.model
    raise DiffcError(
        f"there is nothing to hold an artifact against at {path}",
        fix=f"give --against {', '.join(AGAINST)}, an artifact, or an .onnx file",
    )
