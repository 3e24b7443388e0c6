"""What a sweep does with a finished artifact: validate, bench, and pictures that are judged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffc.commands.bench.output import described
from diffc.commands.bench.run import BenchRequest, bench, require_measured
from diffc.commands.evaluate.request import EvaluateRequest
from diffc.commands.evaluate.run import evaluate
from diffc.commands.generate import TORCH, GenerateRequest, generate
from diffc.commands.validate import ValidateRequest, validate_artifact
from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError
from diffc.progress import Reporter
from diffc.quality.pictures import save_png, to_image
from diffc.quantize.calibrate import DEFAULT_PROMPTS
from diffc.sweep.request import Steps
from diffc.sweep.rows import DONE, FAILED, Step
from passes.base import PassError
from passes.files.atomic import write_text

PICTURES = "pictures.json"
"""In the folder of a cell's pictures: what `diffc evaluate --data-path` takes."""
PROMPTS = 4
"""How many of diffc's own prompts are painted where none are given."""
Run = Callable[[], dict[str, Any]]


def run_steps(
    steps: Steps, request: CompileRequest, pictures: Path, ui: Reporter, done: Mapping[str, Step]
) -> dict[str, Step]:
    """Do the steps that are asked for and not `done`, with the artifact of `request`; an error is in its step."""
    ways: dict[str, Run] = {
        "validate": lambda: _validate(request, ui),
        "bench": lambda: _bench(steps, request, ui),
        "evaluate": lambda: _evaluate(steps, request, pictures, ui),
    }
    return {**done, **{name: _step(ways[name]) for name in steps.names if name not in done}}


def _step(run: Run) -> Step:
    begun = time.perf_counter()
    try:
        result, status, message = run(), DONE, ""
    except (DiffcError, PassError) as error:
        result, status, message = {}, FAILED, str(error)
    except Exception as error:  # the artifact is finished, and its row must not be lost
        result, status, message = {}, FAILED, f"{type(error).__name__}: {error}"
    plain = json.loads(json.dumps(result, default=str))
    return Step(status, round(time.perf_counter() - begun, 3), message, plain)  # type: ignore[arg-type]


def _validate(request: CompileRequest, ui: Reporter) -> dict[str, Any]:
    result = validate_artifact(ValidateRequest(request.output), ui)
    result.require_match()
    return result.to_json()


def _bench(steps: Steps, request: CompileRequest, ui: Reporter) -> dict[str, Any]:
    rows = bench(BenchRequest(request.output, steps.bench, repeat=steps.repeat), ui)
    require_measured(rows, steps.bench or ())
    return described(rows, request.output)


def _evaluate(steps: Steps, request: CompileRequest, pictures: Path, ui: Reporter) -> dict[str, Any]:
    """Paint every prompt with torch and the artifact, from the same noise, and judge the pictures."""
    pictures.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, prompt in enumerate(steps.prompts or DEFAULT_PROMPTS[:PROMPTS]):
        sheet = pictures / f"{number}.png"
        wanted = GenerateRequest(
            request.output, sheet, prompt, compare=(TORCH,), steps=steps.paint_steps, seed=number, warm_up=False
        )  # fmt: skip
        names = {}
        for name, painted in zip(("torch", "compiled"), generate(wanted, ui), strict=True):
            names[name] = f"{number}-{name}.png"
            save_png(to_image(painted.images[0]), pictures / names[name])
        entries.append({"prompt": prompt, "images": names})
    write_text(pictures / PICTURES, json.dumps(entries, indent=1) + "\n")
    found = evaluate(EvaluateRequest(pictures / PICTURES, steps.evaluate, "torch"), ui)
    return found.to_json() | {"pictures": [entry["images"] for entry in entries]}
