"""Judges the pass rewrite-opset by the ONNX project's own node tests of older opsets.

    pip download --no-deps --dest wheels onnx==1.12.0        (and 1.13.1 1.14.1 1.15.0 1.16.2 1.17.0 1.18.0)
    python -m tools.prove.opset_nodetests wheels [--to 23] [--list]

Each onnx wheel carries the node tests of its time; a case that is the same in two wheels counts once. Every case
of opset 17 up to `--to` is run before and after the rewrite, on the reference evaluator or, where that cannot
run it, on ONNX Runtime: the results must be equal bit for bit (random operators: types and shapes), and where
those before agree with the shipped outputs those after must as well. A case of an opset before 17 whose
operators did not change until 17 means the same in 17, and is judged as such, in a row of its own. The exit
code is 1 on any difference.
"""

from __future__ import annotations

import argparse
import sys
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto

from passes import PassCheckError, PassError, Pipeline
from passes.graph.from_onnx import import_graph
from passes.graph.inference import infer_types
from passes.graph.to_onnx import export_graph
from passes.importing.rewrite_opset import OLDEST, RewriteOpset
from passes.weights.recipe import default_opset

FOLDER = "onnx/backend/test/data/node/"
RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
RANDOM |= {"RandomUniformLike"}
Run = Callable[[ModelProto, list[Any]], list[Any]]


@dataclass(frozen=True)
class Case:
    """One node test: its model and the data sets as (inputs, expected outputs)."""

    name: str
    model: ModelProto
    data: list[tuple[list[Any], list[Any]]]


class UnreadableError(Exception):
    """A shipped tensor that the installed onnx cannot read."""


def main() -> int:
    """Judge every wheel of a folder; 1 when a result differs, 2 when there is nothing to judge."""
    parser = argparse.ArgumentParser(description="Judge rewrite-opset by the node tests in onnx wheels.")
    parser.add_argument("wheels", type=Path, help="folder with onnx wheels")
    parser.add_argument("--to", type=int, default=23, help="opset to convert to")
    parser.add_argument("--list", action="store_true", help="name the skipped and refused cases")
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    said: dict[str, list[str]] = defaultdict(list)
    seen: set[int] = set()
    for wheel in sorted(wanted.wheels.glob("onnx-*.whl")):
        for row, case, readable in cases(wheel, wanted.to, seen):
            verdict, reason = judge(case, wanted.to) if readable else ("skipped", "its data cannot be read")
            rows[row][verdict] += 1
            said[f"{verdict}: {reason}"].append(f"{wheel.name.split('-')[1]} {case.name}")
    report(rows, said, wanted.list)
    if not rows:
        print(f"no onnx-*.whl with node tests of opset {OLDEST} to {wanted.to - 1} in {wanted.wheels}")
        return 2
    return int(any(row["DIFFERENT"] for row in rows.values()))


def report(rows: dict[str, Counter[str]], said: dict[str, list[str]], everything: bool) -> None:
    """Print the table and the reasons."""
    print(
        f"{'opset':<14}{'cases':>7}{'converted':>11}{'same':>7}{'DIFFERENT':>11}{'refused':>9}{'skipped':>9}"
    )
    total = Counter[str]()
    for row, counts in (*sorted(rows.items()), ("all", total)):
        total += Counter() if row == "all" else counts
        cells = (counts.total(), counts["same"] + counts["DIFFERENT"], counts["same"])
        print(
            f"{row:<14}{cells[0]:>7}{cells[1]:>11}{cells[2]:>7}{counts['DIFFERENT']:>11}"
            f"{counts['refused']:>9}{counts['skipped']:>9}"
        )
    for what, names in sorted(said.items()):
        if not what.startswith("same"):
            shown = names if everything or what.startswith("DIFFERENT") else names[:3]
            print(f"{what} ({len(names)}): {', '.join(shown)}{'' if shown == names else ', ...'}")


