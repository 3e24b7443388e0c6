"""The calibration of a compile: a checkpoint that was given, kept, or made anew."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from diffc.artifact.resume import CHECKPOINT
from diffc.errors import DiffcError
from diffc.models.call import parameters_of, plain_sizes, size_arguments
from diffc.models.family import Family
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sources.backbone import DTYPES, FakeBackbone, build_backbone, quiet_libraries
from diffc.models.sources.locate import ModelSource
from diffc.models.sources.pipelines import open_pipeline, pipeline_seconds
from diffc.models.sources.torch_weights import TorchWeights, fill_buffers
from diffc.models.spec import Shape
from diffc.progress import Reporter, estimated
from diffc.quantize.calibrate import DEFAULT_PROMPTS, calibrate
from diffc.quantize.checkpoint import LIBRARIES, Checkpoint
from diffc.quantize.convert import insert_quantizers
from diffc.quantize.fingerprint import backbone_config
from diffc.quantize.formats import Format
from diffc.quantize.options import QuantOptions
from diffc.quantize.synthetic import calibrate_synthetic

SYNTHETIC_PIXELS, SYNTHETIC_TEXT = 256, 64
"""Size of the random inputs: small, since a forward of 12 B parameters takes two minutes on two cores."""


@dataclass(frozen=True)
class PipelineRun:
    """How a pipeline is run on prompts, for calibration and for measuring rounding noise.

    `prompts` None: those of `diffc.quantize.calibrate`. `size`: pixels, None for the model's own. `dtype`: the compute
    type on a GPU ("float16", ...), with other types for some components in `component_dtypes`; float32 on the CPU.
    """

    prompts: tuple[str, ...] | None
    steps: int
    batch_size: int
    size: int | None
    seed: int
    dtype: str
    component_dtypes: tuple[tuple[str, str], ...] = ()

    def open(self, source: ModelSource) -> Any:
        """The diffusers pipeline of `source`, offline, on the GPU if there is one."""
        cuda = torch.cuda.is_available()
        dtype: Any = DTYPES[self.dtype] if cuda else torch.float32
        if cuda and self.component_dtypes:
            dtype = {"default": dtype} | {name: DTYPES[t] for name, t in self.component_dtypes}
        fix = "download the whole pipeline (tokenizers, text encoders, VAE, scheduler), or --from-checkpoint"
        pipe = open_pipeline(source, dtype=dtype, fix=fix)
        return pipe.to("cuda") if cuda else pipe


def kept_checkpoint(folder: Path) -> Checkpoint | None:
    """The calibration that a killed compile left in the unfinished artifact `folder`; None when there is none.

    One that is damaged is removed.
    """
    if not (folder / CHECKPOINT).is_dir():
        return None
    try:
        return Checkpoint.load(folder / CHECKPOINT)
    except DiffcError:
        shutil.rmtree(folder / CHECKPOINT)
        return None


def load_checkpoint(path: Path, format: Format, backbone: FakeBackbone) -> Checkpoint:
    """The checkpoint at `path`: a folder that diffc wrote, or a `.pt` file of ModelOpt's `mto.save`.

    Raises DiffcError when it belongs to another model or holds another format than was asked for.
    """
    source = backbone.source
    if path.is_file():
        with quiet_libraries():
            checkpoint = Checkpoint.from_modelopt(path, backbone.copy(), family=source.family.name)
    else:
        checkpoint = Checkpoint.load(path)
        checkpoint.check(backbone.module, source.family.name, source.fingerprint)
    if checkpoint.format != format.name:
        raise DiffcError(
            f"the checkpoint {path} was calibrated for {checkpoint.format}, and {format.name} is asked for",
            fix=f"give --format {shlex.quote(str(checkpoint.format))}, or leave --from-checkpoint out",
        )
    return checkpoint


def uncalibrated(format: Format, options: QuantOptions, backbone: FakeBackbone) -> Checkpoint:
    """The checkpoint of a format whose scales are all found at run time: settings alone."""
    quantized = backbone.copy()
    with quiet_libraries(), backbone.mode:
        insert_quantizers(quantized, format, backbone.source.family.unquantized, options)
    return _checkpoint(quantized, backbone.source, format, {"options": asdict(options)})


def calibrate_on_prompts(
    source: ModelSource,
    format: Format,
    options: QuantOptions,
    run: PipelineRun,
    ui: Reporter,
    *,
    count: int | None = None,
) -> Checkpoint:
    """Calibrate by running the diffusers pipeline on `count` prompts (None: each once), on the GPU if there is one."""
    family = source.family
    prompts = _repeated(run.prompts or DEFAULT_PROMPTS, count)
    with (
        ui.stage("load the pipeline") as update,
        quiet_libraries(),
        estimated(update, pipeline_seconds(source)),
    ):
        pipe = run.open(source)
    call = calibration_call(family, pipe, run.size)
    title = f"calibrate {format.name} on {len(prompts)} prompts, {run.steps} steps, {call['height']} px"
    with quiet_libraries(), ui.stage(title) as update:
        calibrate(
            pipe,
            family.component,
            format,
            family.unquantized,
            prompts=prompts,
            steps=run.steps,
            seed=run.seed,
            batch_size=run.batch_size,
            call_args=call,
            progress=update,
            options=options,
        )
    record = {"prompts": list(prompts), "steps": run.steps, "seed": run.seed, "options": asdict(options)}
    return _checkpoint(getattr(pipe, family.component), source, format, {**record, **call})


def calibration_call(family: Family, pipe: Any, size: int | None) -> dict[str, Any]:
    """Arguments of the pipeline's call that calibration gives beside prompts; `size` in pixels, None for its own."""
    if family.interface is None:
        pixels = size or pipe.vae.config.sample_size
        return dict(family.calibration) | {"height": pixels, "width": pixels}
    native, parameters = family.native({}), parameters_of(pipe)
    shape = replace(native, height=size or native.height, width=size or native.width)
    known = {name: value for name, value in family.calibration.items() if name in parameters}
    return known | size_arguments(parameters, shape) | plain_sizes(parameters)


