"""The networks and functions that score pictures, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from diffc.commands.evaluate.request import EvaluateRequest
from diffc.errors import UnsupportedError
from diffc.quality.metrics.clip import Clip
from diffc.quality.metrics.entries import Entry, as_tensor
from diffc.quality.metrics.image_reward import TOKENS, ImageReward
from diffc.quality.metrics.lpips import Lpips
from diffc.quality.pictures import psnr, ssim

Judge = Callable[[Image.Image, Image.Image, str], float]
"""(picture, the reference's picture, prompt) -> score."""


class Tools:
    """The networks, each loaded once, when it is first asked for."""

    def __init__(self, request: EvaluateRequest) -> None:
        self._request = request
        self._clip: Clip | None = None
        self._reward: ImageReward | None = None
        self._lpips: Lpips | None = None

    def clip(self) -> Clip:
        """CLIP."""
        self._clip = self._clip or Clip(self._request.clip_model, self._request.device)
        return self._clip

    def judge(self, metric: str) -> Judge | None:
        """What scores one picture; None for a metric of all pictures together. Raises DiffcError without a network."""
        request = self._request
        if metric == "imagereward":
            self._reward = self._reward or ImageReward(request.imagereward, request.bert, request.device)
            reward = self._reward
            return lambda image, _, prompt: reward.score(image, prompt)
        if metric in ("clip", "clip-iqa"):
            clip = self.clip()
            if metric == "clip":
                return lambda image, _, prompt: clip.score(image, prompt)
            return lambda image, _, __: clip.quality(image)
        if metric == "lpips":
            assert request.alexnet is not None
            self._lpips = self._lpips or Lpips(request.alexnet, request.device)
            lpips = self._lpips
            return lambda image, other, _: lpips.distance(as_tensor(image), as_tensor(other))
        if metric in ("psnr", "ssim"):
            compare = psnr if metric == "psnr" else ssim
            return lambda image, other, _: compare(as_tensor(image), as_tensor(other))
        if metric == "clip-fid":
            self.clip()
        else:
            inception()
        return None

    def notes(self, entries: Sequence[Entry]) -> list[str]:
        """What the networks did not read of the prompts."""
        prompts = [entry.prompt for entry in entries]
        lines = []
        for name, tool, limit in (
            ("CLIP", self._clip, self._clip.limit if self._clip else 0),
            ("ImageReward", self._reward, TOKENS),
        ):
            cut = 0 if tool is None else sum(tool.tokens(prompt) > limit for prompt in prompts)
            if cut:
                lines.append(f"{name} reads {limit} tokens: {cut} of {len(prompts)} prompts were cut")
        return lines


def inception() -> Any:
    """torchmetrics' FID with the Inception of torch-fidelity. Raises UnsupportedError without that package."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048)
    except ImportError as error:
        raise UnsupportedError(
            "fid needs torch-fidelity, whose Inception it is computed with, and it is not installed",
            fix="install the package torch-fidelity, or take --metrics clip-fid, which needs CLIP alone",
        ) from error
