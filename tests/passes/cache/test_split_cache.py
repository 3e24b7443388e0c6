"""split-cache: what the model for a step returns and takes, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper, numpy_helper

from passes import PassError, Pipeline
from passes.cache.regions import Group
from passes.cache.segments import Chain
from passes.cache.split_cache import SplitCache
from passes.graph.inference import infer_types
from tests.networks import FP32, make, value

RESIDUAL = "residual:block.0+block.1"


def stack(blocks: int = 3, width: int = 8, seed: int = 0) -> onnx.ModelProto:
    """in -> h = h + relu(h W) + bias of sizes, for every block -> out; block 0 computes a size that all read."""
    rng = np.random.default_rng(seed)
    weights = [numpy_helper.from_array(np.array([0], np.int64), "zero")]
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["h"], "embed/Mul"),
        helper.make_node("Shape", ["h"], ["size"], "block.0/Shape"),
    ]
    h = "h"
    for i in range(blocks):
        w = rng.standard_normal((width, width)).astype(np.float32) / 4
        weights.append(numpy_helper.from_array(w, f"block.{i}.w"))
        nodes += [
            helper.make_node("Reshape", [h, "size"], [f"r{i}"], f"block.{i}/Reshape"),
            helper.make_node("MatMul", [f"r{i}", f"block.{i}.w"], [f"m{i}"], f"block.{i}.linear/MatMul"),
            helper.make_node("Relu", [f"m{i}"], [f"a{i}"], f"block.{i}.act/Relu"),
            helper.make_node("Add", [h, f"a{i}"], [f"h{i}"], f"block.{i}/Add"),
        ]
        h = f"h{i}"
    nodes.append(helper.make_node("Tanh", [h], ["y"], "head/Tanh"))
    dims = ["batch", width]
    return make(nodes, [value("x", FP32, dims)], [value("y", FP32, dims)], weights)


def cut(model: onnx.ModelProto, *groups: str, **options: Any) -> onnx.ModelProto:
    return Pipeline([SplitCache(groups, **options)]).run(model).model


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    names = [o.name for o in model.graph.output]
    values = ReferenceEvaluator(model).run(None, {i.name: feed[i.name] for i in model.graph.input})
    return dict(zip(names, values, strict=True))


def x_of(seed: int, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 8)).astype(np.float32)


def names_of(values: object) -> list[str]:
    return [v.name for v in values]  # type: ignore[attr-defined]


@pytest.mark.parametrize("group", [RESIDUAL, "output:block.0+block.1", "residual:block.1", "output:block.2"])
def test_full_equals_the_model_and_reduced_with_its_own_values_too(group: str) -> None:
    model = stack()
    full, reduced = cut(model, group), cut(model, group, reuse=(0,))
    first = run(full, {"x": x_of(1)})
    np.testing.assert_array_equal(first["y"], run(model, {"x": x_of(1)})["y"])
    again = run(reduced, {"x": x_of(1)} | first)
    np.testing.assert_allclose(again["y"], first["y"], rtol=1e-5, atol=1e-6)


def test_a_reduced_model_computes_what_the_plan_means() -> None:
    model = stack()
    kept = run(cut(model, RESIDUAL), {"x": x_of(1)})["cached_0_0"]
    reduced = run(cut(model, RESIDUAL, reuse=(0,)), {"x": x_of(2), "cached_0_0": kept})["y"]
    w = numpy_helper.to_array(model.graph.initializer[3])
    h = x_of(2) ** 2 + kept
    np.testing.assert_allclose(reduced, np.tanh(h + np.maximum(h @ w, 0)), rtol=1e-5, atol=1e-6)
    assert not np.allclose(reduced, run(model, {"x": x_of(2)})["y"], rtol=1e-3)


def test_what_is_left_out_is_gone_with_its_weights_and_sizes_stay() -> None:
    reduced = cut(stack(), RESIDUAL, reuse=(0,))
    assert names_of(reduced.graph.initializer) == ["block.2.w"]
    assert {n.name for n in reduced.graph.node if n.name.startswith("block.0")} == {"block.0/Shape"}
    assert names_of(reduced.graph.input) == ["x", "cached_0_0"]
    assert names_of(reduced.graph.output) == ["y"]


def test_an_input_that_only_kept_blocks_read_is_gone() -> None:
    reduced = cut(stack(), "output:block.0+block.1+embed", reuse=(0,))
    assert "x" not in names_of(reduced.graph.input)


def test_groups_that_run_return_their_values_also_beside_groups_that_do_not() -> None:
    model, groups = stack(4), ("residual:block.0", "output:block.2")
    reduced = cut(model, *groups, reuse=(1,))
    assert names_of(reduced.graph.output) == ["y", "cached_0_0"]
    assert names_of(reduced.graph.input) == ["x", "cached_1_0"]
    both = cut(model, *groups, reuse=(0, 1))
    first = run(cut(model, *groups), {"x": x_of(3)})
    np.testing.assert_allclose(run(both, {"x": x_of(3)} | first)["y"], first["y"], rtol=1e-5)
    assert not any("linear" in n.name and n.name[6] in "02" for n in both.graph.node)


def test_outputs_names_what_is_returned() -> None:
    full = Pipeline([SplitCache(("residual:block.0", "output:block.2"), outputs=("cached_1_0",))]).run(
        stack()
    )
    assert names_of(full.model.graph.output) == ["y", "cached_1_0"]


def test_no_groups_change_nothing_and_twice_is_once() -> None:
    model = stack()
    assert not Pipeline([SplitCache()]).run(model).changed
    once = cut(model, RESIDUAL)
    again = Pipeline([SplitCache((RESIDUAL,))]).run(once)
    assert not again.changed
    assert again.model.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)
    assert cut(model, RESIDUAL).SerializeToString() == once.SerializeToString()


@pytest.mark.parametrize(
    ("groups", "reuse", "says"),
    [
        (("output:block.9",), (), "no node belongs to output:block.9"),
        (("output:bloc",), (), "no node belongs"),
        (("all:block.0",), (), "group 'all:block.0' is none"),
        (("output:block.0",), (1,), "reuse names group 1, and there are 1"),
        (("residual:block.0.linear",), (), "not the sum of an input"),
    ],
)
def test_refusals(groups: tuple[str, ...], reuse: tuple[int, ...], says: str) -> None:
    with pytest.raises(PassError, match=says):
        cut(stack(), *groups, reuse=reuse)


def test_streams_that_are_joined_and_parted_are_told_apart_by_shape() -> None:
    """FLUX's single blocks: text and image in one, added to, and sliced again."""
    weights = [
        numpy_helper.from_array(np.array(v, np.int64), n)
        for n, v in (("0", [0]), ("2", [2]), ("5", [5]), ("axis", [1]))
    ]
    nodes = [
        helper.make_node("Neg", ["t"], ["text"], "embed/Neg"),
        helper.make_node("Concat", ["text", "i"], ["c"], "block.0/Concat", axis=1),
        helper.make_node("Sin", ["c"], ["s"], "block.0/Sin"),
        helper.make_node("Add", ["c", "s"], ["a"], "block.0/Add"),
        helper.make_node("Slice", ["a", "0", "2", "axis"], ["t1"], "block.0/Slice"),
        helper.make_node("Slice", ["a", "2", "5", "axis"], ["i1"], "block.0/Slice_1"),
        helper.make_node("Concat", ["i1", "t1"], ["y"], "head/Concat", axis=1),
    ]
    inputs = [value("t", FP32, ["b", 2]), value("i", FP32, ["b", 3])]
    model = make(nodes, inputs, [value("y", FP32, ["b", 5])], weights)
    feed = {"t": x_of(1)[:, :2], "i": x_of(2)[:, :3]}
    first = run(cut(model, "residual:block.0"), feed)
    np.testing.assert_allclose(first["cached_0_0"], np.sin(-feed["t"]), atol=1e-6)
    np.testing.assert_allclose(first["cached_0_1"], np.sin(feed["i"]), atol=1e-6)
    again = run(cut(model, "residual:block.0", reuse=(0,)), feed | first)
    np.testing.assert_allclose(again["y"], first["y"], rtol=1e-5)


