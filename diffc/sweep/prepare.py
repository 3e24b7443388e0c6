"""Every cell before any work: what it needs and shares, or the one message that says why it cannot be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffc.artifact.folder import MANIFEST, Artifact
from diffc.compile.estimate import memory_needed
from diffc.compile.keys import calibration_key, key_of
from diffc.compile.manifest import described_request
from diffc.compile.plan import check
from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError, UnsupportedError, UsageError
from diffc.sweep.cells import Cell
from diffc.sweep.request import SweepRequest
from diffc.sweep.rows import FAILED, REFUSED, Row
from diffc.sweep.store import Store, stored_manifest
from passes.base import PassError


@dataclass(frozen=True)
class Ready:
    """A cell that can be compiled. `needs`: bytes; `graph`: cells of one value share all but their engines.

    `calibration`: the key of the calibration that it makes, empty where it makes none. `described` and `fingerprint`
    are those of its request and model as a manifest has them.
    """

    cell: Cell
    request: CompileRequest
    needs: int
    graph: str
    calibration: str
    dtype: str
    described: Mapping[str, Any]
    fingerprint: str


def prepare(sweep: SweepRequest, cells: Sequence[Cell]) -> list[Ready | Row]:
    """Each cell as it can be compiled, or the row that says why it cannot be, in the order of `cells`.

    Raises the error itself where every cell has the same one.
    """
    found: list[Ready | Row] = []
    errors: list[DiffcError | PassError] = []
    for cell in cells:
        try:
            found.append(_ready(sweep, cell))
        except (DiffcError, PassError) as error:
            errors.append(error)
            found.append(refusal(cell, error))
    if len(errors) == len(cells) and len({str(error) for error in errors}) == 1:
        raise errors[0]
    return found


def refusal(cell: Cell, error: DiffcError | PassError) -> Row:
    """The row of a cell that cannot be: "refused" where hardware or compiler lack it, else "failed"."""
    status = REFUSED if isinstance(error, UnsupportedError) else FAILED
    return row_of(cell, "", status=status, message=str(error))


def row_of(cell: Cell, dtype: str, **values: Any) -> Row:
    """A row of `cell` with these values."""
    return Row(
        cell=cell.name,
        model=cell.model,
        format=cell.format,
        sm=cell.sm,
        cache_plan=cell.cache_plan,
        loras=list(cell.loras),
        dtype=dtype,
        **values,
    )


def _ready(sweep: SweepRequest, cell: Cell) -> Ready:
    if cell.model.endswith(".onnx"):
        raise UsageError(
            f"{cell.model} is no diffusers model, which a sweep is of", fix="compile it by itself"
        )
    request = cell.request(sweep.base, sweep.folder)
    # What lies at the place of the artifact is looked at by `finished`.
    plan = check(replace(request, force=True, output=sweep.folder / f".{cell.name}.new"))
    plan = replace(plan, request=replace(plan.request, output=request.output, force=sweep.force))
    return Ready(
        cell,
        plan.request,
        memory_needed(plan),
        key_of(replace(plan, request=replace(plan.request, sms=()))),
        calibration_key(plan) if plan.calibrates else "",
        plan.dtype,
        json.loads(json.dumps(described_request(plan), default=str)),
        plan.source.fingerprint,
    )


def finished(ready: Ready, store: Store | None) -> Mapping[str, Any] | None:
    """The manifest of the cell's artifact where it is there, whole and of this request; None where it is not.

    A local one is hashed; of a store the sizes are compared. Raises DiffcError for one of another request, unless the
    sweep replaces those.
    """
    place: object = ready.request.output
    if store is not None:
        place, manifest = store.address(ready.cell.name), stored_manifest(store, ready.cell.name)
    else:
        manifest = _local(ready.request.output)
    if manifest is None or _equal(manifest, ready):
        return manifest
    if ready.request.force:
        return None
    raise DiffcError(
        f"{place} is there, and was compiled from other options or another model",
        fix="choose another -o, or give --force to replace it",
    )


def _local(folder: Path) -> Mapping[str, Any] | None:
    """The manifest of a whole artifact; None where there is none, or where files of it were changed."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        artifact = Artifact.load(folder)
        artifact.verify()
    except DiffcError:
        return None
    return artifact.manifest


def _equal(manifest: Mapping[str, Any], ready: Ready) -> bool:
    same = dict(manifest.get("request", {})) == dict(ready.described)
    return same and manifest["model"].get("fingerprint") == ready.fingerprint
