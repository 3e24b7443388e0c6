"""What a report says of one artifact, gathered from its files; nothing is computed that they do not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.artifact.folder import Artifact
from diffc.artifact.measured import errors_of, sizes_of
from diffc.artifact.records import read_passes, read_run
from diffc.report.command import command_of
from diffc.report.engines import Engine, engines_of
from diffc.report.layers import Layer, blocks_of, layers_of
from diffc.report.schedule import Schedule, schedule_of

if TYPE_CHECKING:
    from diffc.report.noise import LayerNoises


@dataclass(frozen=True)
class Subject:
    """An artifact with all that the report shows of it. `noise` is there where it was asked for."""

    name: str
    artifact: Artifact
    passes: Sequence[Mapping[str, Any]]
    run: Mapping[str, Any] | None
    layers: Sequence[Layer]
    engines: Sequence[Engine]
    schedule: Schedule | None
    noise: LayerNoises | None = field(default=None)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest."""
        return self.artifact.manifest

    @property
    def title(self) -> str:
        """Model, format, compute type, and whether it has a cache plan."""
        dtype = self.manifest.get("dtype", "")
        parts = [f"{self.manifest['format']} in {dtype}" if dtype else self.manifest["format"]]
        parts += ["cached"] * ("cache" in self.manifest)
        return ", ".join([self.manifest["model"]["name"], *parts])

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of files by kind, and of "all" (`sizes_of`)."""
        return sizes_of(self.manifest)

    @property
    def errors(self) -> dict[str, float]:
        """The largest relative L2 error against torch, by what ONNX Runtime computed in."""
        return errors_of(self.manifest)

    @property
    def request(self) -> Mapping[str, Any]:
        """What was asked for: of an imported file from records/run.json, since its manifest has no request."""
        found: Mapping[str, Any] = self.manifest.get("request") or (self.run or {}).get("request") or {}
        return found

    @property
    def command(self) -> str:
        """The command line that repeats the compile; empty where the artifact does not hold the request."""
        if not self.request or "object" in self.manifest["model"]:
            return ""
        return command_of(self.request, self.name)


def subject_of(folder: Path) -> Subject:
    """Everything that the artifact in `folder` holds of itself.

    Raises DiffcError and PassError for a folder that is no artifact, and for damaged files.
    """
    artifact = Artifact.load(folder)
    layers = layers_of(artifact.present("model.onnx")) if "model.onnx" not in artifact.missing else []
    return Subject(
        folder.absolute().name,
        artifact,
        read_passes(artifact),
        read_run(artifact),
        layers,
        engines_of(artifact),
        schedule_of(artifact.manifest, blocks_of(layers)),
    )
