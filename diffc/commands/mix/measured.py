"""What a mix is chosen by: calls of a pipeline that paints, and the noise of each format in each group of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffc.commands.mix.request import Mix
from diffc.compile.calibration import PipelineRun, usual_arguments
from diffc.models.sources.backbone import load_backbone
from diffc.models.sources.source import ModelSource
from diffc.progress import Reporter
from diffc.quality.mixing import Group, choose, total_bits
from diffc.quality.pictures import psnr
from diffc.quality.sensitivity import noise_of, recording, replaced, sharing_inputs
from diffc.quantize.calibrate import DEFAULT_PROMPTS
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of, role_of
from diffc.quantize.formats import find_format
from diffc.quantize.pipeline_call import call_arguments
from diffc.quantize.simulate import cpu_block_quant

CALLS, PROMPTS = 4, 4
"""Calls of the backbone that noise is measured on, spread over the steps, and prompts in each."""
_CURVE = 8
"""Sizes between the smallest and the largest that --plot measures."""
_HALVINGS = 6
"""How often the range of sizes is halved for --psnr: to 1/64 of it, a fifth of a bit."""


class Measured:
    """The unquantized backbone, one for each format, the calls that it is judged by, and each group's noise.

    With `decodes`, what is painted are pictures, which `smallest` needs, and not their latents.
    """

    def __init__(
        self,
        source: ModelSource,
        run: PipelineRun,
        pipe: Any,
        checkpoints: Mapping[str, Checkpoint],
        seed: int,
        ui: Reporter,
        *,
        decodes: bool = False,
    ) -> None:
        self._backbone: nn.Module = getattr(pipe, source.family.component)
        self._source, self._ui, self._checkpoints = source, ui, checkpoints
        self._pipe, self._run, self._seed, self._decodes = pipe, run, seed, decodes
        every = -(-run.steps // CALLS)
        with ui.stage("the unquantized model paints"), recording(self._backbone, every) as self._calls:
            self._painted = self._paint()
        first = next(self._backbone.parameters())
        self._quantized = {}
        for name, checkpoint in checkpoints.items():
            model = load_backbone(source, first.dtype)
            checkpoint.apply(model, source.family.name)
            self._quantized[name] = model.to(first.device)
        self.groups = self._groups()
        self.weights = sum(self._count(path) for group in self.groups for path in group.layers)

    def bits_of_size(self, size: int) -> float:
        """Bits that the layers which can be quantized may take together, in a backbone of `size` bytes."""
        return 8.0 * size - (self._source.parameters - self.weights) * self._own_bits

    def uniform(self) -> list[Mix]:
        """Every format by itself."""
        return [
            self._mix(name, [name if name in g.noise else "none" for g in self.groups])
            for name in self._quantized
        ]

    def best(self, budget: float, uniform: Sequence[Mix]) -> Mix:
        """The mix within so many bits, or the single format of `uniform` that has less noise."""
        fitting = [one for one in uniform if one.bits * self.weights <= budget]
        return min([self._mix("mixed", choose(self.groups, budget)), *fitting], key=lambda one: one.noise)

    def smallest(self, wanted: float, uniform: Sequence[Mix]) -> Mix:
        """The smallest mix that is found whose pictures have at least `wanted` dB; its `psnr` says how many.

        Sizes are halved between the smallest and the model's own type, which reaches any: the unquantized model then.
        """
        least, most = self._range()
        found = self._mix("none", ["none"] * len(self.groups))
        with self._ui.stage(f"the smallest mix of {wanted:g} dB") as update:
            for number in range(_HALVINGS):
                middle = least if number == 0 else (least + most) / 2
                tried = self.best(middle, uniform)
                tried = replace(tried, psnr=self.psnr_of(tried))
                update(number + 1, _HALVINGS)
                if (tried.psnr or 0.0) >= wanted:
                    found, most = tried, middle
                    if number == 0:
                        break
                else:
                    least = middle
        return found

    def psnr_of(self, mix: Mix) -> float:
        """PSNR in dB of the pictures that a mix paints, to those of the unquantized model."""
        with self._replaced(mix.formats), cpu_block_quant():
            return psnr(self._paint(), self._painted)

    def curve(self, uniform: Sequence[Mix]) -> list[Mix]:
        """Mixes from the smallest to the model's own type, and of the size of each format."""
        least, most = self._range()
        sizes = {least + (most - least) * (at / _CURVE) ** 2 for at in range(_CURVE)}
        sizes |= {one.bits * self.weights * 1.0001 for one in uniform}
        return [self._mix("mixed", choose(self.groups, size)) for size in sorted(sizes)]

    def _range(self) -> tuple[float, float]:
        """The bits of the smallest mix, and those of the model's own type."""
        return sum(min(group.bits.values()) for group in self.groups), float(self._own_bits * self.weights)

    @property
    def _own_bits(self) -> int:
        return 32 if self._source.dtype == "float32" else 16

    def _mix(self, name: str, formats: Sequence[str]) -> Mix:
        layers = {path: fmt for group, fmt in zip(self.groups, formats, strict=True) for path in group.layers}
        return Mix(name, total_bits(self.groups, formats) / self.weights, self._noise(layers), layers)

    def _noise(self, formats: Mapping[str, str]) -> float:
        with self._replaced(formats) as backbone:
            return noise_of(backbone, self._calls)

    def _replaced(self, formats: Mapping[str, str]) -> AbstractContextManager[nn.Module]:
        quantized = {path: name for path, name in formats.items() if name != "none"}
        layers = {path: self._quantized[name].get_submodule(path) for path, name in quantized.items()}
        return replaced(self._backbone, layers)

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

    def _paint(self) -> Tensor:
        """One picture for each prompt of a batch: [N, 3, H, W] in 0..1, of videos the frames; or latents."""
        run, pipe = self._run, self._pipe
        height, width = run.size(pipe, self._source.family)
        prompts = (run.prompts or DEFAULT_PROMPTS)[: min(run.batch_size, PROMPTS)]
        pipe.set_progress_bar_config(disable=True)
        arguments = call_arguments(
            pipe.__call__,
            prompts,
            seeds=[self._seed + number for number in range(len(prompts))],
            steps=run.steps,
            height=height,
            width=width,
            guidance=run.guidance,
            usual=usual_arguments(self._source.family, pipe),
            negative_prompt=run.negative_prompt,
        )
        with torch.no_grad():
            result = pipe(**{**arguments, "output_type": "pt" if self._decodes else "latent"})
        painted: Tensor = result.images if hasattr(result, "images") else result.frames
        return painted.float().cpu().flatten(0, -4) if self._decodes else painted


def _weighted(checkpoint: Checkpoint) -> set[str]:
    """The layers whose weights a checkpoint quantizes."""
    return {layer_of(name) for name in checkpoint.settings if role_of(name) == "weight_quantizer"}
