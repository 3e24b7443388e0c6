"""The fields of manifest.json that readers rely on, with their types; older versions wrote no others in other forms."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from diffc.records import Count, Positive, Text

Dimension = Annotated[int, Meta(ge=0, le=2**53)] | str
Ranges = list[list[Positive]]


class File(Struct):
    """What is known of a file: its size and its SHA-256."""

    bytes: Count
    sha256: str


class Value(Struct):
    """An input or output of a graph."""

    name: Text
    dtype: Text
    dims: list[Dimension]


class Engine(Struct):
    """An engine of TensorRT: its file, and the GPUs that it is for."""

    file: Text
    target: Text
    version: str
    sms: list[Count]
    weights: Text | msgspec.UnsetType = msgspec.UNSET


class Model(Struct):
    """What was compiled; `family` and `config` are there for all but plain ONNX files."""

    name: str
    family: Text | msgspec.UnsetType = msgspec.UNSET
    config: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    captured: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    object: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    revision: str | msgspec.UnsetType = msgspec.UNSET
    fingerprint: str | msgspec.UnsetType = msgspec.UNSET
    bytes: Count | msgspec.UnsetType = msgspec.UNSET
    loras: list[Lora] | msgspec.UnsetType = msgspec.UNSET


class Lora(Struct):
    """A LoRA that was fused."""

    file: str
    path: str
    sha256: str
    weight: float
    patterns: list[tuple[str, float]] = []


class Request(Struct):
    """Of the request: what another command takes from it."""

    model: Text | msgspec.UnsetType = msgspec.UNSET
    seed: Count | msgspec.UnsetType = msgspec.UNSET
    hub: dict[str, str | None] | msgspec.UnsetType = msgspec.UNSET


class Shape(Struct, forbid_unknown_fields=True):
    """A shape of images and prompts."""

    batch: Positive
    height: Positive
    width: Positive
    text: Positive
    frames: Positive = 1


class Profile(Struct):
    """The smallest, the usual and the largest shape."""

    minimum: Shape
    optimum: Shape
    maximum: Shape


class InputRanges(Struct):
    """The profile of an ONNX file: smallest, usual and largest shape of every input."""

    inputs: dict[str, Ranges]


class CachedModel(Struct):
    """One of the models of a cache plan."""

    suffix: str
    files: dict[str, Text]
    inputs: list[Value]
    outputs: list[Value]
    reuse: list[Count] | None = None


class Cache(Struct):
    """What a compile with a cache plan adds."""

    models: list[CachedModel]
    plan: dict[str, Any]
    layout: str | None = None


class Interface(Struct):
    """The names of a family -> those of an imported file."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    dims: dict[str, str]
    fixed: dict[str, Any] = {}


class Slots(Struct):
    """The slots of `--lora-slots`."""

    rank: Positive
    files: dict[str, Text]
    layers: dict[str, list[Count]]
    parameters: dict[str, list[Count]]


class PassEntry(Struct):
    """What a pass did."""

    name: str
    changed: int
    check: str
    notes: list[str] = []


class Manifest(Struct):
    """manifest.json of an artifact."""

    schema: Positive
    files: dict[str, File]
    model: Model
    format: Text
    targets: dict[str, Text]
    inputs: Annotated[list[Value], Meta(min_length=1)]
    outputs: Annotated[list[Value], Meta(min_length=1)]
    profile: Profile | list[InputRanges]
    engines: list[Engine]
    validation: list[dict[str, Any]] = []
    passes: list[PassEntry] = []
    versions: dict[str, str] = {}
    dtype: Text | msgspec.UnsetType = msgspec.UNSET
    diffc: str | msgspec.UnsetType = msgspec.UNSET
    request: Request | msgspec.UnsetType = msgspec.UNSET
    cache: Cache | msgspec.UnsetType = msgspec.UNSET
    interface: Interface | msgspec.UnsetType = msgspec.UNSET
    lora_slots: Slots | msgspec.UnsetType = msgspec.UNSET
    checkpoint: dict[str, int | list[str]] | msgspec.UnsetType = msgspec.UNSET
    left_out: list[str] = []
