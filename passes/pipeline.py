"""The pass runner: parses `name{key=value,...},name`, runs the passes, checks, times, counts and dumps."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import onnx_graphsurgeon as gs
from onnx import ModelProto

from passes.base import Pass, PassError, Refusal, collector_paused, find_pass, walk
from passes.files.atomic import write_bytes
from passes.graph.check import Check, check_structure
from passes.graph.from_onnx import import_graph, name_nodes
from passes.graph.inference import fill_types, infer_types
from passes.graph.to_onnx import export_graph

_STEP = re.compile(r"\s*([A-Za-z0-9_-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")
_RESERVED = set("{},;=")


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: places changed, seconds, node counts, notes, refusals and the line of the check.

    `graph` says which graph it rewrote, where a caller has several; empty for the one that all share.
    """

    name: str
    changed: int
    seconds: float
    nodes_before: int
    nodes_after: int
    notes: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    check: str
    graph: str = ""


@dataclass(frozen=True)
class PipelineResult:
    """The rewritten model and one record per pass, in order."""

    model: ModelProto
    records: tuple[PassRecord, ...]

    @property
    def changed(self) -> int:
        """Places changed by all passes together."""
        return sum(record.changed for record in self.records)


@dataclass(frozen=True)
class Event:
    """A pass starts (`record` is None) or is done; `index` counts from 0 to `total` - 1."""

    step: Pass
    index: int
    total: int
    record: PassRecord | None = None


class Pipeline:
    """An ordered list of passes. `str()` gives the text that `parse` reads."""

    def __init__(self, passes: Sequence[Pass]):
        self.passes = tuple(passes)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline written as `name{key=value,key=value},name`.

        Raises PassError that lists the known passes or options.
        """
        steps: list[Pass] = []
        position = 0
        while position < len(text.strip()):
            match = _STEP.match(text.strip(), position)
            if match is None:
                raise PassError(
                    f"cannot read the pipeline at {text.strip()[position:]!r}. "
                    "Expected: name{key=value,key=value},name"
                )
            steps.append(_make(match[1], match[2] or ""))
            position = match.end()
        if not steps:
            raise PassError("the pipeline is empty. Expected: name{key=value,key=value},name")
        return cls(steps)

    def __str__(self) -> str:
        return ",".join(_spell(step) for step in self.passes)

    def __repr__(self) -> str:
        return f"Pipeline.parse({str(self)!r})"

    def run(
        self,
        model: ModelProto,
        *,
        check: Check = check_structure,
        on_event: Callable[[Event], None] | None = None,
        dump: Path | None = None,
    ) -> PipelineResult:
        """Run all passes on a copy of `model`.

        `check` is made on the model as it comes and after each pass that changed something. With `dump`
        the model after each pass is written there as `00-name.onnx` (weights stay recipes). Raises
        PassCheckError when a check fails and PassError when a pass cannot take the model.
        """
        with collector_paused():
            return self._run(model, check, on_event, dump)

    def _run(
        self, model: ModelProto, check: Check, on_event: Callable[[Event], None] | None, dump: Path | None
    ) -> PipelineResult:
        graph = _import(model)
        current = export_graph(graph, model)
        check(None, current, None)
        records: list[PassRecord] = []
        for index, step in enumerate(self.passes):
            if on_event is not None:
                on_event(Event(step, index, len(self.passes)))
            if records and records[-1].changed:
                fill_types(graph, current)
            current, record = _run_step(step, graph, current, check)
            records.append(record)
            if dump is not None:
                _dump(dump, f"{index:02d}-{step.name}.onnx", current)
            if on_event is not None:
                on_event(Event(step, index, len(self.passes), record))
        return PipelineResult(current, tuple(records))


def _run_step(step: Pass, graph: gs.Graph, before: ModelProto, check: Check) -> tuple[ModelProto, PassRecord]:
    """Run one pass on `graph`; `before` is the same graph exported."""
    nodes = count_nodes(graph)
    started = time.perf_counter()
    result = step.run(graph)
    seconds, line, after = time.perf_counter() - started, "unchanged", before
    if result.changed:
        after = export_graph(graph, before)
        line = check(before, after, step)
    left = count_nodes(graph) if result.changed else nodes
    record = PassRecord(
        _spell(step), result.changed, seconds, nodes, left, result.notes, result.refusals, line
    )
    return after, record


def count_nodes(graph: gs.Graph) -> int:
    """Nodes of the graph and its subgraphs."""
    return sum(len(part.nodes) for part in walk(graph))


def _import(model: ModelProto) -> gs.Graph:
    """The graph with types on all tensors and a name of its own on every node."""
    graph = import_graph(infer_types(model))
    name_nodes(graph)
    return graph


def _dump(folder: Path, name: str, model: ModelProto) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / name, model.SerializeToString())


def _options(cls: type[Pass]) -> Iterator[tuple[Field[Any], Any]]:
    """The option fields of a pass with their types."""
    hints = get_type_hints(cls)
    return ((field, hints[field.name]) for field in fields(cls))


def _make(name: str, text: str) -> Pass:
    """The pass called `name` with the options in `text`."""
    cls = find_pass(name)
    known = {field.name: hint for field, hint in _options(cls)}
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known or not equals:
            choices = ", ".join(f"{k}={_type_name(t)}" for k, t in known.items()) or "none"
            raise PassError(f"pass {name!r} has no option {item!r}. Known options: {choices}")
        options[key] = _value(f"option {key!r} of pass {name!r}", value, known[key])
    try:
        return cls(**options)
    except TypeError as error:
        raise PassError(f"pass {name!r}: {error}") from error


def _type_name(hint: Any) -> str:
    return "str;str;..." if get_origin(hint) is tuple else str(hint.__name__)


def _value(what: str, text: str, hint: Any) -> Any:
    """`text` as a value of the annotated type."""
    if get_origin(hint) is tuple:
        return tuple(_value(what, part, get_args(hint)[0]) for part in text.split(";") if part)
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float, str):
        try:
            return hint(text)
        except ValueError:
            pass
    raise PassError(f"{what} is {text!r}; expected {'true or false' if hint is bool else _type_name(hint)}")


def _spell(step: Pass) -> str:
    """The pass as `parse` reads it; options at their default are left out."""
    items = []
    for field in fields(step):
        value = getattr(step, field.name)
        if field.default is MISSING or value != field.default:
            items.append(f"{field.name}={_text(value)}")
    return step.name + (f"{{{','.join(items)}}}" if items else "")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ";".join(_text(part) for part in value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if _RESERVED & set(text):
        raise PassError(
            f"option value {text!r} may not hold any of {' '.join(sorted(_RESERVED))}"
            ". Fix: leave these characters out"
        )
    return text
