"""Building, running and comparing small graphs in the tests of passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto

from passes import Pass, Pipeline, PipelineResult
from passes.base import walk
from passes.graph.from_onnx import import_graph
from passes.graph.inference import infer_types
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

Values = Mapping[str, Any]


def model(graph: str, initializers: Values | None = None, opset: int = 23) -> ModelProto:
    """A model from ONNX text; arrays become inline initializers, recipes stay recipes."""
    made = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": {opset}]> {graph}')
    for name, value in (initializers or {}).items():
        if isinstance(value, Recipe):
            made.graph.initializer.append(value.to_tensor(name))
        else:
            made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return made


def typed(made: ModelProto) -> ModelProto:
    """The model with the shapes that ONNX infers, as a traced one has them."""
    return onnx.shape_inference.infer_shapes(made, data_prop=True)


def graph_of(text: str, initializers: Values | None = None) -> gs.Graph:
    """The graph of ONNX text as passes get it: types, shapes, named nodes. Operators of com.microsoft are allowed."""
    made = model(text, initializers)
    made.opset_import.add(domain="com.microsoft", version=1)
    graph = import_graph(infer_types(made))
    for part in walk(graph):
        for node in part.nodes:
            node.name = node.name or f"{node.op}_{node.outputs[0].name}"
    return graph


def made_by(graph: gs.Graph, output: str) -> gs.Node:
    """The node whose output has that name."""
    return next(node for node in graph.nodes if any(tensor.name == output for tensor in node.outputs))


def pick(rng: np.random.Generator, *choices: Any) -> Any:
    """One of the choices, all as likely."""
    return choices[rng.integers(len(choices))]


def refused(made: ModelProto, *steps: Pass) -> set[str]:
    """The reasons of the last of the passes, which must change nothing."""
    record = Pipeline(steps).run(made).records[-1]
    assert record.changed == 0, record
    return {refusal.reason for refusal in record.refusals}


def materialize(made: ModelProto) -> ModelProto:
    """The model with its recipes computed."""
    copy = ModelProto()
    copy.CopyFrom(made)
    for tensor in copy.graph.initializer:
        recipe = Recipe.of_tensor(tensor)
        if recipe is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(evaluate(recipe)), tensor.name))
    return copy


def run_ort(made: ModelProto, feeds: Values) -> list[Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        materialize(made).SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feeds)))


def run_reference(made: ModelProto, feeds: Values) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    return list(ReferenceEvaluator(materialize(made)).run(None, dict(feeds)))


def error(got: Any, want: Any) -> float:
    """Relative L2 error; infinite when shapes, types or the places of NaN and infinity differ."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return float("inf")
    norm = float(np.linalg.norm(want[finite]))
    return float(np.linalg.norm(got[finite] - want[finite])) / (norm if norm else 1.0)


def check_same(
    before: ModelProto,
    after: ModelProto,
    feeds: Values,
    tolerance: float = 0.0,
    runner: Callable[[ModelProto, Values], list[Any]] = run_ort,
    reference: Callable[[ModelProto, Values], list[Any]] | None = None,
) -> None:
    """Fail unless both models give the same outputs to within the relative L2 `tolerance`."""
    want, got = (reference or runner)(before, feeds), runner(after, feeds)
    assert len(want) == len(got) > 0
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert np.any(np.asarray(b) != 0), f"output {index} is all zeros and proves nothing"
        assert error(a, b) <= tolerance, f"output {index}: {error(a, b)}"


def apply(made: ModelProto, *steps: Pass) -> PipelineResult:
    """Run the passes, then run them again and fail if anything changes."""
    result = Pipeline(steps).run(made)
    again = Pipeline(steps).run(result.model)
    assert again.changed == 0, again.records
    assert again.model.graph.node == result.model.graph.node
    return result


def ops(made: ModelProto) -> list[str]:
    return [node.op_type for node in made.graph.node]


def recipes(made: ModelProto) -> dict[str, Recipe]:
    found = {tensor.name: Recipe.of_tensor(tensor) for tensor in made.graph.initializer}
    return {name: recipe for name, recipe in found.items() if recipe is not None}


def count_calls(work: Callable[[], object]) -> int:
    """Python function calls that `work` makes: a cost that no other load on the machine can change."""
    calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls
