"""Compiles that many tests read: each cell of model, format and type is made once a session."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import pytest

from diffc.artifact import Artifact
from diffc.compile import CompileRequest, CompileResult, Plan, check, compile_model
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.formats import FORMATS

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
SMS = (86, 89, 120)
PROMPTS = ("a red fox asleep in fresh snow", "a wooden sign that reads OPEN")


@dataclass(frozen=True)
class Cell:
    """One compile: the request, what came back, and what is on disk."""

    request: CompileRequest
    result: CompileResult

    @property
    def folder(self) -> Path:
        return self.request.output

    @cached_property
    def plan(self) -> Plan:
        return check(replace(self.request, force=True))

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The written model with all its weights in memory."""
        return onnx.load(self.folder / "model.onnx")

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        return None if self.request.format == "none" else Checkpoint.load(self.folder / "checkpoint")

    @cached_property
    def artifact(self) -> Artifact:
        return Artifact.load(self.folder)


CompileCell = Callable[..., Cell]


def small_request(model: str, format: str, output: Path, **changed: Any) -> CompileRequest:
    """Two prompts, two steps, small images; all GPUs that the format exists on where there is a builder."""
    sms = tuple(sm for sm in SMS if sm >= FORMATS[format].min_sm) if HAS_RTX else ()
    request = CompileRequest(
        model,
        output,
        format,
        ("trt-rtx", "ort") if HAS_RTX else ("ort",),
        sms,
        prompts=PROMPTS,
        steps=2,
        image_size=64,
    )
    return replace(request, **changed)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompileCell:
    """`compiled(model, format, **changes of the request)`: the finished cell, compiled on its first use."""
    root, cells = tmp_path_factory.mktemp("compiled"), {}

    def get(model: str, format: str, **changed: Any) -> Cell:
        key = (model, format, *sorted(changed.items()))
        if key not in cells:
            request = small_request(model, format, root / f"{len(cells)}-{model}-{format}", **changed)
            cells[key] = Cell(request, compile_model(request))
        return cells[key]

    return get
