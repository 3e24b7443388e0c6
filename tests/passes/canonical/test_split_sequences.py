import numpy as np
import pytest

from passes import Pipeline
from passes.canonical.split_sequences import SplitSequences
from tests.passes.graph_helpers import apply, check_same, model, ops

RNG = np.random.default_rng(3)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def parts(*indices: int) -> dict[str, np.ndarray]:
    return {f"i{n}": np.array(index) for n, index in enumerate(indices)}


def test_pieces_of_one_size() -> None:
    before = model(
        """g (float[b,12] x) => (float[b,m] y) {
            s = SplitToSequence<axis = 1>(x, four)
            p0 = SequenceAt(s, i0)
            p1 = SequenceAt(s, i1)
            p2 = SequenceAt(s, i2)
            a = Mul(p0, p1)
            y = Sub(a, p2)
        }""",
        {"four": np.array(4), **parts(0, -2, 2)},
    )
    result = apply(before, SplitSequences())
    assert ops(result.model) == ["Split", "Mul", "Sub"]
    for batch in (1, 3):
        check_same(before, result.model, {"x": random(batch, 12)})


def test_last_piece_may_be_shorter() -> None:
    before = model(
        """g (float[b,10] x) => (float[b,2] y) {
            s = SplitToSequence<axis = -1>(x, four)
            last = SequenceAt(s, i0)
            y = Neg(last)
        }""",
        {"four": np.array(4), **parts(-1)},
    )
    result = apply(before, SplitSequences())
    assert ops(result.model) == ["Split", "Neg"]
    check_same(before, result.model, {"x": random(2, 10)})


def test_constant_sizes_on_a_dynamic_axis() -> None:
    before = model(
        """g (float[n,3] x) => (float[m,3] y) {
            sizes = Constant<value_ints = [2, 3]>()
            index = Constant<value_int = 1>()
            s = SplitToSequence<axis = 0>(x, sizes)
            p = SequenceAt(s, index)
            y = Neg(p)
        }"""
    )
    result = apply(before, SplitSequences())
    assert "Split" in ops(result.model)
    assert "SequenceAt" not in ops(result.model)
    check_same(before, result.model, {"x": random(5, 3)})


def test_sizes_of_run_time() -> None:
    before = model(
        """g (float[b,n,3] x, float[b,m,3] z) => (float[b,n2,3] y, float[b,m2,3] w) {
            xs = Shape<start = 1, end = 2>(x)
            zs = Shape<start = 1, end = 2>(z)
            sizes = Concat<axis = 0>(xs, zs)
            both = Concat<axis = 1>(x, z)
            s = SplitToSequence<axis = 1>(both, sizes)
            p0 = SequenceAt(s, i0)
            p1 = SequenceAt(s, i1)
            y = Neg(p0)
            w = Exp(p1)
        }""",
        parts(0, 1),
    )
    result = apply(before, SplitSequences())
    assert "Split" in ops(result.model)
    assert not {"SplitToSequence", "SequenceAt"} & set(ops(result.model))
    for n, m in ((2, 5), (7, 1)):
        check_same(before, result.model, {"x": random(2, n, 3), "z": random(2, m, 3)})


@pytest.mark.parametrize("keepdims", [0, 1])
def test_pieces_of_one_without_sizes(keepdims: int) -> None:
    shape = "float[b]" if keepdims == 0 else "float[b,1]"
    before = model(
        f"""g (float[b,3] x) => ({shape} y) {{
            s = SplitToSequence<axis = 1, keepdims = {keepdims}>(x)
            p0 = SequenceAt(s, i0)
            p2 = SequenceAt(s, i1)
            y = Sub(p0, p2)
        }}""",
        parts(0, 2),
    )
    result = apply(before, SplitSequences())
    assert "Split" in ops(result.model)
    assert ops(result.model).count("Squeeze") == (0 if keepdims else 3)
    check_same(before, result.model, {"x": random(4, 3)})


