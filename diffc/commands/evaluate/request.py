"""What `diffc evaluate` is asked for, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffc.commands.evaluate.painting import Painting
from diffc.quality.metrics.clip import CLIP
from diffc.quality.metrics.image_reward import VOCABULARY, WEIGHTS
from diffc.quality.metrics.statistics import Mean

METRICS: Mapping[str, str] = {
    "imagereward": "how much people would like a picture for its prompt (ImageReward-v1.0); higher is better",
    "clip-iqa": "how much nearer a picture is to 'Good photo.' than to 'Bad photo.', 0 to 1; higher is better",
    "clip": "100 x the cosine of picture and prompt in CLIP; higher is better",
    "psnr": "peak signal-to-noise ratio against the reference's picture, dB; higher is nearer",
    "ssim": "structural similarity to the reference's picture; higher is nearer",
    "lpips": "how different a picture looks from the reference's (AlexNet); lower is nearer",
    "clip-fid": "Frechet distance of CLIP's features to the reference's pictures, which is not FID; lower is nearer",
    "fid": "Frechet Inception distance to the reference's pictures (needs torch-fidelity); lower is nearer",
}
COMPARED = ("psnr", "ssim", "lpips", "clip-fid", "fid")
"""Metrics against the pictures of a reference."""


@dataclass(frozen=True)
class EvaluateRequest:
    """What to judge and by what: `data` (see `read_entries`), or what `painting` paints, in `pictures`.

    `pictures` None is a folder that is gone afterwards.
    `reference` is the model that others are compared with, empty for the first. `clip_model` and `bert` are folders or
    ids of the hub, `imagereward` a file or OWNER/REPOSITORY/FILE, `alexnet` a file. `sheet` is a PNG with the pictures
    side by side.
    """

    data: Path | None
    metrics: tuple[str, ...] = ("imagereward",)
    reference: str = ""
    clip_model: str = CLIP
    imagereward: str = WEIGHTS
    bert: str = VOCABULARY
    alexnet: Path | None = None
    sheet: Path | None = None
    device: str = "cpu"
    painting: Painting | None = None
    pictures: Path | None = None


@dataclass(frozen=True)
class Score:
    """A metric of a model: over prompts, and as the difference to the reference; `each` is by prompt."""

    model: str
    metric: str
    value: Mean
    difference: Mean | None
    each: Sequence[float] = ()


@dataclass(frozen=True)
class Evaluation:
    """All scores, and notes on what was cut."""

    prompts: int
    reference: str
    scores: Sequence[Score]
    notes: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
