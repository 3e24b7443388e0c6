"""The models of a cached artifact, checked against each other.

Layout `full+reduced`: a model that runs all blocks and returns what is kept, and one for each set of groups that is
used again. Layout `segments`: a chain (`diffc.cache.chain`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx

from diffc.artifact.describe import described_values
from diffc.cache.layout import KeptTensor, Layout
from diffc.cache.resolve import ResolvedCache
from diffc.models.sizes import Dims, size_of
from diffc.validate.compare import compare
from diffc.validate.float32 import cpu_session, feed, unrounded_copy
from diffc.validate.tolerances import PASS_REL_L2
from passes import PassCheckError
from passes.cache.regions import Group


@dataclass(frozen=True)
class Variant:
    """One model of a cached artifact; the names of its files end in `suffix`.

    Layout `full+reduced`: the model for steps that use the groups `reuse` again. Layout `segments`: a segment, which
    steps that use `group` again leave out (None: no step leaves it out). `legalized` holds the graphs that targets
    take, by file name, and `files` the file name of each target.
    """

    reuse: tuple[int, ...]
    suffix: str
    model: onnx.ModelProto
    legalized: Mapping[str, onnx.ModelProto] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    group: int | None = None

    @property
    def gives(self) -> list[str]:
        """The names of its outputs."""
        return [value.name for value in self.model.graph.output]


@dataclass(frozen=True)
class CacheBuild:
    """The models of a plan (none where nothing is kept), and `dims`, the sizes of tensors that models hand over.

    In `full+reduced` the model that runs all blocks comes first; `segments` are in the order in which they run. `whole`
    runs all blocks and returns everything that one model hands to another.
    """

    plan: ResolvedCache
    variants: tuple[Variant, ...]
    dims: Dims
    layout: Layout = "full+reduced"
    kept: tuple[KeptTensor, ...] = ()
    whole: onnx.ModelProto | None = None

    def manifest(self) -> dict[str, Any]:
        """The entry of manifest.json: enough to run the schedule."""
        chain = self.layout == "segments"
        models = [
            ({"group": v.group} if chain else {"reuse": list(v.reuse)})
            | {"suffix": v.suffix, "files": dict(v.files)}
            | {kind: self._sized(values) for kind, values in described_values(v.model).items()}
            for v in self.variants
        ]
        kept = {"kept": [asdict(item) for item in self.kept]} if chain else {}
        return {"layout": self.layout, "plan": self.plan.to_json(), "models": models, **kept}

    def _sized(self, values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            dict(v) | ({"dims": list(self.dims[v["name"]])} if v["name"] in self.dims else {}) for v in values
        ]


def group_texts(plan: ResolvedCache) -> tuple[str, ...]:
    """The groups of a plan as passes take them."""
    return tuple(str(Group(group.blocks, group.keep == "residual")) for group in plan.groups)


def name_dims(model: onnx.ModelProto, dims: Dims) -> None:
    """Write the sizes of kept tensors into a graph; a size that is computed gets a name of its own."""
    for value in (*model.graph.input, *model.graph.output):
        for axis, size in enumerate(dims.get(value.name, ())):
            dim = value.type.tensor_type.shape.dim[axis]
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = size if size.isidentifier() else f"{value.name}_{axis}"


def check_variants(build: CacheBuild, arrays: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`arrays`, inputs of the model that runs all blocks, each with what that model returns for them.

    Raises PassCheckError unless every other model, given values that were kept in the very same step, gives what the
    model that runs all blocks gives, and unless tensors between models have the sizes in `dims`. Activations are not
    rounded.
    """
    assert build.whole is not None
    full = unrounded_copy(build.whole)
    with cpu_session(full) as session:
        results = [session.run(feed(full, values)) for values in arrays]
    for values, result in zip(arrays, results, strict=True):
        _check_sizes(build, values, result)
    inputs = [dict(values) | result for values, result in zip(arrays, results, strict=True)]
    for variant in build.variants:
        if variant.model is build.whole:
            continue
        copy = unrounded_copy(variant.model)
        with cpu_session(copy) as session:
            for values, expected in zip(inputs, results, strict=True):
                found = session.run(feed(copy, values))
                for row in compare({name: expected[name] for name in found}, found, PASS_REL_L2):
                    if not row.passed:
                        raise PassCheckError(f"split-cache, model{variant.suffix}: {row.name!r} {row.reason}")
    return inputs


def _check_sizes(build: CacheBuild, given: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    sizes, whole = {}, build.whole
    assert whole is not None
    for value in whole.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, given[value.name].shape, strict=True):
            sizes[dim.dim_param] = size
    for name, dims in build.dims.items():
        wanted, found = tuple(size_of(dim, sizes) for dim in dims), tuple(result[name].shape)
        if wanted != found:
            raise PassCheckError(f"kept tensor {name!r} has shape {found}, and {wanted} was expected")
