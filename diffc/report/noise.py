"""How much each quantized layer loses in each denoising step, while the unquantized model paints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffc.artifact.folder import Artifact
from diffc.artifact.resume import CHECKPOINT
from diffc.commands.generate import GenerateRequest, run_pipeline, sized
from diffc.commands.pipeline_of import pipeline_around, pipeline_source
from diffc.errors import DiffcError
from diffc.models.sources.backbone import loading_seconds
from diffc.progress import Reporter, estimated
from diffc.quality.layers import LayerNoise, measured, quantized_layers
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.simulate import cpu_block_quant
from diffc.validate.torch_reference import reference_model


@dataclass(frozen=True)
class LayerNoises:
    """`snr` [layers, steps] and `overall` [layers] in dB: a layer's output against what quantizing changes in it.

    Each layer is measured by itself, on the input that the unquantized model gives it. `text` says how.
    """

    layers: Sequence[str]
    snr: npt.NDArray[np.float64]
    overall: npt.NDArray[np.float64]
    text: str

    def worst(self, count: int) -> list[tuple[str, int, float, float]]:
        """The layers with the lowest `overall`: path, their worst step, dB there, dB over all steps."""
        order = np.argsort(self.overall, kind="stable")[:count]
        steps = self.snr.argmin(axis=1)
        return [
            (self.layers[i], int(steps[i]), float(self.snr[i, steps[i]]), float(self.overall[i]))
            for i in order
        ]


@dataclass
class _Calls:
    """The sums of every layer after each call of the backbone; layers are looked at when a call is over."""

    sums: dict[str, LayerNoise]
    taken: list[list[tuple[float, float]]] = field(default_factory=list)

    def note(self, *_: Any) -> None:
        """The hook of a call."""
        self.taken.append([(noise.signal, noise.noise) for noise in self.sums.values()])


def layer_noises(artifact: Artifact, request: GenerateRequest, ui: Reporter) -> LayerNoises:
    """Paint what `request` says with the unquantized model, and run each quantized layer beside its own.

    Raises DiffcError for an artifact without a calibration, and where there is no pipeline to paint with.
    """
    folder = artifact.folder / CHECKPOINT
    if not folder.is_dir():
        raise DiffcError(
            f"{artifact.folder} has no calibration: nothing says what its quantizers do to a layer",
            fix="leave --layers out, or give the artifact of a format that quantizes, with its checkpoint/",
        )
    checkpoint, device = Checkpoint.load(folder), torch.device("cpu")
    source = pipeline_source(artifact, request.pipeline, request.hub)
    with ui.stage("load the pipeline") as update:
        pipe = pipeline_around(source, artifact, device, update, with_backbone=True)
    with ui.stage("load the quantized model") as update, estimated(update, loading_seconds(source)):
        quantized = reference_model(source, artifact.manifest["dtype"], checkpoint)
    request = sized(request, pipe, source, artifact.manifest)
    backbone = getattr(pipe, source.family.component)
    paths = quantized_layers(quantized)
    with (
        ui.stage("measure every layer while torch paints") as update,
        cpu_block_quant(),
        measured(backbone, quantized, paths) as sums,
    ):
        calls = _Calls(sums)
        handle = backbone.register_forward_hook(calls.note)
        try:
            run_pipeline(pipe, backbone, request, update)
        finally:
            handle.remove()
    return noises_of(paths, calls.taken, request)


def noises_of(
    paths: Sequence[str], taken: Sequence[Sequence[tuple[float, float]]], request: GenerateRequest
) -> LayerNoises:
    """The noises of steps, of which each has as many calls as any other."""
    totals = np.array(taken, np.float64).reshape(len(taken), len(paths), 2)
    per_step = max(1, len(taken) // request.steps)
    after = totals[per_step - 1 :: per_step]
    steps = np.diff(after, axis=0, prepend=np.zeros((1, *after.shape[1:])))
    text = (
        f"Measured on {request.prompt!r}, {len(after)} steps, seed {request.seed}, {request.width}x{request.height}:"
        " each layer by itself, on the input that it has while the unquantized model paints. Low is bad."
    )
    return LayerNoises(paths, _decibels(steps).T, _decibels(totals[-1]), text)


def _decibels(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums of squares [..., (signal, noise)] as a ratio in dB; infinite without noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: npt.NDArray[np.float64] = 10 * np.log10(sums[..., 0] / sums[..., 1])
    return ratio
