"""A compile for other GPUs: of a compile that has just been made, all but its engines is taken over.

The artifact is, byte by byte, that of a compile of its own. Its model, its weights, its calibration and the comparison
with torch do not depend on the compute capabilities that engines are built for.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from diffc.artifact.folder import staging
from diffc.compile.keys import key_of
from diffc.compile.plan import check
from diffc.compile.recorded import Recorded
from diffc.compile.request import CompileRequest, CompileResult
from diffc.compile.spine import Made, finish, result_of
from diffc.errors import UsageError
from diffc.progress import Reporter, Update


def compile_for_others(made: Made, folder: Path, request: CompileRequest, ui: Reporter) -> CompileResult:
    """Compile `request`, which differs from that of `made` in its compute capabilities and output alone.

    `folder` is the finished artifact of `made`. Raises what a compile raises.
    """
    first = made.plan.request
    if replace(request, sms=first.sms, output=first.output, force=first.force) != first:
        raise UsageError(
            "two compiles that share a graph differ in more than their GPUs", fix="compile each by itself"
        )
    plan = check(request)
    if plan.source.fingerprint != made.plan.source.fingerprint:
        raise UsageError(f"{plan.source.name} has changed during the compile", fix="compile again")
    recorded = Recorded(ui)
    with staging(request.output, force=request.force, key=key_of(plan), note=ui.note) as partial:
        with recorded.stage(f"take over {len(made.files)} files") as update:
            _copy(folder, made.files, partial, update)
        written, engines = finish(plan, made, partial, recorded)
    return result_of(plan, made, written, engines)


def _copy(source: Path, names: tuple[str, ...], folder: Path, update: Update) -> None:
    for number, name in enumerate(names, 1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
        update(number, len(names))
