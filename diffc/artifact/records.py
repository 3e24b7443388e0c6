"""What an artifact keeps of its own making: what each pass did and why it declined, and how long each stage took.

records/passes.json   the same for equal compiles, and hashed like every other file
records/run.json      seconds and memory, which no two compiles share; the manifest does not list it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from diffc.artifact.files import listed
from diffc.artifact.folder import AGAIN, RUN, Artifact
from diffc.records import Count, Seconds, read_record
from passes.files.atomic import write_text
from passes.files.contained import why_outside

if TYPE_CHECKING:
    from passes.pipeline import PassRecord

PASSES = "records/passes.json"
_SCHEMA = 1


class Refused(Struct):
    """A reason for which a pass declined, and the nodes where it did."""

    reason: str
    nodes: list[str]


class PassEntry(Struct):
    """What a pass did to the graph of a target; `graph` is empty for the passes that all targets share."""

    name: str
    graph: str
    changed: Count
    nodes_before: Count
    nodes_after: Count
    notes: list[str]
    refused: list[Refused]
    check: str


class Passes(Struct):
    """records/passes.json."""

    schema: Count
    passes: list[PassEntry]


class Stage(Struct):
    """A stage: its seconds, and the most bytes that the process held while it ran (None where nothing says)."""

    title: str
    seconds: Seconds
    memory: Count | None = None


class Run(Struct):
    """records/run.json: the stages in order, and the processes that built the engines.

    `request`: what was asked for, of a compile whose manifest does not say (that of an ONNX file).
    """

    schema: Count
    seconds: Seconds
    stages: list[Stage]
    builders: list[Stage] = []
    request: dict[str, Any] = {}


def save_passes(records: Sequence[PassRecord], folder: Path) -> None:
    """Write records/passes.json into the `folder` of an artifact that is being made."""
    entries = [_entry(record) for record in records]
    _write(folder / PASSES, {"schema": _SCHEMA, "passes": entries})


def _entry(record: PassRecord) -> dict[str, Any]:
    refused: dict[str, list[str]] = {}
    for refusal in record.refusals:
        refused.setdefault(refusal.reason, []).append(refusal.node)
    return {
        "name": record.name,
        "graph": record.graph,
        "changed": record.changed,
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "notes": list(record.notes),
        "refused": [{"reason": reason, "nodes": nodes} for reason, nodes in refused.items()],
        "check": record.check,
    }


def save_run(
    folder: Path,
    seconds: float,
    stages: Sequence[Mapping[str, Any]],
    builders: Sequence[Mapping[str, Any]],
    request: Mapping[str, Any] | None,
) -> None:
    """Write records/run.json into the `folder` of an artifact that is being made; entries as in `Stage`."""
    content = {"schema": _SCHEMA, "seconds": seconds, "stages": [*stages], "builders": [*builders]}
    content |= {} if request is None else {"request": dict(request)}
    _write(folder / RUN, content)


def read_passes(artifact: Artifact) -> list[dict[str, Any]]:
    """What the passes did, as `PassEntry`; empty in a copy without the file, and in artifacts of older versions.

    Raises DiffcError when the file is damaged.
    """
    if PASSES not in artifact.manifest["files"] or PASSES in artifact.missing:
        return []
    path = listed(artifact.folder, artifact.manifest, PASSES)
    entries: list[dict[str, Any]] = read_record(path, Passes, fix=AGAIN)["passes"]
    return entries


def read_run(artifact: Artifact) -> dict[str, Any] | None:
    """How the compile went, as `Run`; None where the artifact does not say. Raises DiffcError for a damaged file."""
    path = artifact.folder / RUN
    if why_outside(artifact.folder, RUN) or not path.is_file():
        return None
    return read_record(path, Run, fix=AGAIN)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
