"""The engines of a compile: one per target and compute capability."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffc.backends.profile import Profile
from diffc.backends.target import EngineOptions, Target
from diffc.backends.tensorrt.build import EngineReport, EngineRequest, build_engine
from diffc.backends.tensorrt.epcontext import write_context
from diffc.compile.graphs import Graphs
from diffc.models.family import Family
from diffc.models.profiles import ShapeProfile
from diffc.models.sizes import Dims
from diffc.progress import Reporter


def engine_profile(dims: Dims, family: Family, shapes: ShapeProfile) -> Profile:
    """The shapes that an engine is built for, of a graph whose inputs have `dims`."""
    bounds = (shapes.minimum, shapes.optimum, shapes.maximum)
    return Profile.of_dims(dims, *(family.sizes(shape) for shape in bounds))


def build_engines(
    graphs: Graphs,
    targets: Sequence[Target],
    sms: Sequence[int],
    options: EngineOptions,
    profiles: tuple[Profile, ...],
    folder: Path,
    ui: Reporter,
    *,
    suffix: str = "",
) -> list[EngineReport]:
    """Engines in `folder`/engines, each of the file of `graphs` that its target takes; `suffix` ends their names."""
    engines = []
    for target in (t for t in targets if t.is_engine):
        (folder / "engines").mkdir(exist_ok=True)
        for group in [(sm,) for sm in sms] if target.ahead_of_time else [()]:
            name = target.name + "".join(f"-sm{sm}" for sm in group) + suffix
            output = folder / "engines" / f"{name}.engine"
            model_file = folder / graphs.files[target.name]
            request = EngineRequest(target.name, model_file, output, group, profiles, options)
            with ui.stage(f"build {name}") as update:
                report = build_engine(request, on_progress=lambda _, done, total: update(done, total))
            engines.append(report)
            for sm in group if report.weights is None else ():  # an EPContext node has no weights to give
                model = graphs.models[graphs.files[target.name]]
                write_context(model, output, version=report.version, sm=sm)
            ui.note(_size(report))
    return engines


def _size(report: EngineReport) -> str:
    """What the user reads of an engine: its size, and the memory that its builder took."""
    memory = "" if report.peak_rss is None else f", builder's peak {report.peak_rss / 1e9:.1f} GB"
    return f"{report.nbytes / 1e6:.1f} MB, {report.layers} layers{memory}"
