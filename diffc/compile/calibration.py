"""The calibration of a compile: a checkpoint that was given, kept, or made anew."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights

from diffc.artifact.resume import CHECKPOINT
from diffc.compile.bounded import free_room, opened_bounded
from diffc.compile.live import unquantized_backbone
from diffc.compile.pipeline_step import checked_first_call
from diffc.errors import DiffcError, UsageError
from diffc.models.call import frames_argument, parameters_of, plain_sizes, text_cleaner
from diffc.models.family import Family
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.sources.backbone import DTYPES, FakeBackbone, build_backbone, quiet_libraries
from diffc.models.sources.locate import ModelSource
from diffc.models.sources.pipelines import open_pipeline, pipeline_seconds
from diffc.models.sources.torch_weights import TorchWeights, fill_buffers
from diffc.models.spec import Shape
from diffc.progress import Reporter, estimated
from diffc.quantize.bounded import Bounded
from diffc.quantize.calibrate import DEFAULT_PROMPTS, calibrate
from diffc.quantize.checkpoint import LIBRARIES, Checkpoint
from diffc.quantize.convert import insert_quantizers
from diffc.quantize.fingerprint import backbone_config
from diffc.quantize.folder import RECORD
from diffc.quantize.formats import Format
from diffc.quantize.options import QuantOptions
from diffc.quantize.pipeline_call import IMAGE_ARGUMENTS
from diffc.quantize.reweigh import BASE, reweighed
from diffc.quantize.synthetic import calibrate_synthetic

SYNTHETIC_PIXELS, SYNTHETIC_TEXT = 256, 64
"""Size of the random inputs: small, since a forward of 12 B parameters takes two minutes on two cores."""


@dataclass(frozen=True)
class PipelineRun:
    """How a pipeline is run on prompts, for calibration and for measuring rounding noise.

    `prompts` None: those of `diffc.quantize.calibrate`. `height`, `width`: pixels, None for the model's own. `guidance`
    None is the family's. `dtype`: the compute type on a GPU ("float16", ...), with other types for some components in
    `component_dtypes`; float32 on the CPU.
    """

    prompts: tuple[str, ...] | None
    steps: int
    batch_size: int
    height: int | None
    width: int | None
    seed: int
    dtype: str
    component_dtypes: tuple[tuple[str, str], ...] = ()
    guidance: float | None = None
    negative_prompt: str = ""

    def size(self, pipe: Any, family: Family) -> tuple[int, int]:
        """Height and width of the images, in pixels: those asked for, or the size of the pipeline's VAE.

        A family that was read off its pipeline has a size of its own.
        """
        if family.interface is not None:
            native = family.native({})
            return self.height or native.height, self.width or native.width
        usual = pipe.vae.config.sample_size
        return self.height or usual, self.width or usual

    @contextmanager
    def opened(self, source: ModelSource, *, shares: bool = True) -> Iterator[Any]:
        """The diffusers pipeline of `source`, whose backbone may be changed; one in memory is as before at the end.

        `shares`: the weights of a backbone in memory are not written to.
        """
        if source.pipeline is None:
            yield self._open(source)
            return
        with unquantized_backbone(source, shares=shares) as pipe:
            yield pipe

    def _open(self, source: ModelSource) -> Any:
        """The pipeline in a folder, offline, on the GPU if there is one."""
        fix = "download the whole pipeline (tokenizers, text encoders, VAE, scheduler), or --from-checkpoint"
        pipe = open_pipeline(source, dtype=self.dtypes(), fix=fix)
        return pipe.to("cuda") if torch.cuda.is_available() else pipe

    def dtypes(self) -> dict[str, torch.dtype]:
        """The type in which each component computes on this machine, by name and "default"."""
        if not torch.cuda.is_available():
            return {"default": torch.float32}
        return {"default": DTYPES[self.dtype]} | {name: DTYPES[t] for name, t in self.component_dtypes}

    @contextmanager
    def calibrating(
        self, source: ModelSource, work: Path, room: int | None, together: int | None, *, shares: bool
    ) -> Iterator[tuple[Any, Bounded | None]]:
        """The pipeline to calibrate; one in a folder with what bounds its room (`diffc.compile.bounded`)."""
        if source.pipeline is not None:
            with self.opened(source, shares=shares) as pipe:
                yield pipe, None
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        room = free_room(device) if room is None else room
        with opened_bounded(source, self.dtypes(), device, work / "prompts", room, together) as opened:
            yield opened


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
    """The checkpoint at `path`: a folder that diffc wrote, a `.pt` file of ModelOpt's `mto.save`, or its folder.

    Raises DiffcError when it belongs to another model or holds another format than was asked for.
    """
    source = backbone.source
    path = modelopt_checkpoint(path, source.family.component)
    if path.is_file():
        with quiet_libraries():
            checkpoint = Checkpoint.from_modelopt(
                path, backbone.copy(), family=source.family.name, weights=source.weights
            )
    else:
        checkpoint = _for_loras(Checkpoint.load(path), source)
        checkpoint.check(backbone.module, source.family.name, source.fingerprint_like(checkpoint.source))
    if checkpoint.weights and getattr(source, "base", None) is not None:
        raise DiffcError(
            f"{path} carries trained weights, which would take the place of those that --lora has changed",
            fix="leave --lora or --from-checkpoint out, or train the model with its LoRA fused",
        )
    if checkpoint.format != format.name:
        raise DiffcError(
            f"the checkpoint {path} was calibrated for {checkpoint.format}, and {format.name} is asked for",
            fix=f"give --format {shlex.quote(str(checkpoint.format))}, or leave --from-checkpoint out",
        )
    return checkpoint


def _for_loras(checkpoint: Checkpoint, source: ModelSource) -> Checkpoint:
    """`checkpoint` for the weights of `source` where it is of the same model with other LoRAs, or without any."""
    base, seen = source.base or source, checkpoint.calibration.get(BASE)
    known = base.fingerprint_like(checkpoint.source)
    if checkpoint.source == source.fingerprint or known not in (checkpoint.source, seen):
        return checkpoint
    weights = source.weights
    changed = weights if seen else {n: r for n, r in weights.items() if r is not base.weights[n]}
    return reweighed(checkpoint, weights, changed, source.fingerprint)


def modelopt_checkpoint(path: Path, component: str) -> Path:
    """The file in a folder that ModelOpt's `--quantized-torch-ckpt-save-path` made; any other `path` itself.

    The folder, often called NAME.pt, has a file for each backbone: `component`.pt. Raises DiffcError where it has
    several and none of that name.
    """
    if not path.is_dir() or (path / RECORD).is_file():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".pth"))
    own = [file for file in files if file.stem == component]
    if len(files) > 1 and not own:
        raise DiffcError(
            f"{path} has several checkpoints, and none is called {component}.pt:"
            f" {', '.join(file.name for file in files)}",
            fix="give the file itself",
        )
    return next(iter(own or files), path)


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
    work: Path | None = None,
    room: int | None = None,
    together: int | None = None,
) -> Checkpoint:
    """Calibrate by running the diffusers pipeline on `count` prompts (None: each once), on the GPU if there is one.

    In the folder `work` an equal call that was interrupted is taken up. `room`: bytes of the backbone's weights that
    stay on the device from the start, None for half of what is free there. `together`: batches that go through the
    backbone at once, None for as many as a GPU has room for.
    """
    family = source.family
    prompts = _repeated(run.prompts or DEFAULT_PROMPTS, count)
    # Other methods than max write to the weights.
    with ExitStack() as stack:
        work = work or Path(stack.enter_context(TemporaryDirectory(prefix="diffc-calibration-")))
        with (
            ui.stage("load the pipeline") as update,
            quiet_libraries(),
            estimated(update, pipeline_seconds(source)),
        ):
            shares = format.algorithm == "max"
            pipe, bounded = stack.enter_context(run.calibrating(source, work, room, together, shares=shares))
        height, width = run.size(pipe, family)
        usual = usual_arguments(family, pipe)
        title = (
            f"calibrate {format.name} on {len(prompts)} prompts, {run.steps} steps, {_pixels(height, width)}"
        )
        checked = checked_first_call(getattr(pipe, family.component), source)
        with quiet_libraries(), ui.stage(title) as update, checked, text_cleaner(type(pipe)):
            calibrate(
                pipe,
                family.component,
                format,
                family.unquantized,
                prompts=prompts,
                steps=run.steps,
                seed=run.seed,
                batch_size=run.batch_size,
                height=height,
                width=width,
                usual=usual,
                guidance=run.guidance,
                negative_prompt=run.negative_prompt,
                progress=update,
                options=options,
                bounded=bounded,
                work=work,
                note=ui.note,
            )
        guidance = {} if run.guidance is None else {"guidance_scale": run.guidance}
        negative = {"negative_prompt": run.negative_prompt} if run.negative_prompt else {}
        record = {
            "prompts": list(prompts),
            "steps": run.steps,
            "seed": run.seed,
            "options": asdict(options),
            **{**usual, **guidance, **negative},
            "height": height,
            "width": width,
        }
        return _checkpoint(getattr(pipe, family.component), source, format, record)


def _pixels(height: int, width: int) -> str:
    return f"{height} px" if height == width else f"{height}x{width} px"


def usual_arguments(family: Family, pipe: Any) -> dict[str, Any]:
    """What the family gives the pipeline's call beside prompts and sizes of images."""
    if family.interface is None:
        return dict(family.calibration)
    parameters, native = parameters_of(pipe), family.native({})
    frames = {name: native.frames for name in [frames_argument(parameters)] if name}
    images = {name: None for name in IMAGE_ARGUMENTS if name in parameters}  # it was called without any
    return {**family.calibration, **plain_sizes(parameters), **frames, **images}


def _checkpoint(
    backbone: torch.nn.Module, source: ModelSource, format: Format, calibration: Mapping[str, Any]
) -> Checkpoint:
    calibration = {**calibration, **_base_of(source)}
    return Checkpoint.from_backbone(
        backbone,
        family=source.family.name,
        format=format.name,
        source=source.fingerprint,
        calibration=calibration,
    )


def _base_of(source: ModelSource) -> dict[str, str]:
    """What a calibration with LoRAs remembers of the model without them."""
    return {} if source.base is None else {BASE: source.base.fingerprint}


_MOST_PROMPTS = 1_000_000


def _repeated(prompts: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """`count` prompts, from the first on, and from the first again when there are fewer.

    Raises UsageError for more than a million.
    """
    if count is not None and count > _MOST_PROMPTS:
        raise UsageError(f"{count} prompts are to be calibrated with", fix=f"give at most {_MOST_PROMPTS}")
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
    record |= _base_of(source)
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
