"""The family of backbones that an ONNX file holds: which input is which, and the config.json that its graph tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import GraphProto, ModelProto, ValueInfoProto

from diffc.errors import DiffcError
from diffc.frontend.onnx_interface import family_of_interface
from diffc.models.family import Family
from diffc.models.sources.json_files import read_json
from diffc.models.spec import Config, GraphFacts, InputSpec

Dims = tuple[str | int, ...]


@dataclass(frozen=True)
class KnownInterface:
    """An ONNX file whose interface is a family's.

    `inputs` and `output` map the family's names to the file's, `dims` the file's dynamic dimensions to the family's.
    `fixed` are sizes of the family's dimensions that the file has fixed. `config` is what a config.json would say.
    """

    family: Family
    config: Config
    inputs: Mapping[str, str]
    output: str
    dims: Mapping[str, str]
    fixed: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The entry "interface" of a manifest."""
        return {
            "inputs": dict(self.inputs),
            "outputs": {self.family.output: self.output},
            "dims": dict(self.dims),
            "fixed": dict(self.fixed),
        }

    def ranges(self, by_file: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        """Ranges of the family's dimensions, from those of the file's; fixed ones have one size."""
        given = {self.dims[name]: sizes for name, sizes in by_file.items() if name in self.dims}
        return given | {name: (size, size, size) for name, size in self.fixed.items()}


def read_interface(model: ModelProto, path: Path, made: ModelProto | None = None) -> KnownInterface | None:
    """The family's interface of a file that was read from `path`; None where it is none, or is several.

    `made` is what was compiled of it, whose output has a known width. A config.json beside the file is taken when it
    is of that family and fits; otherwise `Family.config_of` reads the graph.
    """
    found = family_of_interface(model.graph)
    if found is None or len(model.graph.output) != 1:
        return None
    family, specs = found
    dims = _dimensions(model.graph.input, specs)
    if dims is None:
        return None
    named, fixed = dims
    facts = _facts(model.graph, specs, (made or model).graph.output[0])
    config = _beside(path, family, facts) or _told(family, facts)
    if config is None:
        return None
    inputs = {spec.name: value.name for spec, value in zip(specs, model.graph.input, strict=True)}
    return KnownInterface(family, config, inputs, model.graph.output[0].name, named, fixed)


def _dims(value: ValueInfoProto) -> Dims:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def _dimensions(
    values: Sequence[ValueInfoProto], specs: Sequence[InputSpec]
) -> tuple[dict[str, str], dict[str, int]] | None:
    """The family's names of the file's dynamic dimensions, and what is fixed; None where they contradict each other.

    Times have the batch, one number or an axis of their own, which follows the batch.
    """
    named: dict[str, str] = {}
    fixed: dict[str, int] = {}
    for value, spec in zip(values, specs, strict=True):
        if len(spec.dims) < 2:
            named |= {d: "batch" for d in _dims(value) if isinstance(d, str) and d not in named}
            continue
        for theirs, ours in zip(_dims(value), spec.dims, strict=True):
            if isinstance(ours, str) and isinstance(theirs, str):
                if named.setdefault(theirs, ours) != ours:
                    return None
            elif isinstance(ours, str) and fixed.setdefault(ours, int(theirs)) != theirs:
                return None
    return named, {name: size for name, size in fixed.items() if name not in named.values()}


def _facts(graph: GraphProto, specs: Sequence[InputSpec], output: ValueInfoProto) -> GraphFacts:
    inputs = {spec.name: _dims(value) for spec, value in zip(specs, graph.input, strict=True)}
    return GraphFacts(inputs, _dims(output), {t.name: tuple(t.dims) for t in graph.initializer})


def _told(family: Family, facts: GraphFacts) -> Config | None:
    """What the graph tells, under the class's name; None where it is not of the family."""
    if family.config_of is None:
        return None
    try:
        config = {"_class_name": family.backbone_class, **family.requires, **family.config_of(facts)}
    except LookupError:
        return None
    return config if _fits(family, config, facts) else None


def _beside(path: Path, family: Family, facts: GraphFacts) -> Config | None:
    """The config.json in the folder of the file, where it describes this graph."""
    file = path.parent / "config.json"
    if not file.is_file():
        return None
    try:
        config = read_json(file)
        same = config.get("_class_name") == family.backbone_class
        return config if same and _fits(family, config, facts) else None
    except (DiffcError, LookupError):
        return None


def _fits(family: Family, config: Config, facts: GraphFacts) -> bool:
    """Whether the inputs of a backbone with this config have the fixed sizes of the file."""
    wanted = family.input_dims(config)
    return wanted.keys() == facts.inputs.keys() and all(
        not isinstance(ours, int) or ours == theirs
        for name, dims in facts.inputs.items()
        if len(wanted[name]) > 1
        for ours, theirs in zip(wanted[name], dims, strict=True)
    )
