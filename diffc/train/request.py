"""What a training is asked for, and what it returns; everything that can be refused is refused by `check`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffc.backends.install import install_command
from diffc.errors import DiffcError, UnsupportedError, UsageError, unknown_value
from diffc.models.sampling import Sampling, sampling_of
from diffc.models.sources.components import check_components
from diffc.models.sources.locate import ModelSource, locate
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.models.spec import Shape
from diffc.quantize.folder import check_place
from diffc.quantize.formats import Format, find_format
from diffc.quantize.options import DEFAULT_OPTIONS, QuantOptions
from diffc.version import VERSION

METHODS: Mapping[str, str] = {
    "qad": "distillation: the quantized backbone learns what the unquantized one answers; no data set",
    "qat": "training on --data: images with their prompts, by the loss that the model's scheduler names",
    "lora-qad": "distillation of low-rank additions to the weights, which take little memory",
    "lora-qat": "training of low-rank additions on --data",
}
LADDER = (3e-5, 1e-4, 3e-4)
"""Rates that a training without --lr tries. Too high a rate makes some models worse and helps others most."""
TEACHER_STEPS = 10
"""Denoising steps of the teacher, unless the model is meant for fewer."""
OPTIMIZERS = ("adamw", "adafactor")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class TrainRequest:
    """Everything that a training depends on; the defaults are those of the command line.

    `output` is the checkpoint to write, for `--from-checkpoint`. `data` is a folder of images with prompts, or
    "digits". `rate` None tries LADDER. `batch_size` rows a step, `accumulate` steps to an update; `steps` counts
    updates. `teacher_images` is how many images the teacher paints, in `teacher_steps` denoising steps each
    (None: TEACHER_STEPS, or fewer where the model is meant for fewer) with `guidance` (None: what it is meant for),
    `teacher_batch` at a time; a fifth of them is kept from the training and judges it. `text_tokens` is the length of
    T5's text, None for the pipeline's own. `ema` is the share of the running average of the weights that each step
    keeps, 0 for none. `every` is how many steps lie between two judgements, each of which is a place to go on from
    after a kill; 0 for a tenth of `steps`. `rank` is that of the lora methods. `precision` is accelerate's mixed
    precision. `device` "auto" is the GPU if there is one. `from_checkpoint` is a calibration to begin with instead of
    a new one.
    """

    model: str
    output: Path
    format: str
    method: str = "qad"
    data: str = ""
    steps: int = 200
    rate: float | None = None
    batch_size: int = 25
    accumulate: int = 1
    rank: int = 16
    ema: float = 0.0
    every: int = 0
    optimizer: str = "adamw"
    precision: str = "no"
    gradient_checkpointing: bool = False
    teacher_images: int = 100
    teacher_steps: int | None = None
    guidance: float | None = None
    teacher_batch: int = 10
    image_size: int | None = None
    text_tokens: int | None = None
    prompts: tuple[str, ...] | None = None
    options: QuantOptions = DEFAULT_OPTIONS
    from_checkpoint: Path | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    force: bool = False
    hub: HubOptions = DEFAULT_HUB

    def __post_init__(self) -> None:
        """Take paths as text, too."""
        object.__setattr__(self, "output", Path(self.output))
        if self.from_checkpoint is not None:
            object.__setattr__(self, "from_checkpoint", Path(self.from_checkpoint))

    @property
    def low_rank(self) -> bool:
        """Whether only low-rank additions to the weights are trained."""
        return self.method.startswith("lora-")

    @property
    def on_data(self) -> bool:
        """Whether the loss is that on data, and not the distance to the teacher."""
        return self.method.endswith("qat")

    @property
    def interval(self) -> int:
        """Steps between two judgements."""
        return self.every or max(1, self.steps // 10)


@dataclass(frozen=True)
class TrainPlan:
    """A request whose every part was found and fits together."""

    request: TrainRequest
    source: ModelSource
    format: Format

    @property
    def pixels(self) -> int:
        """Height and width of the images."""
        native = self.source.family.native(self.source.config)
        return self.request.image_size or native.height

    @cached_property
    def sampling(self) -> Sampling:
        """Steps and guidance of the teacher."""
        usual, request = sampling_of(self.source), self.request
        guidance = usual.guidance if request.guidance is None else request.guidance
        return Sampling(request.teacher_steps or min(usual.steps, TEACHER_STEPS), guidance, usual.why)

    @property
    def key(self) -> str:
        """A hash of all that decides the result: a stopped training goes on when it is equal."""
        wanted = asdict(
            replace(self.request, output=Path(), force=False, hub=replace(self.request.hub, token=None))
        )
        content: dict[str, Any] = {"request": wanted, "weights": self.source.fingerprint, "diffc": VERSION}
        if self.request.from_checkpoint is not None:
            record = self.request.from_checkpoint
            record = record / "checkpoint.json" if record.is_dir() else record
            content["checkpoint"] = [record.stat().st_size, record.stat().st_mtime_ns]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Judgement:
    """The state after `step` steps at `rate`: mean loss since the last one, and the signal-to-noise ratio in dB.

    `snr` is that of the student's answers to calls that it was not trained on, `seen` to some that it was; None where
    it is trained on data and not on calls.
    """

    step: int
    rate: float
    loss: float | None
    snr: float
    seen: float | None


@dataclass(frozen=True)
class TrainResult:
    """What was written to `output`: `trained` is False where no step was better than calibration alone.

    `before` and `after` are the judgements of the calibrated and of the kept weights. `trials` are the last judgements
    of the rates that were tried, `curve` all of the training itself.
    """

    output: Path
    method: str
    trained: bool
    before: Judgement
    after: Judgement
    rate: float
    trials: Sequence[Judgement] = field(default=())
    curve: Sequence[Judgement] = field(default=())
    carried: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; what training.json holds."""
        return {**asdict(self), "output": str(self.output)}


