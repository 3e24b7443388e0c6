"""The quantize stage of a compile: a checkpoint that was given, or a new one from the pipeline on prompts."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from importlib import metadata
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sources.backbone import DTYPES, build_backbone, quiet_libraries
from diffc.models.sources.torch_weights import TorchWeights, fill_buffers
from diffc.models.spec import Shape
from diffc.progress import Reporter
from diffc.quantize.calibrate import DEFAULT_PROMPTS, calibrate
from diffc.quantize.checkpoint import LIBRARIES, Checkpoint
from diffc.quantize.convert import insert_quantizers
from diffc.quantize.fingerprint import backbone_config

if TYPE_CHECKING:
    from diffc.compile.plan import Plan


def given(plan: Plan) -> Checkpoint:
    """The checkpoint of --from-checkpoint: a folder of ours, or a `.pt` file of ModelOpt's `mto.save`.

    Raises DiffcError when it belongs to another model or holds another format than was asked for.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = plan.request.from_checkpoint
    if path is None:
        raise DiffcError("no checkpoint was given")
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = build_backbone(plan.spec, plan.source.config, DTYPES[plan.dtype])
    if path.is_file():
        with quiet_libraries():
            checkpoint = Checkpoint.from_modelopt(path, backbone, family=plan.spec.name)
    else:
        checkpoint = Checkpoint.load(path)
        checkpoint.check(backbone, plan.spec.name, plan.source.fingerprint)
    if checkpoint.format != plan.format.name:
        raise DiffcError(
            f"the checkpoint {path} was calibrated for {checkpoint.format}, and {plan.format.name} is asked for",
            fix=f"give --format {shlex.quote(str(checkpoint.format))}, or leave --from-checkpoint out",
        )
    return checkpoint


def calibrated(plan: Plan, ui: Reporter) -> Checkpoint:
    """Calibrate by running the diffusers pipeline on prompts: on the GPU if there is one, else on the CPU."""
    request = plan.request
    if plan.format.algorithm is None:
        return uncalibrated(plan)
    if request.calibrate == "synthetic":
        return synthetic(plan, ui)
    prompts = _repeated(request.prompts or DEFAULT_PROMPTS, request.calib_size)
    with quiet_libraries(), ui.stage("load the pipeline"):
        pipe = load_pipeline(plan)
    size = request.image_size or pipe.vae.config.sample_size
    call = dict(plan.spec.calibration) | {"height": size, "width": size}
    title = f"calibrate {plan.format.name} on {len(prompts)} prompts, {request.steps} steps, {size} px"
    with quiet_libraries(), ui.stage(title) as update:
        calibrate(
            pipe,
            plan.spec.component,
            plan.format,
            plan.spec.unquantized,
            prompts=prompts,
            steps=request.steps,
            seed=request.seed,
            batch_size=request.batch_size,
            call_args=call,
            progress=update,
            options=request.options,
        )
    return Checkpoint.from_backbone(
        getattr(pipe, plan.spec.component),
        family=plan.spec.name,
        format=plan.format.name,
        source=plan.source.fingerprint,
        calibration={
            "prompts": list(prompts),
            "steps": request.steps,
            "seed": request.seed,
            "options": asdict(request.options),
            **call,
        },
    )


def uncalibrated(plan: Plan) -> Checkpoint:
    """The checkpoint of a format whose scales are all found at run time: settings alone, from a fake backbone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with quiet_libraries(), FakeTensorMode(allow_non_fake_inputs=True):
        backbone = build_backbone(plan.spec, plan.source.config, DTYPES[plan.dtype])
        insert_quantizers(backbone, plan.format, plan.spec.unquantized, plan.request.options)
    return Checkpoint.from_backbone(
        backbone,
        family=plan.spec.name,
        format=plan.format.name,
        source=plan.source.fingerprint,
        calibration={"options": asdict(plan.request.options)},
    )


def synthetic(plan: Plan, ui: Reporter) -> Checkpoint:
    """Calibrated layer by layer on random inputs, never more than one layer's weights in memory."""
    import torch
    from accelerate import init_empty_weights

    from diffc.quantize.synthetic import calibrate_synthetic

    request, spec, config = plan.request, plan.spec, plan.source.config
    size = request.image_size or SYNTHETIC_PIXELS
    shape = Shape(request.batch_size, size, size, SYNTHETIC_TEXT)
    with quiet_libraries(), init_empty_weights(include_buffers=False):
        backbone = build_backbone(spec, config, torch.float32)
    weights = TorchWeights(plan.source.weights)
    fill_buffers(backbone, weights, torch.float32)
    values = random_inputs(spec, config, spec.check(config, shape), dtype=torch.float32, seed=request.seed)
    title = f"calibrate {plan.format.name} on random inputs, layer by layer ({shape})"
    with quiet_libraries(), ui.stage(title) as update:
        settings, amax, scaling = calibrate_synthetic(
            backbone,
            weights,
            forward_kwargs(spec, config, values),
            plan.format,
            spec.unquantized,
            request.options,
            update,
        )
    return Checkpoint(
        spec.name,
        plan.format.name,
        backbone_config(backbone),
        settings,
        amax,
        plan.source.fingerprint,
        {
            "synthetic": str(shape),
            "seed": request.seed,
            "options": json.loads(json.dumps(asdict(request.options))),
        },
        {library: metadata.version(library) for library in LIBRARIES},
        scaling,
    )


SYNTHETIC_PIXELS, SYNTHETIC_TEXT = 256, 64
"""Size of the random inputs: small, since a forward of 12 B parameters takes two minutes on two cores."""


def _repeated(prompts: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """`count` prompts, from the first on, and from the first again when there are fewer."""
    return prompts if count is None else tuple(islice(cycle(prompts), count))


def load_pipeline(plan: Plan) -> Any:
    """The whole pipeline, offline: in the compute type on a GPU, in float32 on the CPU."""
    import torch

    from diffc.models.sources.pipelines import open_pipeline

    cuda = torch.cuda.is_available()
    dtype: Any = DTYPES[plan.dtype] if cuda else torch.float32
    if cuda and plan.request.component_dtypes:
        dtype = {"default": dtype} | {name: DTYPES[t] for name, t in plan.request.component_dtypes}
    fix = "download the whole pipeline (tokenizers, text encoders, VAE, scheduler), or --from-checkpoint"
    pipe = open_pipeline(plan.source, dtype=dtype, fix=fix)
    return pipe.to("cuda") if cuda else pipe
