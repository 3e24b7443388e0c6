"""The models of a cache plan, cut out of the canonical graph, in either layout."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from diffc.cache.layout import Layout
from diffc.cache.resolve import ResolvedCache
from diffc.compile.cached.chain import cut_chain
from diffc.compile.cached.shapes import kept_dims
from diffc.compile.cached.variants import CacheBuild, Variant, group_texts, name_dims
from diffc.models.sources.backbone import FakeBackbone
from passes import Pipeline
from passes.cache.split_cache import SplitCache


def split(
    model: onnx.ModelProto, plan: ResolvedCache, backbone: FakeBackbone, layout: Layout = "full+reduced"
) -> CacheBuild:
    """The models of a cache plan, cut out of the canonical `model`; none where no step uses anything again.

    Raises PassError where a group of the plan cannot be cut out.
    """
    if layout == "segments":
        return cut_chain(model, plan, backbone.source)
    sets, groups = plan.reuse_sets(), group_texts(plan)
    if not sets:
        return CacheBuild(plan, (), {})

    def cut(reuse: Sequence[int], outputs: Sequence[str] = ()) -> onnx.ModelProto:
        return Pipeline([SplitCache(groups, tuple(reuse), tuple(outputs))]).run(model).model

    reduced = [cut(sorted(reuse)) for reuse in sets]
    wanted = {v.name for m in reduced for v in m.graph.input if v.name.startswith("cached_")}
    models = [cut((), sorted(wanted)), *(_without_unread(m, wanted) for m in reduced)]
    dims = kept_dims(models[0], backbone)
    for item in models:
        name_dims(item, dims)
    suffixes = ["-keep", *(f"-reuse-{n}" for n in range(1, len(sets) + 1))]
    keys = [(), *(tuple(sorted(reuse)) for reuse in sets)]
    return CacheBuild(plan, tuple(map(Variant, keys, suffixes, models)), dims, whole=models[0])


def _without_unread(model: onnx.ModelProto, wanted: set[str]) -> onnx.ModelProto:
    """Remove the kept outputs that no variant reads, in place. What computes them stays: other blocks read it."""
    unread = {v.name for v in model.graph.output if v.name.startswith("cached_")} - wanted
    for values in (model.graph.output, model.graph.node):
        for item in [i for i in values if i.name in unread]:
            values.remove(item)
    return model
