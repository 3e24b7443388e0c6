"""The layers of an engine's network by kind and precision, from what the builder left beside the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from msgspec import Struct

from diffc.artifact.files import listed
from diffc.artifact.folder import AGAIN, Artifact
from diffc.records import read_record


class _Tensor(Struct):
    name: str
    precision: str
    shape: list[int] | None = None


class _Layer(Struct):
    name: str
    type: str
    inputs: list[_Tensor]
    outputs: list[_Tensor]


class _Network(Struct):
    layers: list[_Layer]


@dataclass(frozen=True)
class EngineLayer:
    """A layer of the parsed network, with the precisions that it reads and gives."""

    name: str
    type: str
    reads: str
    gives: str


@dataclass(frozen=True)
class Engine:
    """An engine of the artifact; `entry` is the manifest's, `layers` is empty where this copy has no account of it."""

    entry: Mapping[str, Any]
    bytes: int
    layers: Sequence[EngineLayer]

    @property
    def kinds(self) -> list[tuple[EngineLayer, int]]:
        """How many layers there are of each type and precision, the most first."""
        counted = Counter(EngineLayer("", layer.type, layer.reads, layer.gives) for layer in self.layers)
        return counted.most_common()


def engines_of(artifact: Artifact) -> list[Engine]:
    """The engines that the manifest names, also those that this copy lacks. Raises DiffcError for a damaged account."""
    sizes = artifact.manifest["files"]
    return [
        Engine(e, sizes[e["file"]]["bytes"], _layers(artifact, e["file"]))
        for e in artifact.manifest["engines"]
    ]


def _layers(artifact: Artifact, file: str) -> list[EngineLayer]:
    name = str(PurePosixPath(file).with_suffix(".network.json"))
    if name not in artifact.manifest["files"] or name in artifact.missing:
        return []
    found = read_record(listed(artifact.folder, artifact.manifest, name), _Network, fix=AGAIN)
    return [
        EngineLayer(layer["name"], layer["type"], _precisions(layer["inputs"]), _precisions(layer["outputs"]))
        for layer in found["layers"]
    ]


def _precisions(tensors: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(str(tensor["precision"]) for tensor in tensors))
