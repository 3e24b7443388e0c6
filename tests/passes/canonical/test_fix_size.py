"""fix-size: a named axis becomes a number, of inputs and outputs alike."""

import pytest

from passes import PassError
from passes.canonical.fix_size import FixSize
from tests.passes.graph_helpers import apply, check_same, model, run_ort
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(12)


def test_fixed_size() -> None:
    before = model("g (float[batch,s,4] x) => (float[batch,s,4] y) { r = Relu(x) y = Neg(r) }")
    assert apply(before, FixSize()).changed == 0
    fixed = apply(before, FixSize("batch", 2)).model
    for value in (*fixed.graph.input, *fixed.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert (dims[0].dim_value, dims[1].dim_param) == (2, "s")
    check_same(before, fixed, {"x": random(2, 3, 4)})
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        run_ort(fixed, {"x": random(3, 3, 4)})
    with pytest.raises(PassError, match="1 or more"):
        apply(before, FixSize("batch", -1))