def test_sequence_construct_at_length_and_concat() -> None:
    before = model(
        """g (float[b,3] x, float[b,3] z) => (float[b,6] y, float[2,b,3] w, float[b,3] v, int64 n) {
            s = SequenceConstruct(x, z)
            y = ConcatFromSequence<axis = 1>(s)
            w = ConcatFromSequence<axis = 0, new_axis = 1>(s)
            v = SequenceAt(s, i0)
            n = SequenceLength(s)
        }""",
        parts(1),
    )
    result = apply(before, SplitSequences())
    assert not any("equence" in op for op in ops(result.model))
    check_same(before, result.model, {"x": random(2, 3), "z": random(2, 3)})


@pytest.mark.parametrize(
    ("graph", "constants", "reason"),
    [
        (
            """g (float[b,6] x, int64 i) => (float[b,m] y) {
                s = SplitToSequence<axis = 1>(x, size)  p = SequenceAt(s, i)  y = Neg(p) }""",
            {"size": np.array(3)},
            "index of SequenceAt",
        ),
        (
            """g (float[b,n] x) => (float[b,m] y) {
                s = SplitToSequence<axis = 1>(x, size)  p = SequenceAt(s, i0)  y = Neg(p) }""",
            {"size": np.array(3), **parts(0)},
            "length of axis 1",
        ),
        (
            """g (float[b,6] x, int64[k] sizes) => (float[b,m] y) {
                s = SplitToSequence<axis = 1>(x, sizes)  p = SequenceAt(s, i0)  y = Neg(p) }""",
            parts(0),
            "number of split sizes 'sizes'",
        ),
        (
            """g (float[b,6] x) => (float[b,m] y) {
                s = SplitToSequence<axis = 1>(x, size)  t = SequenceErase(s, i0)
                p = SequenceAt(t, i0)  y = Neg(p) }""",
            {"size": np.array(3), **parts(0)},
            "SequenceErase",
        ),
        (
            "g (float[b,6] x) => (seq(float[b,m]) s) { s = SplitToSequence<axis = 1>(x, size) }",
            {"size": np.array(3)},
            "graph output",
        ),
    ],
)
def test_refuses(graph: str, constants: dict[str, np.ndarray], reason: str) -> None:
    before = model(graph, constants)
    result = apply(before, SplitSequences())
    assert result.changed == 0
    assert ops(result.model) == ops(before)
    (refusal,) = result.records[0].refusals
    assert reason in refusal.reason


def test_a_piece_that_is_a_graph_output_keeps_its_name() -> None:
    before = model(
        """g (float[b,6] x) => (float[b,3] y) {
            s = SplitToSequence<axis = 1>(x, size)
            y = SequenceAt(s, i0)
        }""",
        {"size": np.array(3), **parts(1)},
    )
    result = apply(before, SplitSequences())
    assert ops(result.model) == ["Split", "Identity"]
    assert [out.name for out in result.model.graph.output] == ["y"]
    check_same(before, result.model, {"x": random(2, 6)})


def test_a_body_reads_a_sequence_from_outside() -> None:
    before = model(
        """g (float[b,12] x, bool c) => (float[b,k] y) {
            s = SplitToSequence<axis = 1>(x, four)
            y = If (c) <
                then_branch = t () => (float[b,12] p) { j = ConcatFromSequence<axis = 1>(s) p = Neg(j) },
                else_branch = e () => (float[b,4] q) { q = SequenceAt(s, i0) }
            >
        }""",
        {"four": np.array(4), **parts(1)},
    )
    result = Pipeline([SplitSequences()]).run(before)
    assert ops(result.model) == ["Split", "If"]
    bodies = [[node.op_type for node in a.g.node] for a in result.model.graph.node[1].attribute]
    assert sorted(bodies) == [["Concat", "Neg"], ["Identity"]]
    for taken in (True, False):
        check_same(before, result.model, {"x": random(3, 12), "c": np.array(taken)})
