"""Cut a graph into a chain (cache layout `segments`): models that share no weight, of which a step runs some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from diffc.cache.layout import KeptTensor
from diffc.cache.resolve import ResolvedCache
from diffc.compile.cached.operations import at_sizes, known_shapes
from diffc.compile.cached.shapes import product_of, telling_shapes
from diffc.compile.cached.variants import CacheBuild, Variant, group_texts, name_dims
from diffc.errors import DiffcError
from diffc.models.sizes import Sizes
from diffc.models.sources.locate import ModelSource
from passes import Pipeline
from passes.base import Pass, PassResult
from passes.cache.regions import Group
from passes.cache.segments import Chain
from passes.cache.split_cache import SplitCache

MOST = 9
"""Segments of a chain at most: each starts and ends with its own launches, and is an engine of its own."""


@dataclass(frozen=True)
class _Survey(Pass):
    """Makes every tensor that crosses from segment to segment an output, and keeps the chain that it found."""

    name: ClassVar[str] = "survey-segments"
    changes_interface: ClassVar[bool] = True
    groups: tuple[str, ...]
    seen: list[Chain] = field(default_factory=list)

    def run(self, graph: gs.Graph) -> PassResult:
        """Find the segments; the graph itself is not cut."""
        chain = Chain(graph, [Group.parse(text) for text in self.groups])
        self.seen.append(chain)
        there = {id(tensor) for tensor in graph.outputs}
        graph.outputs += [tensor for tensor in chain.crossing if id(tensor) not in there]
        return PassResult(1)


def cut_chain(model: onnx.ModelProto, plan: ResolvedCache, source: ModelSource) -> CacheBuild:
    """The chain of a canonical `model`; empty where no step uses anything again.

    Raises PassError where a group of the plan cannot be cut out, and DiffcError where the segments would be too many.
    """
    if not plan.reuse_sets():
        return CacheBuild(plan, (), {}, layout="segments")
    groups = group_texts(plan)
    survey = _Survey(groups)
    whole = Pipeline([survey]).run(model).model
    (chain,) = survey.seen
    if len(chain.segments) > MOST:
        raise DiffcError(
            f"the cache plan {plan.name} cuts the backbone into {len(chain.segments)} segments, and {MOST} are the"
            " most: its blocks do not follow each other",
            fix="take --cache-layout full+reduced, or name blocks that follow each other",
        )
    names = {id(t): t.name for t in (*chain.crossing, *chain.graph.inputs, *chain.graph.outputs)}
    kept = [
        KeptTensor(k.tensor.name, k.group, None if k.source is None else names[id(k.source)])
        for k in chain.kept
    ]
    dims = crossing_dims(whole, [t.name for t in chain.crossing], source)
    variants = []
    for number, segment in enumerate(chain.segments):
        part = Pipeline([SplitCache(groups, part=number)]).run(model).model
        name_dims(part, dims)
        variants.append(Variant((), f"-part-{number + 1}", part, group=segment.group))
    return CacheBuild(plan, tuple(variants), dims, "segments", tuple(kept), whole)


def crossing_dims(
    whole: onnx.ModelProto, names: Sequence[str], source: ModelSource
) -> dict[str, tuple[str | int, ...]]:
    """The sizes of the outputs `names` of `whole` in terms of the dynamic dimensions.

    Raises DiffcError for a size that is neither a multiple of a product of dimensions nor that plus a dimension.
    """
    spec = source.family
    sizes = [spec.sizes(shape) for shape in telling_shapes(spec.pixel_multiple(source.config))]
    runs = [known_shapes(at_sizes(whole, each, {})) for each in sizes]
    found: dict[str, tuple[str | int, ...]] = {}
    for name in names:
        if any(name not in run for run in runs):
            raise DiffcError(f"the shape of {name} is not known", fix="take --cache-layout full+reduced")
        found[name] = tuple(
            _size(name, values, sizes) for values in zip(*(r[name] for r in runs), strict=True)
        )
    return found


def _size(name: str, values: Sequence[int], sizes: Sequence[Sizes]) -> str | int:
    """The text of a size with `values` at `sizes`: a number, a product of dimensions, or that plus a dimension."""
    if len(set(values)) == 1:
        return values[0]
    if (text := product_of(values, sizes)) is not None:
        return text
    for dim in sizes[0]:
        rest = [value - s[dim] for value, s in zip(values, sizes, strict=True)]
        if min(rest) > 0 and (text := product_of(rest, sizes)) is not None:
            return f"{dim}+{text}"
    raise DiffcError(
        f"a size of {name} is not a product of dimensions", fix="take --cache-layout full+reduced"
    )
