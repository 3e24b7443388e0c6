"""Validation in bounded memory gives what validation of the whole gives, and finds damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from diffc.compile import plan
from diffc.compile.plan import CompileRequest
from diffc.compile.spine import compile_model
from diffc.validate.float32 import cpu_session, feed, unrounded_copy
from diffc.validate.reports import UNROUNDED
from diffc.validate.segmented import SegmentedSession
from diffc.validate.streamed import StreamedReference, validate_streamed
from diffc.validate.torch_reference import TorchReference, validation_shapes
from passes.storage import load
from tests.conftest import Cell, Cells

CELLS = [
    ("tiny-sd3", "fp8"),
    ("tiny-flux", "int8"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("tiny-flux", "none"), ("tiny-flux", "nvfp4_svdquant"), ("tiny-sdxl", "int8"))
    ),
]
LIMIT = 200_000
"""Bytes of weights in a segment: tiny models have 3 to 9 MB."""


def reference_of(cell: Cell) -> StreamedReference:
    return StreamedReference(cell.plan.source, cell.plan.dtype, cell.checkpoint)


@pytest.mark.parametrize(("model", "format"), CELLS)
def test_streamed_is_the_whole_reference_and_the_whole_graph(
    model: str, format: str, compiled: Cells
) -> None:
    cell = compiled(model, format)
    shape = validation_shapes(cell.plan.source)[0]
    streamed, whole = reference_of(cell), TorchReference(cell.plan.source, cell.plan.dtype, cell.checkpoint)
    for unrounded in (True, False):
        drawn, expected = streamed.outputs(shape, 3, unrounded=unrounded)
        for name, array in whole.outputs(shape, 3, unrounded=unrounded)[1].items():
            np.testing.assert_array_equal(array, expected[name])
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    graph = unrounded_copy(load(cell.folder / "model.onnx"))
    values: dict[str, Any] = {name: value.float().numpy() for name, value in drawn.items()}
    session = SegmentedSession(graph, LIMIT)
    assert len(session.pieces) > 8
    with cpu_session(graph) as at_once:
        for name, array in at_once.run(feed(graph, values)).items():
            np.testing.assert_allclose(session.run(feed(graph, values))[name], array, rtol=1e-5, atol=1e-5)


def test_reports_pass_and_name_what_was_compared(compiled: Cells) -> None:
    cell = compiled("tiny-sd3", "fp8")
    (report,) = validate_streamed(
        load(cell.folder / "model.onnx"), reference_of(cell), format="fp8", seed=5, limit=LIMIT
    )
    assert report.passed
    assert report.arithmetic == UNROUNDED


def test_a_wrong_scale_is_found(compiled: Cells) -> None:
    cell = compiled("tiny-sd3", "fp8")
    model = load(cell.folder / "model.onnx")
    scale = next(
        t
        for t in model.graph.initializer
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[1] == t.name and "to_v.weight_quantizer" in n.name
    )
    array = numpy_helper.to_array(scale)
    scale.CopyFrom(numpy_helper.from_array((array * 1.01).astype(array.dtype), scale.name))
    (report,) = validate_streamed(model, reference_of(cell), format="fp8", seed=5, limit=LIMIT)
    assert not report.passed
    assert not report.chaotic


@pytest.mark.compiles
def test_a_compile_without_memory_for_the_whole_streams_its_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "VALIDATION_BYTES", 1 << 40)  # what a parameter takes: far more than is free
    done = compile_model(CompileRequest("tiny-sd3", tmp_path / "sd3"))
    (report,) = done.validation
    assert report.passed
    assert report.arithmetic == "float32"
    assert (tmp_path / "sd3" / "validation" / "b1-64x96-t24-float32-torch.json").is_file()
