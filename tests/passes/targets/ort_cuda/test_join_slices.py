"""join-slices: what was cut and joined again."""

import pytest

from passes.canonical.remove_unused import RemoveUnused
from passes.targets.ort_cuda.join_slices import JoinSlices
from tests.passes.graph_helpers import apply, check_same, model, ops, refused
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(17)


def joined(start: str = "n", offset: str = "zero", axis: int = 1) -> str:
    return f"""g (float[b,s,4] x, float[b,t,3] c) => (float[b,u,4] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] end = {{9223372036854775807}}> {{
        n = Shape<start = 1, end = 2>(c) m = Neg(n) m2 = Mul(n, n)
        f = Slice(x, {offset}, n, one) r = Slice(x, {start}, end, one)
        j = Concat<axis = {axis}>(f, r) y = Relu(j)
    }}"""


def test_joined_slices() -> None:
    before = model(joined())
    result = apply(before, JoinSlices(), RemoveUnused())
    assert ops(result.model) == ["Relu"]
    check_same(before, result.model, {"x": random(2, 5, 4), "c": random(2, 3, 3)})


_APART = "the second slice does not begin where the first ends"


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (joined(start="m2"), _APART),
        (joined(start="m"), _APART),
        (
            joined(start="m").replace("(x, zero, n, one)", "(x, zero, m, one)"),
            _APART,
        ),
        (joined(offset="one"), "the slices leave out the start or the end"),
        (joined().replace("n, end, one)", "n, one, one)"), "the slices leave out the start or the end"),
        (joined(axis=0), "the tensor is cut along another axis than the parts are joined"),
        (joined().replace("float[b,u,4] y)", "float[b,u,4] y, float[b,u,4] j)"), "the join is an output"),
        (joined().replace("Slice(x, n", "Slice(x2, n").replace("n = Shape", "x2 = Neg(x) n = Shape"), None),
    ],
)
def test_must_not_fire(graph: str, reason: str | None) -> None:
    assert refused(model(graph), JoinSlices()) == ({reason} if reason else set())