def cases(wheel: Path, to: int, seen: set[int]) -> Iterator[tuple[str, Case, bool]]:
    """The row of the table, the case, and whether its data could be read; adds to `seen`, skips what is there."""
    with zipfile.ZipFile(wheel) as held:
        files = held.namelist()
        for path in (p for p in files if p.startswith(FOLDER) and p.endswith("/model.onnx")):
            folder = path.removesuffix("model.onnx")
            model = ModelProto.FromString(held.read(path))
            row = _row(model, to)
            if row is None:
                continue
            model = _as_of(model, OLDEST) if row.startswith("<") else model
            mine = [f for f in files if f.startswith(f"{folder}test_data_set_") and f.endswith(".pb")]
            contents = {f: held.read(f) for f in mine}
            key = hash((held.read(path), *sorted(contents.values())))
            if key in seen:
                continue
            seen.add(key)
            try:
                data = _data(model, contents)
            except UnreadableError:
                yield row, Case(PurePosixPath(folder).name, model, []), False
                continue
            yield row, Case(PurePosixPath(folder).name, model, data), True


def _row(model: ModelProto, to: int) -> str | None:
    """Which row counts this model; None for another opset, or one that means something else in `OLDEST`."""
    opset = default_opset(model.opset_import)
    if opset is None or opset >= to:
        return None
    if opset >= OLDEST:
        return f"{opset}"
    for op in _operators(model.graph):
        if onnx.defs.has(op, OLDEST, "") and _since(op, opset) != _since(op, OLDEST):
            return None
    return f"<{OLDEST} as {OLDEST}"


def _since(op: str, opset: int) -> int | None:
    try:
        return int(onnx.defs.get_schema(op, opset, "").since_version)
    except onnx.defs.SchemaError:
        return None


def _operators(graph: GraphProto) -> Iterator[str]:
    """Default-domain operators of a graph and its subgraphs."""
    for node in graph.node:
        if node.domain in ("", "ai.onnx"):
            yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _operators(attribute.g)


def _as_of(model: ModelProto, opset: int) -> ModelProto:
    """The model with another default opset."""
    for item in model.opset_import:
        item.version = opset if item.domain in ("", "ai.onnx") else item.version
    model.ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    return model


def _data(model: ModelProto, files: dict[str, bytes]) -> list[tuple[list[Any], list[Any]]]:
    """The data sets of a case."""
    sets = sorted({path.rsplit("/", 1)[0] for path in files})
    found = []
    for folder in sets:
        pair = []
        for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
            paths = [f"{folder}/{kind}_{index}.pb" for index in range(len(values))]
            pair.append([_read(files.get(path), v) for path, v in zip(paths, values, strict=True)])
        found.append((pair[0], pair[1]))
    return found


def _read(data: bytes | None, value: onnx.ValueInfoProto) -> Any:
    """A value of the type that the model declares. Raises UnreadableError."""
    if data is None:
        raise UnreadableError(value.name)
    try:
        if value.type.HasField("sequence_type"):
            return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(data))
        if value.type.HasField("optional_type"):
            return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
        return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(data))
    except Exception as error:
        raise UnreadableError(value.name) from error


def judge(case: Case, to: int) -> tuple[str, str]:
    """The verdict (same, DIFFERENT, refused or skipped) and the reason."""
    runner, before = _first_run(case, to)
    if runner is None:
        return "skipped", "neither evaluator runs the original"
    try:
        converted = _convert(case.model, to)
    except Exception as error:
        if isinstance(error, PassError) and not isinstance(error, PassCheckError):
            return "refused", str(error)
        if _survives(case, runner, before):
            return "DIFFERENT", f"the pass failed: {type(error).__name__}: {str(error)[:200]}"
        return "skipped", "graphsurgeon does not carry the original through"
    problem = _compare(case, runner, before, converted, to)
    if problem is None:
        return "same", ""
    if not _survives(case, runner, before):
        return "skipped", "graphsurgeon does not carry the original through"
    return "DIFFERENT", problem


