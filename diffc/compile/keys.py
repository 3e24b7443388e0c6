"""What two compiles must have in common to take each other's work over."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffc.backends.target import DEFAULT_ENGINE
from diffc.compile.live import rest_of_pipeline
from diffc.compile.plan import Plan
from diffc.compile.request import request_key


def key_of(plan: Plan) -> str:
    """What a compile that goes on with another one must have in common with it (`request_key`)."""
    loras = [applied.file.path for applied in plan.source.loras]
    files = [plan.source.pipeline_dir or plan.source.path, *plan.request.cache_files, *loras]
    return request_key(plan.request, files, identity_of(plan))


def identity_of(plan: Plan) -> str:
    """What stands for the model in the key of a compile: its weights, and all else of a model in memory that counts."""
    source, checkpoint = plan.source, plan.checkpoint
    calibration = "" if checkpoint is None else checkpoint.digest
    return " ".join(filter(None, (source.fingerprint, calibration, rest_of_pipeline(source))))


def calibration_key(plan: Plan) -> str:
    """What two compiles must have in common for their calibrations to be equal: a hash."""
    same = replace(
        plan.request,
        targets=("ort",),
        sms=(),
        dtype=plan.dtype
        if torch.cuda.is_available()
        else "float32",  # on the CPU the pipeline runs in float32
        profile="",
        lora_slots=0,
        cache_plan="",
        cache_layout="",
        passes="",
        engine=DEFAULT_ENGINE,
        skip_validation=False,
    )
    return key_of(replace(plan, request=same))