def chain(model: onnx.ModelProto, *groups: str) -> tuple[Chain, list[onnx.ModelProto]]:
    """What the segments are, and the models of them."""
    found = Chain(gs.import_onnx(infer_types(model)), [Group.parse(group) for group in groups])
    steps = [SplitCache(groups, part=number) for number in range(len(found.segments))]
    return found, [Pipeline([step]).run(model).model for step in steps]


def step(
    found: Chain, models: list[onnx.ModelProto], x: np.ndarray, held: dict[str, np.ndarray], *reuse: int
) -> np.ndarray:
    """A step of the chain as its description says, without the groups `reuse`; `held` is renewed."""
    flow = {"x": x}
    for segment, model in zip(found.segments, models, strict=True):
        kept = [k for k in found.kept if k.tensor.name in names_of(model.graph.output)]
        if segment.group in reuse:
            for k in kept:
                flow[k.tensor.name] = held[k.name] + (0 if k.source is None else flow[k.source.name])
            continue
        flow |= run(model, flow)
        for k in kept:
            held[k.name] = flow[k.tensor.name] - (0 if k.source is None else flow[k.source.name])
    return flow["y"]


CHAINS = [
    ([RESIDUAL], [None, 0, None]),
    (["output:block.1"], [None, 0, None]),
    (["output:block.2"], [None, 0, None]),
    (["residual:block.0+block.2"], [None, 0, None, 0, None]),
    (["residual:block.0", "output:block.1"], [None, 0, 1, None]),
]


