"""Operators as opsets 7 to 16 had them, raised: the same numbers before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from passes import PassError, Pipeline
from passes.importing.rewrite_opset import NO_KERNEL_22, RewriteOpset
from passes.importing.schema_changes import changes
from tests.passes.graph_helpers import apply, check_same, materialize, run_ort
from tests.passes.importing.test_rewrite_opset import old, raised, random

IMAGE = "float[2,3,4,6] x"
CASES = {
    "clip": (7, f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Clip<min = -0.5, max = 0.25>(x) }}"),
    "clip below": (9, f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Clip<min = -0.5>(x) }}"),
    "dropout": (10, f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Dropout<ratio = 0.75>(x) }}"),
    "softmax": (11, f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Softmax<axis = 3>(x) }}"),
    "softmax over the rest": (11, f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Softmax(x) }}"),
    "log softmax": (7, f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y = LogSoftmax<axis = 2>(x) }}"),
    "pad": (10, f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Pad<pads = [0,0,1,0,0,0,0,2], value = 1.5>(x) }}"),
    "slice": (
        9,
        f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Slice<axes = [3], starts = [1], ends = [5]>(x) }}",
    ),
    "split": (
        11,
        f"g ({IMAGE}) => (float[a,b,c,d] y) {{ p, q = Split<axis = 3, split = [2, 4]>(x) y = Relu(q) }}",
    ),
    "squeeze": (11, f"g ({IMAGE}) => (float[a,b,c,d,e] y) {{ y = Unsqueeze<axes = [2]>(x) }}"),
    "sum": (11, f"g ({IMAGE}) => (float[a,b] y) {{ y = ReduceSum<axes = [2, -1], keepdims = 0>(x) }}"),
    "top": (9, f"g ({IMAGE}) => (float[a,b,c,d] y) {{ y, at = TopK<k = 2, axis = 3>(x) }}"),
    "norm": (
        8,
        f"""g ({IMAGE}, float[3] m) => (float[a,b,c,d] y) {{
            v = Mul(m, m) y = BatchNormalization<spatial = 1>(x, m, m, m, v) }}""",
    ),
    "upsample": (
        7,
        f'g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Upsample<mode = "nearest", scales = [1.0,1.0,2.0,3.0]>(x) }}',
    ),
    "argmax": (11, f"g ({IMAGE}) => (int64[a,b,c,d] y) {{ y = ArgMax<axis = 1>(x) }}"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_before(case: str) -> None:
    opset, text = CASES[case]
    before = old(text, opset)
    after = raised(before)
    feeds = {"x": random(2, 3, 4, 6)} | ({"m": random(3)} if "m)" in text.partition("=>")[0] else {})
    check_same(before, after, feeds)


@pytest.mark.parametrize("kind", ["nearest", "linear"])
def test_resize_of_opset_10_keeps_its_coordinates(kind: str) -> None:
    before = old(
        f'g ({IMAGE}) => (float[a,b,c,d] y) {{ y = Resize<mode = "{kind}">(x, s) }}',
        10,
        {"s": np.array([1, 1, 2, 3], np.float32)},
    )
    check_same(before, raised(before), {"x": random(2, 3, 4, 6)})


@pytest.mark.parametrize(
    ("graph", "opset", "message"),
    [
        ("g (float[4] x) => (float[4] y) { y = Neg(x) }", 6, "takes opset 7 and later. Fix: export it again"),
        (
            "g (float[2,3,4,6] x, float[4] s) => (float[a,b,c,d] y) { y = Resize(x, s) }",
            10,
            "Resize node 'n': its scales are computed",
        ),
        (
            "g (float[2,3] x, float[3] m) => (float[2,3] y) { y = BatchNormalization<spatial = 0>(x, m, m, m, m) }",
            8,
            "spatial=0",
        ),
    ],
)
def test_refusals(graph: str, opset: int, message: str) -> None:
    import onnx_graphsurgeon as gs

    made = old(graph, opset)
    made.graph.node[0].name = "n"
    with pytest.raises(PassError, match=message):
        RewriteOpset().run(gs.import_onnx(made))


@pytest.mark.parametrize("source", range(7, 17))
def test_what_is_not_known_is_little(source: int) -> None:
    assert {change.op for change in changes(source, 17) if change.kind == "unknown"} <= {"Scan"}


NOISY = "g (float[2,3] x) => (float[2,3] y) { n = RandomNormalLike(x) z = Mul(n, zero) y = Add(x, z) }"


def noisy(opset: int) -> onnx.ModelProto:
    return old(NOISY, opset, {"zero": np.zeros((), np.float32)})


def test_an_operator_without_a_kernel_at_the_newest_opset_holds_the_opset_back() -> None:
    before = noisy(17)
    result = Pipeline([RewriteOpset()]).run(before)
    assert result.model.opset_import[0].version == 21
    assert "RandomNormalLike of opset 22" in result.records[0].notes[-1]
    x = random(2, 3)
    assert np.array_equal(run_ort(result.model, {"x": x})[0], x)
    assert apply(result.model, RewriteOpset()).changed == 0


def test_an_opset_that_is_asked_for_is_obeyed_and_the_note_warns() -> None:
    result = Pipeline([RewriteOpset(23)]).run(noisy(17))
    assert result.model.opset_import[0].version == 23
    assert "will not run there" in result.records[0].notes[-1]


OPERANDS: dict[str, tuple[str, str]] = {
    "RandomNormal": ("", "<shape = [2]>"),
    "RandomUniform": ("", "<shape = [2]>"),
    "Multinomial": ("x", "<sample_size = 2>"),
    "RoiAlign": ("i, r, b", ""),
    "MaxRoiPool": ("i, f", "<pooled_shape = [2, 2]>"),
    "GlobalLpPool": ("i", ""),
}


@pytest.mark.parametrize("op", sorted(NO_KERNEL_22))
def test_the_table_is_what_onnx_runtime_lacks(op: str) -> None:
    """Where it gets a kernel, the name can go from the table."""
    import onnxruntime as ort

    inputs, given = OPERANDS.get(op, ("x", ""))
    kind = "int32" if op == "Multinomial" else "float"
    values = "float[2,3] x, float[1,2,4,4] i, float[1,4] r, float[1,5] f, int64[1] b"
    text = f"g ({values}) => ({kind} y) {{ y = {op}{given}({inputs}) }}"
    options = ort.SessionOptions()
    options.log_severity_level = 4

    def opens(opset: int) -> Any:
        made = materialize(old(text, opset))
        made.graph.output[0].type.tensor_type.ClearField("shape")
        return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])

    opens(21)
    with pytest.raises(Exception, match="Could not find an implementation"):
        opens(22)
