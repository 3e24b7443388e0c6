"""A model family as one value: the backbone's interface, what stays unquantized, and what its pipelines expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffc.errors import UsageError
from diffc.models.interface import Interface, Output
from diffc.models.nested import Path
from diffc.models.spec import Config, DimSpec, GraphFacts, InputSpec, Shape


@dataclass(frozen=True)
class Optimum:
    """How optimum-onnx runs a family: its pipeline class, and the types it feeds where they are not the graph's own."""

    pipeline: str
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Everything that diffc knows about a family of backbones; nothing else in diffc asks for a family's name.

    Which backbones belong to it: those of the diffusers class `backbone_class` whose config.json has the entries
    `requires`. `component` is their name in a pipeline. `completed` is given config.json and model_index.json (None for
    a backbone alone) and returns the config that all else is given: with what only the pipeline tells. It raises
    UnsupportedError for an entry that adds an input which the family does not have.

    Interface of the graph, each given a config.json: `inputs` in graph order, the dimensions of the one `output`,
    the dynamic dimensions `dims`; `sizes` turns a Shape into the sizes of these. Height and width must be multiples
    of `pixel_multiple`. `native` is the shape that the backbone was trained for.

    Quantization: `unquantized` is a regular expression, matched from the start of a module path; `calibration` holds
    arguments of the pipeline's call.

    Running: `output_class` is the "module:class" of what diffusers' forward() returns. `attributes` are those that
    pipelines read from the backbone beside its config, by dotted path. `cache_plans` names the presets of
    `diffc.cache` that suit it. `optimum` is None where optimum-onnx has no pipeline for it.

    Imports: `config_of` gives the entries of config.json that an ONNX file tells, and those of released models
    where it does not; it raises LookupError for a file that is none of the family. None: it takes no file.

    Of a family that no file describes (`diffc.models.captured`): `interface` is what it was made from. `constants` are
    arguments of forward() that the graph has no input for, `tuples` the places of lists that are tuples, `lists` the
    arguments that are lists of one tensor per image (`diffc.models.lists`). `frames` are the step and the rest of
    numbers of frames, None for images.
    """

    name: str
    backbone_class: str
    component: str
    inputs: Callable[[Config], tuple[InputSpec, ...]]
    output: str
    output_dims: Callable[[Config], tuple[str | int, ...]]
    dims: Callable[[Config], tuple[DimSpec, ...]]
    sizes: Callable[[Shape], dict[str, int]]
    pixel_multiple: Callable[[Config], int]
    native: Callable[[Config], Shape]
    unquantized: str
    calibration: Mapping[str, Any]
    output_class: str
    requires: Mapping[str, Any] = field(default_factory=dict)
    completed: Callable[[Config, Mapping[str, Any] | None], Config] = lambda config, _: config
    attributes: Callable[[Config], Mapping[str, Any]] = lambda _: {}
    cache_plans: tuple[str, ...] = ()
    optimum: Optimum | None = None
    config_of: Callable[[GraphFacts], dict[str, Any]] | None = None
    constants: tuple[tuple[Path, Any], ...] = ()
    tuples: tuple[Path, ...] = ()
    lists: Mapping[str, bool] = field(default_factory=dict)
    frames: tuple[int, int] | None = None
    interface: Interface | None = None

    def __str__(self) -> str:
        return self.name

    def check(self, config: Config, shape: Shape) -> Shape:
        """`shape` itself. Raises UsageError when this backbone cannot run it, and says what it can run."""
        multiple = self.pixel_multiple(config)
        if min(shape.batch, shape.height, shape.width, shape.text, shape.frames) < 1:
            raise UsageError(f"shape ({shape}) has a size below 1", fix="give sizes of 1 or more")
        for name in ("height", "width"):
            if getattr(shape, name) % multiple:
                raise UsageError(
                    f"{name} {getattr(shape, name)} px does not fit {self.name}",
                    fix=f"use a multiple of {multiple}",
                )
        self._check_frames(shape)
        sizes = self.sizes(shape)
        for dim in self.dims(config):
            if dim.maximum is not None and sizes[dim.name] > dim.maximum:
                raise UsageError(
                    f"{dim.name} is {sizes[dim.name]} at {shape}, and this model ends at {dim.maximum}",
                    fix="ask for a smaller image or fewer tokens",
                )
        return shape

    def _check_frames(self, shape: Shape) -> None:
        if self.frames is None:
            if shape.frames != 1:
                raise UsageError(
                    f"{self.name} makes images, not {shape.frames} frames", fix="leave frames out"
                )
            return
        step, rest = self.frames
        if shape.frames % step != rest % step:
            valid = f"{step} * n + {rest}" if rest else f"a multiple of {step}"
            raise UsageError(f"{shape.frames} frames do not fit {self.name}", fix=f"use {valid}")

    def video_frames(self, steps: int) -> int:
        """A valid number of frames: `steps` steps of the backbone's rule; 1 for images."""
        return 1 if self.frames is None else self.frames[0] * steps + self.frames[1]

    def input_shapes(self, config: Config, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shape of every graph input at `shape`, in graph order."""
        sizes = self.sizes(shape)
        return {
            i.name: tuple(sizes[d] if isinstance(d, str) else d for d in i.dims) for i in self.inputs(config)
        }

    def outputs(self, config: Config) -> tuple[Output, ...]:
        """All results of the graph, in order; families with a file have one."""
        if self.interface is not None:
            return self.interface.outputs
        return (Output(self.output, self.output_dims(config)),)

    def input_dims(self, config: Config) -> dict[str, tuple[str | int, ...]]:
        """The dimensions of every graph input, in graph order."""
        return {item.name: item.dims for item in self.inputs(config)}

    def tokens(self, config: Config, shape: Shape) -> int:
        """How many tokens the blocks of a transformer have for each image; of a UNet, those at its bottom."""
        multiple = self.pixel_multiple(config)
        return (shape.height // multiple) * (shape.width // multiple)


def misfits(family: Family, config: Config, other: Config) -> list[str]:
    """What the inputs of a backbone with the config `other` have otherwise than one with `config`; a line for each."""
    ours, theirs = family.input_dims(config), family.input_dims(other)
    wrong = [f"it has no {name}" for name in ours if name not in theirs]
    wrong += [f"it needs {name}" for name in theirs if name not in ours]
    for name in (name for name in ours if name in theirs):
        for here, there in zip(ours[name], theirs[name], strict=True):
            if here != there:
                wrong.append(f"{name} is {there} wide there, and {here} here")
    return wrong