@pytest.mark.parametrize(("groups", "order"), CHAINS)
def test_a_chain_is_the_model_and_its_steps_are_those_of_reduced_models(
    groups: list[str], order: list[int | None]
) -> None:
    model = stack()
    found, models = chain(model, *groups)
    assert [segment.group for segment in found.segments] == order
    held: dict[str, np.ndarray] = {}
    plain = run(model, {"x": x_of(1)})["y"]
    np.testing.assert_array_equal(step(found, models, x_of(1), held), plain)
    kept = run(cut(model, *groups), {"x": x_of(1)})
    for reuse in [(0,), tuple(range(len(groups)))]:
        reduced = run(cut(model, *groups, reuse=reuse), kept | {"x": x_of(2)})["y"]
        again = step(found, models, x_of(2), dict(held), *reuse)
        np.testing.assert_allclose(again, reduced, rtol=1e-5, atol=1e-6)
        assert not np.allclose(again, run(model, {"x": x_of(2)})["y"], rtol=1e-3)


@pytest.mark.parametrize(("groups", "order"), CHAINS)
def test_no_weight_is_in_two_segments(groups: list[str], order: list[int | None]) -> None:
    _, models = chain(stack(), *groups)
    weights = [t.name for model in models for t in model.graph.initializer if t.name.endswith(".w")]
    assert sorted(weights) == ["block.0.w", "block.1.w", "block.2.w"]
    assert len(models) == len(order)


def test_what_later_segments_alone_read_is_made_there() -> None:
    """The modulation of a late block: of the time embedding, which crosses in its place."""
    model = stack()
    late = helper.make_node("MatMul", ["h", "late.w"], ["shift"], "block.2.norm/MatMul")
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "late.w")
    model.graph.node.insert(1, late)  # as soon as it can be
    model.graph.initializer.append(weight)
    next(n for n in model.graph.node if n.name == "block.2/Add").input[0] = "shift"
    _, models = chain(model, "output:block.0+block.1")
    assert [("late.w" in names_of(m.graph.initializer)) for m in models] == [False, False, True]


def test_refusals_of_segments() -> None:
    model = stack()
    with pytest.raises(PassError, match="there is no segment 3: the chain has 3"):
        cut(model, RESIDUAL, part=3)
    with pytest.raises(PassError, match="has no reuse"):
        cut(model, RESIDUAL, part=0, reuse=(0,))
    once = cut(model, RESIDUAL, part=1)
    assert not Pipeline([SplitCache((RESIDUAL,), part=1)]).run(once).changed


def test_groups_as_text() -> None:
    assert str(Group.parse(RESIDUAL)) == RESIDUAL
    text = f"split-cache{{groups={RESIDUAL};output:head,reuse=0;1}}"
    assert str(Pipeline.parse(text)) == text


def test_a_pass_that_may_not_change_the_interface_is_caught() -> None:
    from passes.graph.check import check_structure

    model = stack()
    with pytest.raises(PassError, match="graph outputs changed"):
        check_structure(model, cut(model, RESIDUAL), None)
