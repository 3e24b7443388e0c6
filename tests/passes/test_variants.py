"""Every pass on every form of known graphs: bodies, functions, captured weights, overloads, unnamed dimensions.

A pass does in a body, or in a function once it is inlined, what it does in the plain graph, and outputs stay.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from onnx import ModelProto

from passes import Pass, Pipeline, all_passes
from passes.canonical.fix_size import FixSize
from passes.canonical.inline_functions import InlineFunctions
from passes.canonical.name_dimensions import NameDimensions
from passes.presets import CANONICAL, IMPORT, TARGETS
from passes.storage import materialize
from passes.targets.ort.add_trt_functions import AddTrtFunctions
from passes.targets.ort.cast_io import CastIo
from passes.targets.ort.emulate_fp4 import EmulateFp4
from passes.targets.ort.widen_types import WidenTypes
from passes.targets.ort_cuda.flatten_attention import FlattenAttention
from passes.targets.tensorrt.type_trt_ops import TypeTrtOps
from tests.passes.graph_helpers import error, run_ort
from tests.passes.known_graphs import KNOWN
from tests.passes.variants import VARIANTS

OPTIONS: dict[str, Pass] = {
    "cast-io": CastIo(values=("x:float16",)),
    "fix-size": FixSize(size=2),
    "flatten-attention": FlattenAttention(multi_head=True),
    "widen-types": WidenTypes(source="float16"),
}
"""Passes that do nothing, or not what presets want of them, without options."""
LISTS: dict[str, tuple[Pass, ...]] = {
    "import": IMPORT,
    "trt-rtx": (*CANONICAL, *TARGETS["trt-rtx"]),
    "ort-cuda": (*CANONICAL, *TARGETS["ort-cuda"]),
}
IN_LISTS = {step.name for steps in LISTS.values() for step in steps}
RUNNABLE = InlineFunctions(), AddTrtFunctions(remove=True), TypeTrtOps(), EmulateFp4(), AddTrtFunctions()
ROUNDING = 2e-5
FIRST: dict[str, tuple[Pass, ...]] = {
    "function": (InlineFunctions(),),
    "overloads": (InlineFunctions(),),
    "unnamed": (NameDimensions(),),
    "odd names": (NameDimensions(),),
}
"""What the list of imports runs first, too."""
DECLINES = {
    "if, captured": "two bodies read one weight, and some passes want a weight for themselves",
    "if in loop": "the same",
    "unnamed": "dimensions of two inputs that are equal have two names",
    "odd names": "fix-size is told another name",
}
"""Variants in which not all passes do what they do in the plain graph, and why."""


def steps_of(name: str) -> tuple[Pass, ...]:
    return LISTS.get(name) or (OPTIONS.get(name) or all_passes()[name](),)


def outputs(made: ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """The outputs in ONNX Runtime, TensorRT's operators as functions."""
    runnable = Pipeline(RUNNABLE).run(made, check=lambda before, after, step: "").model
    return run_ort(materialize(runnable), feeds)


@cache
def changes(graph: str, name: str) -> tuple[bool, ...]:
    """Which of the passes fire in the plain graph."""
    return tuple(r.changed > 0 for r in Pipeline(steps_of(name)).run(KNOWN[graph]()[0]).records)


def steps_for(graph: str) -> list[str]:
    """The lists, and by themselves the passes that fire or are in no list."""
    return [*LISTS, *(name for name in all_passes() if name not in IN_LISTS or any(changes(graph, name)))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graph", KNOWN)
def test_every_pass_keeps_the_outputs_of_every_variant(graph: str, variant: str) -> None:
    plain, feeds = KNOWN[graph]()
    made, more = VARIANTS[variant](plain)
    want = outputs(made, feeds | more)
    first = FIRST.get(variant, ())
    for name in steps_for(graph):
        steps = steps_of(name)
        result = Pipeline([*first, *steps]).run(made)
        fired = tuple(record.changed > 0 for record in result.records[len(first) :])
        assert variant in DECLINES or fired == changes(graph, name), name
        if not any(fired):
            continue
        cast = {"x": feeds["x"].astype("float16")} if name == "cast-io" else {}
        got = outputs(result.model, feeds | more | cast)
        limit = ROUNDING + sum(step.tolerance for step in steps)
        for a, b in zip(got, want, strict=True):
            assert error(a, b) <= limit, name


ELSEWHERE = """add-zero-bias cast-unsupported fold-gates fold-int4-weights fold-scale-cast fuse-lora fuse-residual
    fuse-rms-norm fuse-rotary fuse-skip-norm guard-slices inline-functions join-slices keep-float32
    keep-stored-codes match-types merge-modulations merge-projections merge-row-products name-dimensions
    quantize-softmax rewrite-patches share-scales split-cache widen-types"""
"""Passes that fire in none of these graphs; they have tests of their own."""


def test_the_other_passes_are_seen_to_fire() -> None:
    fired = {name for name in all_passes() for graph in KNOWN if any(changes(graph, name))}
    for name, steps in LISTS.items():
        for graph in KNOWN:
            fired |= {step.name for step, did in zip(steps, changes(graph, name), strict=True) if did}
    assert set(all_passes()) - fired == set(ELSEWHERE.split())
