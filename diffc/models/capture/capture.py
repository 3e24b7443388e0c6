"""The interface of a pipeline's backbone, read off calls at settings that differ in every way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import Any

from diffc.errors import UnsupportedError
from diffc.models.call import frames_argument
from diffc.models.capture.describe import Recorded, Sizes, Unfit, inputs_of, recorded, whole
from diffc.models.capture.pipeline import Stage, empty_model
from diffc.models.capture.probe import Probe, outputs_of, pixel_multiple
from diffc.models.capture.record import Leaves, Recorder
from diffc.models.hints import hints_of
from diffc.models.interface import Dimension, Interface
from diffc.models.relation import Setting, grid
from diffc.models.sources.json_files import read_json
from diffc.models.sources.quiet import quiet_libraries

# Sizes at which pipelines are called, in order, until every size follows a rule. Pixels suit autoencoders that
# take 8 to 32 of them for a row, frames those that take 4 or 8, 6, and any number; text is in steps of 16, which
# CogView4 pads to.
_PIXELS = ((64, 128, 192), (96, 160, 224))
_FRAMES = ((9, 17, 25), (7, 13, 19), (8, 16, 24))
_SCALES = (1, 2, 4)
_TEXT = (32, 48, 80)


@lru_cache(maxsize=4)
def capture(folder: Path, component: str) -> Interface:
    """The interface of the backbone `component` of the pipeline in `folder`. Reads no weights; takes some seconds.

    Raises UnsupportedError with the reason where it cannot be read off, DiffcError for a folder that is not complete.
    """
    _check_known(folder, component)
    with quiet_libraries():
        recorder = Recorder(Stage(folder, component))
        record, tuples = _record(recorder)
        return _interface(recorder, record, tuples)


def _check_known(folder: Path, component: str) -> None:
    """Raise UnsupportedError for a class of which it is known that it cannot be compiled."""
    kind = str(read_json(folder / component / "config.json").get("_class_name"))
    if reason := hints_of(kind).refused:
        raise UnsupportedError(
            f"{kind}: {reason}", fix="compile a class of `diffc models families` that is not refused"
        )


def _record(recorder: Recorder) -> tuple[Recorded, tuple[Any, ...]]:
    """Calls at the first sizes that the pipeline takes and at which all that changes follows a rule."""
    reason: Exception | None = None
    for scale in _SCALES:
        for frames in _FRAMES if recorder.is_video else ((1, 1, 1),):
            settings = _settings(scale, frames)
            try:
                calls = [recorder.run(setting) for setting in settings]
                found = recorded(settings, calls)
                inputs_of(found, {}, Sizes())
                return found, recorder.tuples
            except Unfit as error:
                reason = error
            except UnsupportedError as error:
                if not isinstance(error.__cause__, ValueError):
                    raise
                reason = error
    if isinstance(reason, UnsupportedError):
        raise reason
    raise UnsupportedError(
        f"the inputs of {recorder.stage.cls.__name__}'s backbone cannot be read off its calls: {reason}",
        fix="write a family file for this class: CONTRIBUTING.md, Adding a model family",
    )


def _settings(scale: int, frames: Sequence[int]) -> list[dict[str, int]]:
    """All combinations of two values of each setting, and two more to check what these give."""
    low, high, more = (
        {
            "batch": batch,
            "height": _PIXELS[0][n] * scale,
            "width": _PIXELS[1][n] * scale,
            "frames": frames[n],
            "text": _TEXT[n],
        }
        for n, batch in enumerate((1, 2, 3))
    )
    return [*grid(low, high), more, {**more, "batch": 2, "width": low["width"], "text": high["text"]}]


def _interface(recorder: Recorder, record: Recorded, tuples: tuple[Any, ...]) -> Interface:
    stage, sizes = recorder.stage, Sizes()
    inputs, constants = inputs_of(record, _in_half(recorder), sizes)
    dimensions, base = sizes.dimensions(), dict(record.settings[0])
    step = _step(dimensions, base)
    component = next(name for name, part in stage.pipe.components.items() if part is stage.backbone)
    probe = Probe(empty_model(stage.folder / component), inputs, dimensions, constants, tuples)
    kind, outputs = outputs_of(probe, dimensions, inputs[0], _telling(step, record))
    multiple = pixel_multiple(probe, stage.backbone.config, outputs[0], step, base, dimensions)
    rule = (
        _frame_rule(dimensions, {**base, "height": multiple, "width": multiple})
        if recorder.is_video
        else None
    )
    native = _native(recorder, record, inputs[0].path, dimensions, multiple, rule)
    found = Interface(
        backbone_class=type(stage.backbone.real).__name__,
        component=component,
        pipeline_class=stage.cls.__name__,
        inputs=inputs,
        constants=constants,
        tuples=tuples,
        dimensions=tuple(_with_multiple(d, multiple) for d in dimensions),
        outputs=outputs,
        output_class=kind,
        attributes=dict(stage.backbone.read),
        batch=record.batch,
        multiple=multiple,
        frames=rule,
        native=native,
        lists=dict(recorder.lists),
    )
    return replace(found, assumed=tuple(assumptions(found)))


def _in_half(recorder: Recorder) -> Leaves:
    """A call of the same pipeline in bfloat16, which tells what follows the compute type; empty where it fails."""
    import torch

    parts = [
        p for p in recorder.stage.pipe.components.values() if hasattr(p, "__dict__") and "dtype" in vars(p)
    ]
    for part in parts:
        part.dtype = torch.bfloat16
    try:
        return recorder.run({"batch": 1, "height": 128, "width": 128, "frames": 9, "text": 32})
    except UnsupportedError:
        return {}
    finally:
        for part in parts:
            part.dtype = torch.float32


def _step(dimensions: Sequence[Dimension], base: Setting) -> int:
    """The least number of pixels of whose multiples all sizes are whole."""
    sides = [(1, 1), (1, 2), (2, 1), (3, 5)]
    for pixels in (1, 2, 4, 8, 16, 32, 64, 128):
        if all(whole(dimensions, {**base, "height": pixels * h, "width": pixels * w}) for h, w in sides):
            return pixels
    raise UnsupportedError(
        "no image size makes all sizes whole", fix="add a family for this class: CONTRIBUTING.md"
    )


def _telling(step: int, record: Recorded) -> list[Setting]:
    """Two settings that differ in everything, at which hardly two dimensions have one size."""
    low, high = record.settings[0], record.settings[-2]
    return [
        {**low, "height": 64 * -(-step // 64) * 3, "width": 64 * -(-step // 64) * 5},
        {**high, "height": 64 * -(-step // 64) * 4, "width": 64 * -(-step // 64) * 2},
    ]


def _frame_rule(dimensions: Sequence[Dimension], base: Setting) -> tuple[int, int]:
    """Step and rest of the numbers of frames that make all sizes whole."""
    for step in range(1, 33):
        for rest in (1, 0):
            frames = [rest + step * n for n in range(1, 4)]
            if all(whole(dimensions, {**base, "frames": f}) for f in frames):
                return step, rest
    raise UnsupportedError(
        "no number of frames makes all sizes whole", fix="add a family for this class: CONTRIBUTING.md"
    )


def _with_multiple(dimension: Dimension, multiple: int) -> Dimension:
    """A dimension of rows or columns alone is a multiple of those in `multiple` pixels."""
    for name in ("height", "width"):
        line = dimension.relation.line(name)
        if line is not None and line[1] == 0 and (rows := line[0] * multiple).denominator == 1:
            return replace(dimension, multiple=int(rows))
    return dimension


def _native(
    recorder: Recorder,
    record: Recorded,
    sample: Any,
    dimensions: Sequence[Dimension],
    multiple: int,
    rule: tuple[int, int] | None,
) -> Setting:
    """What the pipeline makes when no size is asked for: the settings that give the shape of its call.

    Pixels are found in dimensions of rows or columns; where there are tokens alone, the image is a square, unless
    the pipeline's call states its size.
    """
    stated: dict[str, int] = {n: p.default for n, p in recorder.parameters.items() if type(p.default) is int}
    call = recorder.run({})
    text = _text_length(recorder, record)
    found = {"batch": record.batch, "height": 0, "width": 0, "frames": 1, "text": text}
    shape = dict(zip(_names(record, sample), call[sample].shape, strict=True))
    for name in ("height", "width", "frames"):
        argument = frames_argument(recorder.parameters) if name == "frames" else name
        found[name] = stated.get(argument or "") or _inverse(name, dimensions, shape)
    if rule is not None:
        steps = (found["frames"] - rule[1]) // rule[0] if found["frames"] else 3
        found["frames"] = max(1, steps) * rule[0] + rule[1]
    found["frames"] = found["frames"] if rule else 1
    if not found["height"]:
        found["height"] = found["width"] = _square(dimensions, shape, found, multiple)
    for name in ("height", "width"):
        found[name] = max(multiple, found[name] // multiple * multiple)
    return found


def _inverse(setting: str, dimensions: Sequence[Dimension], shape: Mapping[Any, int]) -> int:
    """The setting that gives the size of a dimension that follows it alone; 0 where none does."""
    for dimension in dimensions:
        line = dimension.relation.line(setting)
        if line is not None and dimension.name in shape:
            return int((shape[dimension.name] - line[1]) / line[0])
    return 0


def _names(record: Recorded, sample: Any) -> list[Any]:
    """The dimensions of the first input; sizes that do not change are numbered, which no dimension is called."""
    sizes = Sizes()
    inputs, _ = inputs_of(record, {}, sizes)
    dims = next(i.dims for i in inputs if i.path == sample)
    return [d if isinstance(d, str) else n for n, d in enumerate(dims)]


def _square(dimensions: Sequence[Dimension], shape: dict[Any, int], found: Setting, multiple: int) -> int:
    """The side of the square image that has the tokens of `shape`; 1024 where none tells."""
    for dimension in dimensions:
        if {"height", "width"} <= dimension.relation.settings and dimension.name in shape:
            per_step = dimension.relation.at({**found, "height": multiple, "width": multiple})
            return multiple * isqrt(max(1, int(shape[dimension.name] / per_step)))
    return 1024


def _text_length(recorder: Recorder, record: Recorded) -> int:
    """Tokens that the backbone gets of a prompt longer than the pipeline takes; of a short one where it may be any."""
    paths = [
        (path, axis)
        for path, value in record.calls[0].items()
        for axis in range(getattr(value, "ndim", 0))
        if _follows_text(record, path, axis)
    ]
    if not paths:
        return 1
    path, axis = paths[0]
    return int(recorder.run({})[path].shape[axis])


def _follows_text(record: Recorded, path: Any, axis: int) -> bool:
    found = record.relation([call[path].shape[axis] for call in record.calls], "")
    return not isinstance(found, int) and found.settings == {"text"}


def assumptions(interface: Interface) -> list[str]:
    """What a reader of the artifact has to know: lines."""
    lines = [
        f"{interface.backbone_class}: no family file; the interface is read off calls of {interface.pipeline_class}"
    ]
    lines += [
        f"{i.name}: {i.dtype}, ({', '.join(_dim(d, interface) for d in i.dims)})"
        + (", holds no values: the call's number is its length" if i.kind == "size" else "")
        for i in interface.inputs
    ]
    lines += [
        f"{'.'.join(map(str, path))} = {value!r} in every call: fixed" for path, value in interface.constants
    ]
    if interface.batch > 1:
        lines.append(f"guidance makes the backbone's batch {interface.batch} times that of the pipeline")
    return lines


def _dim(dim: str | int, interface: Interface) -> str:
    if isinstance(dim, int):
        return str(dim)
    relation = str(next(d.relation for d in interface.dimensions if d.name == dim))
    return dim if relation == dim else f"{dim} = {relation}"