def check(request: TrainRequest) -> TrainPlan:
    """Refuse what cannot work, before any expensive work. Reads headers only."""
    if request.method not in METHODS:
        raise unknown_value("method", request.method, METHODS)
    fmt = find_format(request.format)
    if not fmt.quantizes:
        raise UsageError("format 'none' rounds nothing that training could make up for", fix="give --format")
    request.options.check(fmt)
    _check_numbers(request)
    _check_data(request)
    check_place(request.output)
    if request.output.exists() and any(request.output.iterdir()) and not request.force:
        raise DiffcError(f"{request.output} exists", fix="add --force to replace it, or name another folder")
    source = locate(request.model, request.hub)
    if source.pipeline_dir is None:
        raise DiffcError(
            f"{source.path} is a backbone alone, and training runs its whole pipeline",
            fix="give the pipeline's folder",
        )
    check_components(source)
    plan = TrainPlan(request, source, fmt)
    source.family.check(source.config, Shape(1, plan.pixels, plan.pixels, 1))
    return plan


def _check_numbers(request: TrainRequest) -> None:
    for name in (
        "steps",
        "batch_size",
        "accumulate",
        "rank",
        "teacher_images",
        "teacher_steps",
        "teacher_batch",
    ):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}", fix="give at least 1")
    if request.rate is not None and not 0 < request.rate < 1:
        raise UsageError(f"--lr is {request.rate:g}", fix="give a rate between 0 and 1, such as 1e-4")
    if not 0 <= request.ema < 1:
        raise UsageError(f"--ema is {request.ema:g}", fix="give 0 (none) to 0.9999")
    for name, value, known in (
        ("optimizer", request.optimizer, OPTIMIZERS),
        ("mixed precision", request.precision, PRECISIONS),
    ):
        if value not in known:
            raise unknown_value(name, value, known)


def _check_data(request: TrainRequest) -> None:
    if not request.on_data:
        if request.data:
            raise UsageError(
                f"--method {request.method} learns from the unquantized backbone and takes no --data",
                fix="leave --data out, or give --method qat; prompts for the teacher go into --prompts-file",
            )
        return
    if not request.data:
        raise UsageError(
            f"--method {request.method} needs --data",
            fix="give a folder of images with prompts, or --method qad, which needs no data and mostly gains more",
        )
    if request.data != "digits" and not Path(request.data).is_dir():
        raise DiffcError(f"--data {request.data} is not a folder", fix="give a folder of images, or digits")
    if request.data == "digits":
        try:
            import sklearn  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(
                "--data digits is drawn from scikit-learn's digits, and scikit-learn is not installed",
                fix=install_command("train"),
            ) from error