def _convert(model: ModelProto, to: int) -> ModelProto:
    """The converted model, checked; unchecked where the checker of onnx does not even take the original."""
    pipeline = Pipeline([RewriteOpset(to)])
    try:
        return pipeline.run(model).model
    except PassError as error:
        if "the model is not valid ONNX" not in str(error):
            raise
        return pipeline.run(model, check=lambda before, after, step: "unchecked").model


def _compare(case: Case, runner: Run, before: list[list[Any]], after: ModelProto, to: int) -> str | None:
    """What is wrong with the converted model; None when nothing is."""
    if (default_opset(after.opset_import), after.ir_version) != (
        to,
        onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", to],
    ):
        return f"opset {default_opset(after.opset_import)} and IR version {after.ir_version}"
    loose = any(op in RANDOM for op in _operators(case.model.graph))
    for (inputs, expected), want in zip(case.data, before, strict=True):
        try:
            got = runner(after, inputs)
        except Exception as error:
            return f"does not run: {type(error).__name__}: {str(error)[:200]}"
        if not _equal(got, want, 0.0, loose):
            return "results differ from those before"
        if _equal(want, expected, 1e-3, loose) and not _equal(got, expected, 1e-3, loose):
            return "results differ from the shipped ones"
    return None


def _survives(case: Case, runner: Run, before: list[list[Any]]) -> bool:
    """Whether import and export alone, without any pass, leave the results as they are."""
    try:
        copy = export_graph(import_graph(infer_types(case.model)), case.model)
        return all(
            _equal(runner(copy, inputs), want, 0.0, False)
            for (inputs, _), want in zip(case.data, before, strict=True)
        )
    except Exception:
        return False


def _first_run(case: Case, to: int) -> tuple[Run | None, list[list[Any]]]:
    """The evaluator that runs the original and gives the shipped outputs, else one that runs it at all."""
    ran: list[tuple[Run, list[list[Any]]]] = []
    loose = any(op in RANDOM for op in _operators(case.model.graph))
    for runner in (reference, runtime) if _runtime_takes(to) else (reference,):
        try:
            results = [runner(case.model, inputs) for inputs, _ in case.data]
        except Exception:
            continue
        ran.append((runner, results))
        if all(_equal(r, want, 1e-3, loose) for r, (_, want) in zip(results, case.data, strict=True)):
            return ran[-1]
    return ran[0] if ran else (None, [])


@cache
def _runtime_takes(opset: int) -> bool:
    """Whether ONNX Runtime loads a model of that opset."""
    graph = onnx.parser.parse_graph("g (float[1] x) => (float[1] y) { y = Add(x, x) }")
    imports = [onnx.helper.make_opsetid("", opset)]
    ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    try:
        runtime(
            onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir_version), [np.ones(1, "f")]
        )
    except Exception:
        return False
    return True


def reference(model: ModelProto, inputs: list[Any]) -> list[Any]:
    """Run a model on the ONNX reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    names = [value.name for value in model.graph.input]
    return list(ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True))))


def runtime(model: ModelProto, inputs: list[Any]) -> list[Any]:
    """Run a model on the CPU of ONNX Runtime, one thread, no graph optimization."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


def _equal(got: Any, want: Any, tolerance: float, loose: bool) -> bool:
    """Whether two results are equal: types, shapes and (unless `loose`) values to within `tolerance`."""
    if isinstance(got, (list, tuple)) or isinstance(want, (list, tuple)):
        both = isinstance(got, (list, tuple)) and isinstance(want, (list, tuple)) and len(got) == len(want)
        return both and all(_equal(a, b, tolerance, loose) for a, b in zip(got, want, strict=True))
    if got is None or want is None:
        return got is None and want is None
    a, b = np.asarray(got), np.asarray(want)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if loose:
        return True
    if a.dtype.kind in "OSUb":
        return bool(np.all(a == b))
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    return bool(np.allclose(a.astype(wide), b.astype(wide), tolerance, tolerance * 1e-2, equal_nan=True))


if __name__ == "__main__":
    sys.exit(main())
