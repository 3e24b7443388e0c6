"""What `--shape batch=2,height=128,...` means, for a model of a known family and for an imported graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import onnx

from diffc.errors import UsageError
from diffc.models.family import Family
from diffc.models.profiles import parse_sizes
from diffc.models.spec import Config, Shape
from diffc.validate.reports import GraphSizes


def parse_shape(text: str, spec: Family, config: Config, default: Shape) -> Shape:
    """`default` with the axes of `text`: batch, height, width (pixels), text (tokens).

    Raises UsageError for anything else, and for shapes that the model cannot run.
    """
    sizes = _single(text, list(asdict(default)))
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
