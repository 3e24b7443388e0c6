"""Sizes of kept tensors in terms of the graph's dynamic dimensions, found by running torch on fake tensors.

The graph names "batch" and "text", and does not tell that an image of height x width latents has height * width / 4
tokens. Sizes are texts, as in `diffc.models.sizes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from math import prod
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sizes import Sizes, size_of
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.spec import Shape
from diffc.validate.shapes import fixed_batch

Seen = Mapping[str, Sequence[tuple[int, ...]]]


def kept_dims(model: onnx.ModelProto, backbone: FakeBackbone) -> dict[str, tuple[str | int, ...]]:
    """The sizes of every kept tensor that `model`, the one that runs all blocks, returns.

    Raises DiffcError for a size that is not a multiple of a product of dimensions.
    """
    source = backbone.source
    spec = source.family
    names = {dim.name for dim in spec.dims(source.config)}
    kept = [v for v in model.graph.output if v.name.startswith("cached_")]
    known = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in kept}
    if all(isinstance(d, int) or d in names for dims in known.values() for d in dims):
        return {name: tuple(dims) for name, dims in known.items()}
    shapes = telling_shapes(spec.pixel_multiple(source.config), fixed_batch(model))
    seen = seen_shapes(backbone, shapes)
    sizes = [spec.sizes(shape) for shape in shapes]
    makers = _makers(model)
    return {name: _dims_of(dims, makers[name], seen, sizes) for name, dims in known.items()}


def telling_shapes(multiple: int, batch: int | None = None) -> list[Shape]:
    """Shapes at which no two products of dimensions have equal sizes; all have `batch`, where it is given."""
    rows = ((2, 4, 6, 20), (3, 4, 10, 36), (1, 6, 14, 44))
    return [Shape(batch or n, height * multiple, width * multiple, text) for n, height, width, text in rows]


def seen_shapes(backbone: FakeBackbone, shapes: Sequence[Shape]) -> list[dict[str, list[tuple[int, ...]]]]:
    """For each shape: the shapes of the tensors in every module's output, by module path."""
    family, config, runs = backbone.source.family, backbone.source.config, []
    with backbone.mode, torch.no_grad():
        for shape in shapes:
            seen: dict[str, list[tuple[int, ...]]] = {}
            handles = [_watch(module, path, seen) for path, module in backbone.module.named_modules()]
            values = random_inputs(family, config, shape, dtype=backbone.dtype, seed=0)
            backbone.module(**forward_kwargs(family, config, values), return_dict=False)
            for handle in handles:
                handle.remove()
            runs.append(seen)
    return runs


def _watch(module: nn.Module, path: str, seen: dict[str, list[tuple[int, ...]]]) -> Any:
    def note(_: Any, __: Any, output: Any) -> None:
        seen[path] = [tuple(tensor.shape) for tensor in _tensors(output)]

    return module.register_forward_hook(note)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _makers(model: onnx.ModelProto) -> dict[str, str]:
    """The path of the module that computes each kept tensor."""
    nodes = {name: node for node in model.graph.node for name in node.output}
    kept = (v.name for v in model.graph.output if v.name.startswith("cached_"))
    return {name: nodes[nodes[name].input[0]].name.partition("/")[0] for name in kept}


def _dims_of(
    dims: Sequence[int | str], module: str, seen: Sequence[Seen], sizes: Sequence[Sizes]
) -> tuple[str | int, ...]:
    """`dims` with the sizes that the graph does not name, taken from the outputs of `module` or of a module around it.

    The graph always names a size that is one dimension alone. An output that would need such a size is another tensor.
    """
    parts = module.split(".")
    for length in range(len(parts), -1, -1):
        runs = [run.get(".".join(parts[:length]), []) for run in seen]
        for shapes in zip(*runs, strict=True):
            found = _completed(dims, shapes, sizes)
            if found is not None:
                return found
    raise DiffcError(f"the shape of what {module} gives is not known", fix="keep the output of whole blocks")


def _completed(
    dims: Sequence[int | str], shapes: Sequence[tuple[int, ...]], sizes: Sequence[Sizes]
) -> tuple[str | int, ...] | None:
    """`dims` completed from the shapes of one output in every run; None where they are of another tensor."""
    if any(len(shape) != len(dims) for shape in shapes):
        return None
    found: list[str | int] = []
    for axis, dim in enumerate(dims):
        values = [shape[axis] for shape in shapes]
        if isinstance(dim, int) or dim in sizes[0]:
            if values != [size_of(dim, s) for s in sizes]:
                return None
            found.append(dim)
            continue
        text = product_of(values, sizes)
        if text is None or text in sizes[0]:
            return None
        found.append(text)
    return tuple(found)


def product_of(values: Sequence[int], sizes: Sequence[Sizes]) -> str | None:
    """`values`, one for each of `sizes`, as a product of dimensions, times or divided by a number."""
    for count in range(len(sizes[0]) + 1):
        for chosen in combinations(sizes[0], count):
            ratios = {Fraction(prod(s[n] for n in chosen), v) for v, s in zip(values, sizes, strict=True)}
            ratio = ratios.pop() if len(ratios) == 1 else None
            if ratio is not None and ratio.numerator == 1:
                return "*".join([*chosen, str(ratio.denominator)] if ratio.denominator > 1 else chosen)
            if ratio is not None and ratio.denominator == 1:
                return f"{'*'.join(chosen)}/{ratio.numerator}"
    return None
