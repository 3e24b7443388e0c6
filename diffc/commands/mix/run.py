"""`diffc mix`: layers of one model in several formats, chosen by what each costs at the output, as one calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffc.compile.calibration import PipelineRun, calibrate_on_prompts, usual_arguments
from diffc.errors import UsageError
from diffc.models.sampling import sampling_of
from diffc.models.sources.backbone import load_backbone, quiet_libraries
from diffc.models.sources.components import check_components
from diffc.models.sources.locate import locate
from diffc.models.sources.source import DEFAULT_HUB, HubOptions, ModelSource
from diffc.output_files import save_figure
from diffc.progress import Reporter
from diffc.quality.mixing import Group, choose, read_plan, total_bits, write_plan
from diffc.quality.sensitivity import Call, noise_of, recording, replaced, sharing_inputs
from diffc.quantize.calibrate import DEFAULT_PROMPTS
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of, role_of
from diffc.quantize.formats import find_format
from diffc.quantize.mix import mixed
from diffc.quantize.options import DEFAULT_OPTIONS
from diffc.quantize.pipeline_call import call_arguments

CALLS, PROMPTS = 4, 4
"""Calls of the backbone that noise is measured on, spread over the steps, and prompts in each."""
UNSEEN_NOISE = 1 << 20
"""Between the seed of calibration's noise and that of the calls."""
_CURVE = 8
"""Sizes between the smallest and the largest that --plot measures."""


@dataclass(frozen=True)
class MixRequest:
    """What is asked for: `bits` a weight on average, or a `size` in bytes of all weights of the backbone, or a `plan`.

    `formats` are those that layers may have, beside the model's own type. Others are as in CompileRequest.
    """

    model: str
    output: Path
    bits: float | None = None
    size: int | None = None
    plan: Path | None = None
    formats: tuple[str, ...] = ("nvfp4", "fp8", "int8")
    prompts: tuple[str, ...] | None = None
    steps: int | None = None
    batch_size: int = 4
    image_size: int | None = None
    seed: int = 0
    plot: Path | None = None
    hub: HubOptions = DEFAULT_HUB


@dataclass(frozen=True)
class Mix:
    """A way to quantize: its name, the bits of a weight on average, and the noise at the output (`noise_of`)."""

    name: str
    bits: float
    noise: float
    formats: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio of the backbone's output in dB."""
        return -10 * math.log10(self.noise) if self.noise else math.inf


def mix(request: MixRequest, ui: Reporter) -> list[Mix]:
    """Choose, calibrate and save to `output`; the chosen mix, and then every format by itself.

    A plan.json beside the calibration (NAME.plan.json) has the format of each layer. Raises UsageError where nothing
    fits.
    """
    if sum(given is not None for given in (request.bits, request.size, request.plan)) != 1:
        raise UsageError("one of --bits, --size and --plan is needed", fix="give, for example, --bits 5.5")
    source = locate(request.model, request.hub)
    check_components(source)
    plan = None if request.plan is None else read_plan(request.plan)
    names = (
        request.formats if plan is None else [name for name in dict.fromkeys(plan.values()) if name != "none"]
    )
    run = _run_of(request, source)
    checkpoints = {
        fmt.name: calibrate_on_prompts(source, fmt, DEFAULT_OPTIONS, run, ui)
        for fmt in map(find_format, names)
    }
    if plan is not None:
        mixed(checkpoints, plan).save(request.output)
        return []
    with quiet_libraries(), run.opened(source) as pipe:
        found = _Measured(source, run, pipe, checkpoints, request.seed, ui)
        tried = found.uniform()
        budget = found.budget(request)
        best = min(
            [found.chosen(budget), *(one for one in tried if one.bits * found.weights <= budget)],
            key=lambda one: one.noise,
        )
        if request.plot is not None:
            draw(tried, found.curve(tried), best, request.plot)
    mixed(checkpoints, best.formats).save(request.output)
    about = {"model": source.name, "bits": round(best.bits, 4), "snr_db": round(best.snr, 2)}
    write_plan(request.output.with_name(f"{request.output.name}.plan.json"), best.formats, about)
    return [best, *tried]


def _run_of(request: MixRequest, source: ModelSource) -> PipelineRun:
    sampling, pixels = sampling_of(source), request.image_size
    steps = request.steps or sampling.steps
    return PipelineRun(
        request.prompts,
        steps,
        request.batch_size,
        pixels,
        pixels,
        request.seed,
        source.dtype,
        guidance=sampling.guidance,
    )


