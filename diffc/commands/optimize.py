"""`diffc opt`: passes over an existing .onnx file, weights streamed through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffc.artifact.folder import check_model_output
from diffc.errors import unknown
from diffc.progress import Reporter

if TYPE_CHECKING:
    from passes import PipelineResult

CHECKS = ("structure", "numeric")


def optimize(
    model: Path,
    passes: str,
    output: Path,
    *,
    check: str = "structure",
    dump: Path | None = None,
    force: bool = False,
    ui: Reporter,
) -> PipelineResult:
    """Run the pipeline written in `passes` over `model` and write the result to `output`.

    `check` "numeric" also runs the model before and after each pass in ONNX Runtime on random inputs. Raises
    PassError for what the passes cannot take, DiffcError when `output` exists and `force` is not given.
    """
    if check not in CHECKS:
        raise unknown("check", check, CHECKS)
    check_model_output(output, model=model, force=force)
    from passes import Pipeline
    from passes.graph.check import Check, check_structure
    from passes.storage import load, save

    pipeline = Pipeline.parse(passes)
    loaded = load(model)
    checker: Check = check_structure
    if check == "numeric":
        from diffc.validate.passes import NumericCheck, random_feeds

        feeds = random_feeds(loaded, seed=0)
        checker = NumericCheck(lambda: feeds)
    with ui.stage("rewrite the graph") as update:
        result = pipeline.run(loaded, check=checker, dump=dump, on_event=lambda e: update(e.index, e.total))
    with ui.stage("write weights") as update:
        save(result.model, output, lambda done, total, name: update(done, total))
    return result


def known_passes() -> Sequence[tuple[str, str, str]]:
    """(name, options, docstring) of every pass."""
    from dataclasses import MISSING, fields
    from inspect import cleandoc

    from passes import all_passes

    rows = []
    for name, cls in all_passes().items():
        options = [f.name if f.default is MISSING else f"{f.name}={_shown(f.default)}" for f in fields(cls)]
        rows.append((name, ", ".join(options), cleandoc(cls.__doc__ or "")))
    return rows


def _shown(value: object) -> str:
    return ";".join(map(str, value)) if isinstance(value, tuple) else str(value)
