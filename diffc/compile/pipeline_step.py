"""Holds the graph's interface against one step of the pipeline: both sides of a validation are fed the same inputs,
so that none of them sees an input that only the pipeline gives, or gives in another shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.family import Family
from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.json_files import read_json
from diffc.models.sources.pipelines import open_pipeline
from diffc.models.sources.source import ModelSource
from diffc.models.spec import Config, InputSpec
from diffc.models.stand_in import class_of, full_config, take_attributes
from diffc.quantize.pipeline_call import call_arguments

MOST_BYTES = 1 << 30
"""Bytes of a pipeline's files, without the backbone, up to which it is loaded only to look at one step."""
Path = tuple[str | int, ...]


class Recorder(nn.Module):
    """Stands in the backbone's place, and stops the pipeline at its first call."""

    def __init__(
        self, source: ModelSource, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ):
        super().__init__()
        self.config, self.dtype = full_config(source.family, source.config), dtype
        self.device = device or torch.device("cpu")
        self._forward = class_of(source.family.backbone_class).forward
        take_attributes(self, source.family, source.config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stop the pipeline. Raises Recorded with the arguments by name."""
        raise Recorded(_named(self._forward, (self, *args), kwargs))

    @contextmanager
    def cache_context(self, name: str, **place: Any) -> Iterator[None]:
        """The branch of guidance and the place in the loop, which are all the same here."""
        del name, place
        yield


class Recorded(Exception):  # stops a pipeline, and is no error
    """The arguments of a backbone's call."""

    def __init__(self, arguments: Mapping[str, Any]):
        super().__init__()
        self.arguments = arguments


def check_step(source: ModelSource) -> str:
    """Run one step of the pipeline, without its backbone's weights, and check what the backbone is given.

    Returns why this was not done, empty where it was. Raises UnsupportedError as `check_call` does.
    """
    if source.family.interface is not None:  # it was read off this pipeline's calls
        return ""
    folder, component = source.pipeline_dir, source.family.component
    if folder is not None:
        files = (file for file in folder.glob("*/*.safetensors") if file.parent.name != component)
        if sum(file.stat().st_size for file in files) > MOST_BYTES:
            return "it is too large to be loaded for one step"
    try:
        with quiet_libraries(), torch.no_grad(), _with_recorder(source) as pipe:
            _paint_step(pipe, source)
    except Recorded as found:
        check_call(source.family, source.config, found.arguments, _class_name(source))
        return ""
    except Exception as error:  # whatever the user's pipeline raises: what is compiled is the backbone
        reason = error.what if isinstance(error, DiffcError) else f"{type(error).__name__}: {error}"
        return f"it does not run here ({reason})"
    return "it did not call its backbone"


@contextmanager
def _with_recorder(source: ModelSource) -> Iterator[Any]:
    """The pipeline with a Recorder in the backbone's place; one in memory is as before at the end."""
    component = source.family.component
    if source.pipeline is None:
        without: dict[str, Any] = {component: None}
        loaded = open_pipeline(source, dtype=torch.float32, fix="download the whole pipeline", **without)
        setattr(loaded, component, Recorder(source))
        yield loaded
        return
    pipe = source.pipeline
    original, bar = getattr(pipe, component), getattr(pipe, "_progress_bar_config", None)
    setattr(pipe, component, Recorder(source, pipe.dtype, pipe.device))
    try:
        yield pipe
    finally:
        setattr(pipe, component, original)
        pipe.set_progress_bar_config(**(bar or {}))


def _paint_step(pipe: Any, source: ModelSource) -> None:
    """Begin to paint a small picture; the first call of the backbone stops it."""
    pipe.set_progress_bar_config(disable=True)
    size = source.family.pixel_multiple(source.config) * 2
    pipe(
        **call_arguments(
            pipe.__call__,
            ["a fox"],
            seeds=[0],
            steps=2,  # some schedulers have no grid of one step
            height=size,
            width=size,
            usual=source.family.calibration,
        )
    )


def _class_name(source: ModelSource) -> str:
    """The class of the pipeline, for messages."""
    if source.pipeline is not None:
        return type(source.pipeline).__name__
    index = read_json(source.pipeline_dir / "model_index.json") if source.pipeline_dir else {}
    return str(index.get("_class_name", "the pipeline"))


@contextmanager
def checked_first_call(backbone: nn.Module, source: ModelSource) -> Iterator[None]:
    """Check the first call of a backbone while this is open. Raises UnsupportedError as `check_call` does.

    A family that was made from a pipeline's own calls has nothing to be checked.
    """
    if source.family.interface is not None:
        yield
        return
    forward, name = type(backbone).forward, _class_name(source)

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        check_call(source.family, source.config, _named(forward, (module, *args), kwargs), name)

    handle = backbone.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_call(family: Family, config: Config, given: Mapping[str, Any], pipeline: str) -> None:
    """Raise UnsupportedError unless the graph's inputs are what a pipeline gives its backbone, in name and shape.

    `given` are the arguments by name, nested as they were given; `pipeline` is the class, for the message.
    """
    inputs = {item.path or (item.name,): item for item in family.inputs(config)}
    values = dict(_flat(given, {str(path[0]) for path in inputs if len(path) > 1}))
    wrong = [
        f"gives {_spelled(path)}, which the graph does not have" for path in values if path not in inputs
    ]
    wrong += [f"does not give {_spelled(path)}" for path in inputs if path not in values]
    sizes: dict[str, int] = {}
    for path, item in inputs.items():
        if path in values and (reason := _misfit(item, values[path], sizes)):
            wrong.append(f"gives {_spelled(path)} {reason}")
    if wrong:
        raise UnsupportedError(
            f"{pipeline} and the {family} graph of this backbone do not fit: the pipeline {'; '.join(wrong)}",
            fix="check that the backbone belongs to this pipeline; without the pipeline, the backbone's folder alone"
            " compiles, and is called in your own code",
        )


def _named(forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the parameters of `forward`, without the module itself."""
    bound = dict(inspect.signature(forward).bind(*args, **kwargs).arguments)
    bound.pop("self", None)
    return {**bound, **bound.pop("kwargs", {})}


def _flat(given: Mapping[str, Any], nested: set[str]) -> Iterator[tuple[Path, Any]]:
    """The arguments that have a value, by path; how outputs are returned is no input."""
    for name, value in given.items():
        if name in nested and isinstance(value, Mapping):
            yield from (((name, key), inner) for key, inner in value.items() if not _empty(inner))
        elif name != "return_dict" and not _empty(value):
            yield (name,), value


def _empty(value: Any) -> bool:
    """Not given: None, or a container with nothing in it."""
    return value is None or (isinstance(value, Mapping | list | tuple) and not value)


def _misfit(item: InputSpec, value: Any, sizes: dict[str, int]) -> str:
    """Why a value does not fit an input, empty where it does; `sizes` are those of the dimensions seen so far."""
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if not item.dims and (not isinstance(value, Tensor) or value.numel() == 1):
        return ""
    fits = len(shape) == len(item.dims) and all(
        (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) == size
        for dim, size in zip(item.dims, shape, strict=True)
    )
    return "" if fits else f"of shape {list(shape)}, and the graph takes {list(item.dims)}"


def _spelled(path: Path) -> str:
    return ".".join(map(str, path))
