"""Graphs run in processes that can be ended, while they are compared across passes."""

from __future__ import annotations

import onnx
import pytest

from diffc.apart import FORKS
from diffc.compile.import_check import ImportCheck
from passes import PassCheckError
from passes.canonical.fold_constants import FoldConstants

LOOP = """<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y)
<int64 count = {COUNT}, bool on = {1}> {
    y = Loop (count, on, x) <body = b (int64 i, bool go, float[2] held) => (bool next, float[2] sum) {
        next = Identity (go)
        sum = Tanh (held)
    }>
}"""


def loop(count: int) -> onnx.ModelProto:
    return onnx.parser.parse_model(LOOP.replace("COUNT", str(count)))


@pytest.mark.skipif(not FORKS, reason="only the first graph runs in a process that starts anew")
def test_a_graph_that_never_ends_after_a_pass_is_ended() -> None:
    check = ImportCheck()
    assert "outputs within" in check(loop(3), loop(3), FoldConstants())
    with pytest.raises(
        PassCheckError, match=r"after it, it did not run \(ONNX Runtime was stopped: it did not come"
    ):
        check(loop(3), loop(1 << 62), FoldConstants())