def _checkpoint(
    backbone: torch.nn.Module, source: ModelSource, format: Format, calibration: Mapping[str, Any]
) -> Checkpoint:
    return Checkpoint.from_backbone(
        backbone,
        family=source.family.name,
        format=format.name,
        source=source.fingerprint,
        calibration=calibration,
    )


def _repeated(prompts: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """`count` prompts, from the first on, and from the first again when there are fewer."""
    return prompts if count is None else tuple(islice(cycle(prompts), count))


def calibrate_on_random_inputs(
    source: ModelSource,
    format: Format,
    options: QuantOptions,
    ui: Reporter,
    *,
    batch_size: int,
    size: int | None,
    seed: int,
) -> Checkpoint:
    """Calibrate layer by layer on random inputs, never more than one layer's weights in memory.

    `size`: pixels, None for SYNTHETIC_PIXELS.
    """
    family, config, pixels = source.family, source.config, size or SYNTHETIC_PIXELS
    shape = Shape(batch_size, pixels, pixels, SYNTHETIC_TEXT, family.video_frames(2))
    with quiet_libraries(), init_empty_weights(include_buffers=False):
        backbone = build_backbone(family, config, torch.float32)
    weights = TorchWeights(source.weights)
    fill_buffers(backbone, weights, torch.float32)
    values = random_inputs(family, config, family.check(config, shape), dtype=torch.float32, seed=seed)
    inputs = forward_kwargs(family, config, values)
    title = f"calibrate {format.name} on random inputs, layer by layer ({shape})"
    with quiet_libraries(), ui.stage(title) as update:
        settings, amax, scaling = calibrate_synthetic(
            backbone, weights, inputs, format, family.unquantized, options, update
        )
    record = {"synthetic": str(shape), "seed": seed, "options": json.loads(json.dumps(asdict(options)))}
    return Checkpoint(
        family.name,
        format.name,
        backbone_config(backbone),
        settings,
        amax,
        source.fingerprint,
        record,
        {library: metadata.version(library) for library in LIBRARIES},
        scaling,
    )