class _Measured:
    """The unquantized backbone, one for each format, the calls that it is judged by, and each group's noise."""

    def __init__(
        self,
        source: ModelSource,
        run: PipelineRun,
        pipe: Any,
        checkpoints: Mapping[str, Checkpoint],
        seed: int,
        ui: Reporter,
    ) -> None:
        self._backbone: nn.Module = getattr(pipe, source.family.component)
        self._source, self._ui, self._checkpoints = source, ui, checkpoints
        with ui.stage("the unquantized model paints"):
            self._calls = _calls(pipe, source, run, seed + UNSEEN_NOISE)
        first = next(self._backbone.parameters())
        self._quantized = {}
        for name, checkpoint in checkpoints.items():
            model = load_backbone(source, first.dtype)
            checkpoint.apply(model, source.family.name)
            self._quantized[name] = model.to(first.device)
        self.groups = self._groups()
        self.weights = sum(self._count(path) for group in self.groups for path in group.layers)

    def budget(self, request: MixRequest) -> float:
        """Bits that the layers which can be quantized may take together."""
        if request.bits is not None:
            return request.bits * self.weights
        assert request.size is not None  # one of the two is given
        return 8.0 * request.size - (self._source.parameters - self.weights) * self._own_bits

    def uniform(self) -> list[Mix]:
        """Every format by itself."""
        return [
            self._mix(name, [name if name in g.noise else "none" for g in self.groups])
            for name in self._quantized
        ]

    def chosen(self, budget: float) -> Mix:
        """The best mix within so many bits."""
        return self._mix("mixed", choose(self.groups, budget))

    def curve(self, uniform: Sequence[Mix]) -> list[Mix]:
        """Mixes from the smallest to the model's own type, and of the size of each format."""
        least = sum(min(group.bits.values()) for group in self.groups)
        most = self._own_bits * self.weights
        sizes = {least + (most - least) * (at / _CURVE) ** 2 for at in range(_CURVE)}
        sizes |= {one.bits * self.weights * 1.0001 for one in uniform}
        return [self.chosen(size) for size in sorted(sizes)]

    @property
    def _own_bits(self) -> int:
        return 32 if self._source.dtype == "float32" else 16

    def _mix(self, name: str, formats: Sequence[str]) -> Mix:
        layers = {path: fmt for group, fmt in zip(self.groups, formats, strict=True) for path in group.layers}
        noise = self._noise({path: fmt for path, fmt in layers.items() if fmt != "none"})
        return Mix(name, total_bits(self.groups, formats) / self.weights, noise, layers)

    def _noise(self, formats: Mapping[str, str]) -> float:
        layers = {path: self._quantized[name].get_submodule(path) for path, name in formats.items()}
        with replaced(self._backbone, layers) as backbone:
            return noise_of(backbone, self._calls)

    def _groups(self) -> list[Group]:
        able = {name: _weighted(checkpoint) for name, checkpoint in self._checkpoints.items()}
        paths = [
            path for path, _ in self._backbone.named_modules() if any(path in own for own in able.values())
        ]
        shared = sharing_inputs(self._backbone, self._calls[0], paths)
        groups = []
        with self._ui.stage(f"what each format costs, {len(shared)} groups of layers") as update:
            for number, layers in enumerate(shared):
                names = [name for name, own in able.items() if own.issuperset(layers)]
                noise = {name: self._noise(dict.fromkeys(layers, name)) for name in names}
                bits = {name: sum(self._bits(path, name) for path in layers) for name in ("none", *names)}
                groups.append(Group(layers, {"none": 0.0, **noise}, bits))
                update(number + 1, len(shared))
        return groups

    def _count(self, path: str) -> int:
        return self._backbone.get_submodule(path).get_parameter("weight").numel()

    def _bits(self, path: str, name: str) -> float:
        stored = self._own_bits if name == "none" else find_format(name).stored_bits or self._own_bits
        scaling = {} if name == "none" else self._checkpoints[name].scaling
        beside = sum(v.size for key, v in scaling.items() if layer_of(key.rpartition(".")[0]) == path)
        return stored * self._count(path) + 16 * beside


def _weighted(checkpoint: Checkpoint) -> set[str]:
    """The layers whose weights a checkpoint quantizes."""
    return {layer_of(name) for name in checkpoint.settings if role_of(name) == "weight_quantizer"}


def _calls(pipe: Any, source: ModelSource, run: PipelineRun, seed: int) -> list[Call]:
    """Calls of the backbone while the pipeline paints one image for each prompt of a batch."""
    height, width = run.size(pipe, source.family)
    prompts = (run.prompts or DEFAULT_PROMPTS)[: min(run.batch_size, PROMPTS)]
    pipe.set_progress_bar_config(disable=True)
    with (
        torch.no_grad(),
        recording(getattr(pipe, source.family.component), -(-run.steps // CALLS)) as calls,
    ):
        pipe(
            **call_arguments(
                pipe.__call__,
                prompts,
                seeds=[seed + number for number in range(len(prompts))],
                steps=run.steps,
                height=height,
                width=width,
                guidance=run.guidance,
                usual=usual_arguments(source.family, pipe),
            )
        )
    return calls


def draw(uniform: Sequence[Mix], curve: Sequence[Mix], best: Mix, path: Path) -> None:
    """Write the picture of quality against size, as PNG, SVG or PDF."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    finite = [one for one in curve if math.isfinite(one.snr)]
    axes.plot([one.bits for one in finite], [one.snr for one in finite], ".-", label="mixed")
    for one in uniform:
        axes.plot([one.bits], [one.snr], "s")
        axes.annotate(one.name, (one.bits, one.snr), xytext=(5, -10), textcoords="offset points")
    axes.plot([best.bits], [best.snr], "*", markersize=14, label="chosen")
    axes.set_xlabel("bits a weight, of the layers that can be quantized")
    axes.set_ylabel("signal to noise of the backbone's output (dB)")
    axes.legend()
    save_figure(figure, path)
    pyplot.close(figure)


def lines(mixes: Sequence[Mix]) -> Iterator[str]:
    """The mixes as lines for a user."""
    for one in mixes:
        yield f"{one.name:>16}  {one.bits:5.2f} bits  {one.snr:5.1f} dB"
