"""How much memory a compile takes, told before it begins: what a machine with several compiles must have for each."""

from __future__ import annotations

from math import prod

from diffc.compile.plan import VALIDATION_BYTES, Plan

LIBRARIES = 1 << 30
"""Bytes that torch, diffusers, ModelOpt and ONNX Runtime take, with one trace: 0.8 GB for the embedded models."""
_BUILDER = 1 << 29
"""Bytes that a builder's process takes beside its weights: 0.4 GB for the embedded models."""


def memory_needed(plan: Plan) -> int:
    """Bytes that the compile holds at most, of all its processes: an estimate that is meant to be too high.

    The stages come one after the other, so the largest counts: calibration on prompts, where the parts of the pipeline
    and their largest layers are in memory, comparison with torch, the builder of engines.
    """
    parameters = plan.source.parameters
    largest = max((prod(recipe.shape) for recipe in plan.source.weights.values()), default=0)
    calibration = 4 * parameters if plan.calibrates and plan.request.calibrate == "pipeline" else 0
    whole = not (plan.request.skip_validation or plan.streams_validation)
    validation = VALIDATION_BYTES * parameters if whole else 0
    builds = any(target.is_engine for target in plan.targets)
    builder = _BUILDER + 4 * parameters if builds else 0
    return LIBRARIES + 8 * largest + max(calibration, validation, builder)
