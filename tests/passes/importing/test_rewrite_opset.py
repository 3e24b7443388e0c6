from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from passes import PassError, Pipeline
from passes.importing.rewrite_opset import RewriteOpset
from tests.passes.graph_helpers import apply, check_same, model, ops, run_ort, run_reference

RNG = np.random.default_rng(11)
NEWEST = onnx.defs.onnx_opset_version()


def random(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def old(graph: str, opset: int, initializers: Mapping[str, Any] | None = None) -> ModelProto:
    """A model of an older opset, with the IR version that came with it."""
    made = model(graph, initializers, opset)
    made.ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    return made


def raised(before: ModelProto, to: int = 23, valid: bool = True) -> ModelProto:
    """The model in opset `to`, after checks that it is marked so and that a second run changes nothing.

    With `valid` False the checker of onnx does not take the original, only the result.
    """
    if not valid:
        with pytest.raises(PassError, match="the model is not valid ONNX"):
            Pipeline([RewriteOpset(to)]).run(before)
        before = Pipeline([RewriteOpset(to)]).run(before, check=lambda before, after, step: "").model
        assert before.ir_version == onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", to]
    after = apply(before, RewriteOpset(to)).model
    assert [(item.domain, item.version) for item in after.opset_import if item.domain == ""] == [("", to)]
    assert after.ir_version == onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", to]
    return after


def listed(given: str) -> str:
    """An attribute list as ONNX text has it: nothing for none."""
    return f"<{given}>" if given else ""


def node_of(made: ModelProto, op: str) -> onnx.NodeProto:
    (found,) = [node for node in made.graph.node if node.op_type == op]
    return found


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("given", ["axes = [1, -1], keepdims = 0", "axes = [2]", "keepdims = 0", ""])
def test_axes_of_reductions_become_an_input(kind: str, given: str) -> None:
    rank = {"axes = [1, -1], keepdims = 0": "a", "keepdims = 0": ""}.get(given, "a,b,c")
    result = f"float[{rank}] y" if rank else "float y"
    before = old(f"g (float[2,n,4] x) => ({result}) {{ y = Reduce{kind}{listed(given)}(x) }}", 17)
    after = raised(before)
    assert "axes" not in attributes(after.graph.node[0])
    assert len(after.graph.node[0].input) == (2 if "axes" in given else 1)
    check_same(before, after, {"x": np.abs(random(2, 3, 4)) + 0.5})


@pytest.mark.parametrize("to", [18, 23, NEWEST])
def test_split_says_into_how_many_parts(to: int) -> None:
    before = old(
        """g (float[b,6] x) => (float[b,2] p, float[b,2] q, float[b,2] r, float[b,1] s, float[b,5] t) {
            p, q, r = Split<axis = 1>(x)
            s, t = Split<axis = 1>(x, sizes)
        }""",
        17,
        {"sizes": np.array([1, 5])},
    )
    after = raised(before, to)
    assert [attributes(node).get("num_outputs") for node in after.graph.node] == [3, None]
    check_same(before, after, {"x": random(3, 6)}, runner=run_reference)


@pytest.mark.parametrize(
    ("was", "now"), [("bilinear", "linear"), ("bicubic", "cubic"), ("nearest", "nearest")]
)
def test_grid_sample_modes_are_renamed(was: str, now: str) -> None:
    before = old(
        f'g (float[1,2,5,5] x, float[1,3,3,2] at) => (float[1,2,3,3] y) {{ y = GridSample<mode = "{was}">(x, at) }}',
        17,
    )
    after = raised(before)
    assert attributes(after.graph.node[0])["mode"].decode() == now
    check_same(before, after, {"x": random(1, 2, 5, 5), "at": RNG.uniform(-1, 1, (1, 3, 3, 2)).astype("f")})


@pytest.mark.parametrize("given", ["", "axis = 2", "axis = -2, inverse = 1"])
@pytest.mark.parametrize("length", [None, 5])
def test_the_axis_of_dft_becomes_an_input(given: str, length: int | None) -> None:
    inputs = "x" if length is None else "x, length"
    before = old(
        f"g (float[2,4,6,2] x) => (float[a,b,c,2] y) {{ y = DFT{listed(given)}({inputs}) }}",
        17,
        {} if length is None else {"length": np.array(length)},
    )
    after = raised(before)
    assert len(node_of(after, "DFT").input) == 3
    check_same(before, after, {"x": random(2, 4, 6, 2)}, 1e-6, run_reference)
    assert run_ort(after, {"x": random(2, 4, 6, 2)})[0].shape[-1] == 2


@pytest.mark.parametrize("channels", ["6", "c"])
@pytest.mark.parametrize("name", ["float", "float16", "double"])
def test_group_normalization_scales_channels(channels: str, name: str) -> None:
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[name]
    before = old(
        f"""g ({name}[n,{channels},h,w] x, {name}[3] scale, {name}[3] bias) => ({name}[n,{channels},h,w] y) {{
            y = GroupNormalization<num_groups = 3, epsilon = 0.01>(x, scale, bias)
        }}""",
        18,
    )
    after = raised(before)
    stash = attributes(node_of(after, "GroupNormalization")).get("stash_type", 1)
    assert stash == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert ("Shape" in ops(after)) == (channels == "c")
    feeds = {key: random(*shape, dtype=dtype) for key, shape in {"scale": (3,), "bias": (3,)}.items()}
    runner = run_reference if name == "float16" else run_ort  # ORT computes float16 in float32 where it can
    check_same(before, after, {"x": random(2, 6, 4, 5, dtype=dtype), **feeds}, runner=runner)


@pytest.mark.parametrize("last", ["1", "m"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_mask_of_one_column_is_spread_over_the_keys(last: str, cached: bool) -> None:
    """The text of opset 23 broadcasts the mask; ORT takes full masks only, the reference pads as in 24."""
    past = ", float[1,2,3,8] pk, float[1,2,3,8] pv" if cached else ""
    graph = f"""g (float[1,2,4,8] q, float[1,2,5,8] k, float[1,2,5,8] v, float[4,WIDTH] mask{past})
            => (float[1,2,4,8] y{", float[1,2,8,8] ok, float[1,2,8,8] ov" if cached else ""}) {{
            y{", ok, ov" if cached else ""} = Attention(q, k, v, mask{", pk, pv" if cached else ""})
        }}"""
    keys = 8 if cached else 5
    full, column = (old(graph.replace("WIDTH", width), 23) for width in (str(keys), last))
    assert ops(raised(full, 24)) == ["Attention"]
    after = raised(column, 24)
    assert "Expand" in ops(after)
    feeds = {"q": random(1, 2, 4, 8), "k": random(1, 2, 5, 8), "v": random(1, 2, 5, 8)}
    feeds |= {"pk": random(1, 2, 3, 8), "pv": random(1, 2, 3, 8)} if cached else {}
    mask = random(4, 1)
    want = run_reference(full, {**feeds, "mask": np.repeat(mask, keys, 1)})
    got = run_reference(after, {**feeds, "mask": mask})
    assert len(got) == len(want)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_other_changed_operators_stand_as_they_are() -> None:
    before = old(
        """g (float[1,2,6,6] x) => (float[1,2,9,9] y, uint8[1,2,6,6] z) {
            p = Pad<mode = "reflect">(x, pads)
            a = AveragePool<kernel_shape = [2, 2], ceil_mode = 1>(p)
            y = Resize<mode = "linear">(a, , , sizes)
            z = QuantizeLinear(x, scale, zero)
        }""",
        17,
        {
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "sizes": np.array([1, 2, 9, 9]),
            "scale": np.float32(0.05),
            "zero": np.uint8(128),
        },
    )
    for to in (18, 20, 23):
        after = raised(before, to)
        assert ops(after) == ops(before)
        assert list(map(attributes, after.graph.node)) == list(map(attributes, before.graph.node))
        check_same(before, after, {"x": random(1, 2, 6, 6)}, 1e-6)  # ORT sums in another order from opset 19


def test_subgraphs() -> None:
    before = old(
        """g (float[2,4] x, bool c) => (float[2,n] y) {
            y = If (c) <
                then_branch = t () => (float[2,1] a) { a = ReduceMean<axes = [1]>(x) },
                else_branch = e () => (float[2,m] b) { p, b = Split<axis = 1>(x) }>
        }""",
        17,
    )
    after = raised(before)
    bodies = {item.name: item.g for item in after.graph.node[0].attribute}
    assert len(bodies["then_branch"].node[-1].input) == 2
    assert attributes(bodies["else_branch"].node[-1])["num_outputs"] == 2
    for choice in (True, False):
        check_same(before, after, {"x": random(2, 4), "c": np.array(choice)})


FUNCTIONS = """<ir_version: 8, opset_import: ["": %d, "own": 1]>
g (float[2,3,4] x) => (float[a,b,c] y, float[2,3] z) {
    y = own.mean<over = [1]>(x)
    z = own.largest(x)
}
<domain: "own", opset_import: ["": 17]>
mean <over> (x) => (y) { y = ReduceMean<axes: ints = @over>(x) }
<domain: "own", opset_import: ["": %d]>
largest (x) => (y) { y = ReduceMax<axes = [2], keepdims = 0>(x) }
"""


@pytest.mark.parametrize("main", [17, 23])
def test_functions_with_opsets_of_their_own(main: int) -> None:
    before = onnx.parser.parse_model(FUNCTIONS % (main, 17))
    before.ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", main]
    after = raised(before, valid=main == 17)  # the checker wants one meaning of an operator per model
    imports = [item.version for body in after.functions for item in body.opset_import if item.domain == ""]
    assert imports == [23, 23]
    check_same(before, after, {"x": random(2, 3, 4)}, runner=run_reference)
    if main == 17:  # ORT takes functions of the opset of the model only
        check_same(before, after, {"x": random(2, 3, 4)})


def test_a_function_attribute_that_a_caller_leaves_out_is_refused() -> None:
    before = onnx.parser.parse_model((FUNCTIONS % (17, 17)).replace("<over = [1]>", ""))
    with pytest.raises(PassError, match=r"ReduceMean node .* in function 'mean': its axes is .* 'over'"):
        Pipeline([RewriteOpset()]).run(before)


def test_refuses_before_anything_changes() -> None:
    import onnx_graphsurgeon as gs

    before = old(
        """g (int32[4] x, float[2,4] f) => (uint8[4] y, float[2,1] z) {
            [quantize] y = QuantizeLinear(x, scale)
            [mean] z = ReduceMean<axes = [1]>(f)
        }""",
        17,
        {"scale": np.float32(0.5)},
    )
    graph = gs.import_onnx(before)
    with pytest.raises(PassError, match="QuantizeLinear node 'quantize': its input 'y_scale' must be"):
        RewriteOpset(21).run(graph)
    assert gs.export_onnx(graph).graph.node == gs.export_onnx(gs.import_onnx(before)).graph.node
    assert graph.opset == 17
    check_same(
        before, raised(before), {"x": np.arange(4, dtype=np.int32), "f": random(2, 4)}, 0, run_reference
    )


@pytest.mark.parametrize(
    ("graph", "opset", "to", "message"),
    [
        ("g (int32[2,3] x) => (int32 y) { y = ReduceLogSum<keepdims = 0>(x) }", 23, 28, "'data' may not be"),
        ("g (float[4] x) => (float8e4m3fnuz[4] y) { y = Cast<to = 18>(x) }", 23, 24, "infinity"),
        ("g (float[4] x) => (float[4] y) { y = Gelu(x) }", 17, 23, "gives the name a meaning"),
        ("g (float[4] x) => (float[4] y) { y = Neg(x) }", 23, 21, "does not go back"),
        ("g (float[4] x) => (float[4] y) { y = Neg(x) }", 6, 23, "takes opset 7 and later"),
        ("g (float[4] x) => (float[4] y) { y = Neg(x) }", 17, 99, "cannot go to opset 99"),
    ],
)
def test_refusals(graph: str, opset: int, to: int, message: str) -> None:
    import onnx_graphsurgeon as gs

    with pytest.raises(PassError, match=message):
        RewriteOpset(to).run(gs.import_onnx(old(graph, opset)))


def test_other_domains_are_left_alone() -> None:
    before = old("g (float[2,4] x) => (float[2,4] y) { a = trt.ReduceMean<axes = [1]>(x) y = Add(a, x) }", 17)
    before.opset_import.append(onnx.helper.make_opsetid("trt", 3))
    result = Pipeline([RewriteOpset()]).run(before, check=lambda before, after, step: "")
    assert attributes(result.model.graph.node[0]) == {"axes": [1]}
    assert {item.domain: item.version for item in result.model.opset_import} == {"": 23, "trt": 3}


def test_a_model_of_that_opset_is_unchanged() -> None:
    before = old("g (float[4] x) => (float[4] y) { y = Neg(x) }", 23)
    before.ir_version = 10
    result = Pipeline([RewriteOpset()]).run(before)
    assert result.changed == 0
    assert result.model.ir_version == 10
