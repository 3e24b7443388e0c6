"""What `--shape batch=2,height=128,...` means, for a model of a known family and for an imported graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import onnx

from diffc.errors import UsageError
from diffc.models.family import Family
from diffc.models.profiles import ShapeProfile, parse_sizes
from diffc.models.spec import Config, Shape
from diffc.validate.reports import GraphSizes


def usual_shapes(
    spec: Family, config: Config, batch: int | None = None, profile: ShapeProfile | None = None
) -> tuple[Shape, ...]:
    """Two small shapes that differ in height, width, text length, and in batch unless the graph has a fixed one.

    With a `profile` they lie inside it, so that an engine takes them: on each axis both sizes move up by the same
    amount to its minimum, and end at its maximum. A profile of one single shape leaves one.
    """
    step = math.lcm(32, spec.pixel_multiple(config))
    few, more = spec.video_frames(1), spec.video_frames(3)
    shapes = (
        Shape(batch or 1, 2 * step, 3 * step, 24, few),
        Shape(batch or 2, 4 * step, 2 * step, 40, more),
    )
    if profile is None:
        return shapes
    for axis in asdict(shapes[0]):
        sizes = [getattr(shape, axis) for shape in shapes]
        low, high = getattr(profile.minimum, axis), getattr(profile.maximum, axis)
        up = max(0, low - min(sizes))
        moved = [min(size + up, high) for size in sizes]
        shapes = (replace(shapes[0], **{axis: moved[0]}), replace(shapes[1], **{axis: moved[1]}))
    return tuple(dict.fromkeys(shapes))


def parse_shape(text: str, spec: Family, config: Config, default: Shape) -> Shape:
    """`default` with the axes of `text`: batch, height, width (pixels), text (tokens), frames of a video.

    Raises UsageError for anything else, and for shapes that the model cannot run.
    """
    sizes = _single(text, [name for name in asdict(default) if name != "frames" or spec.frames])
    return spec.check(config, Shape(**{**asdict(default), **sizes}))


def parse_graph_sizes(text: str, model: onnx.ModelProto, default: int) -> GraphSizes:
    """The sizes of the dynamic dimensions of `model` by name; `default` for those that `text` leaves out."""
    names = [d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param]
    sizes = _single(text, list(dict.fromkeys(names)))
    return GraphSizes(tuple((name, sizes.get(name, default)) for name in dict.fromkeys(names)))


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The batch that the graph of a backbone is made for; None where it takes any."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


def _single(text: str, known: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for axis, (low, _, high) in parse_sizes(text, known).items():
        if low != high or low < 1:
            raise UsageError(
                f"--shape {text!r}: {axis} is not a size", fix=f"write one number above 0: {axis}=2"
            )
        sizes[axis] = low
    return sizes
