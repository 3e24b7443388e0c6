"""Calibration: the real diffusers pipeline runs on prompts while ModelOpt watches every quantizer's input."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError, unknown
from diffc.quantize.attention import attention_as, disable_unused, plain_attention
from diffc.quantize.bounded import Bounded, streamed_weights, use_unchecked_maxima
from diffc.quantize.convert import enabled_quantizers, insert_quantizers
from diffc.quantize.formats import Format
from diffc.quantize.kept import KeptRuns
from diffc.quantize.kinds import kind_of
from diffc.quantize.modelopt_state import record_quantize_mode
from diffc.quantize.options import QuantOptions
from diffc.quantize.percentile import use_percentile
from diffc.quantize.pipeline_call import call_arguments, steps_of
from diffc.quantize.prompt_runs import PromptRuns, pipeline_errors
from diffc.quantize.runs import Estimate, Passes, Progress
from diffc.quantize.scaling import portable_scaling
from diffc.quantize.simulate import cpu_block_quant
from diffc.quantize.state import fake_mode_of, settings_of, usable_amax

if TYPE_CHECKING:
    from torch import nn

    from diffc.quantize.stream import WeightStream

# Varied on purpose: people, text, plain and busy images, day and night, short and long prompts.
DEFAULT_PROMPTS: tuple[str, ...] = (
    "a red fox asleep in fresh snow, early morning light",
    "portrait of an old fisherman with a grey beard, 85mm photograph, shallow depth of field",
    "a wooden sign above a bakery door that reads OPEN UNTIL NOON",
    "isometric drawing of a small observatory on a cliff, pastel colours",
    "three glass bottles of different height on a white table, studio lighting, sharp shadows",
    "crowded night market in the rain, neon reflections on wet stone, people with umbrellas, wide angle",
    "a single green apple",
    "oil painting of a harbour at dusk, thick brush strokes, sailing boats and a lighthouse in the distance",
    "macro photograph of a dragonfly on a reed, dew drops, every facet of the eye visible",
    "an astronaut repairs a bicycle in a greenhouse full of tomato plants, cinematic, detailed, warm light",
    "black and white aerial view of a highway interchange at rush hour",
    "watercolour map of an imaginary island with mountains, two rivers and a forest, handwritten labels",
)


def calibrate(
    pipe: Any,
    component: str,
    fmt: Format,
    unquantized: str,
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    steps: int,
    seed: int,
    batch_size: int,
    height: int,
    width: int,
    usual: Mapping[str, Any],
    guidance: float | None = None,
    negative_prompt: str = "",
    progress: Progress,
    options: QuantOptions | None = None,
    bounded: Bounded | None = None,
    work: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Quantize `pipe.<component>` in place: insert the quantizers of `fmt` and set their amax, in float32.

    Weights change where the format scales channels or splits off a low-rank branch, as ModelOpt does it. What
    `modelopt.torch.opt.save` then writes, `restore` takes (`diffc.quantize.modelopt_state`).

    Prompt i starts from noise of its own generator, seeded with seed + i, so two runs on one machine agree
    bit for bit and the batch size changes no noise. `height` and `width` are in pixels; `usual` goes to the pipeline's
    call where it takes it, `guidance` and `negative_prompt` as they are (see `pipeline_call.call_arguments`).
    The pipeline's own progress bars are switched off. With `bounded`, the prompts are encoded first, and the weights
    are not all there at the same time. In the folder `work`, an equal call that was interrupted is taken up; `note` is
    told so, and how long all of it takes, after a few steps.
    Raises DiffcError for empty or non-positive settings, and when a quantizer ends without a finite, non-zero amax.
    """
    if not prompts:
        raise DiffcError("no prompts to calibrate with", fix="put at least one prompt into the prompts file")
    for name, value in (("steps", steps), ("batch size", batch_size)):
        if value < 1:
            raise DiffcError(f"calibration {name} is {value}, expected at least 1", fix="give 1 or more")
    if not fmt.quantizes:
        return
    options = options or QuantOptions()
    backbone = _component(pipe, component)
    if bounded is None:  # else weights are read piece by piece, and looked at there
        _check_finite(backbone)
    batches = [range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)]

    def arguments(numbers: Sequence[int]) -> dict[str, Any]:
        return call_arguments(
            pipe.__call__,
            [prompts[i] for i in numbers],
            seeds=[seed + i for i in numbers],
            steps=steps,
            height=height,
            width=width,
            guidance=guidance,
            usual=usual,
            negative_prompt=negative_prompt,
        )

    pipe.set_progress_bar_config(disable=True)
    if bounded is not None and fmt.algorithm is not None:
        calls = [partial(arguments, batch) for batch in batches]
        with pipeline_errors(pipe):
            encoders = bounded.encoded.encode(pipe, component, calls, lambda done, total: None)
        bounded.release(encoders)
    insert_quantizers(backbone, fmt, unquantized, options)
    record_quantize_mode(backbone)
    if fmt.algorithm is None:
        return
    by_step = options.percentile != 1.0 or options.collect_method != "default"
    if by_step:
        _use_percentile(backbone, steps_of(pipe, arguments([0])), options)
    if bounded is not None and bounded.stream.on_gpu:
        use_unchecked_maxima(backbone)
    run_prompts = PromptRuns(
        pipe,
        backbone,
        [partial(arguments, batch) for batch in batches],
        Passes(Estimate(progress, note), _PASSES.get(algorithm_of(fmt, options)["method"], 1)),
        KeptRuns(work and work / "runs"),
        note,
        bounded,
        repeatable=fmt.algorithm in _MAXIMA and not by_step,
    )
    _collect(backbone, algorithm_of(fmt, options), run_prompts, None if bounded is None else bounded.stream)
    _finish(backbone)


def _use_percentile(backbone: nn.Module, calls: int, options: QuantOptions) -> None:
    """Collect the inputs of convolutions by step. Raises DiffcError where none is quantized."""
    method = "global_min" if options.collect_method == "default" else options.collect_method
    if not use_percentile(backbone, options.percentile, calls, method):
        raise DiffcError(
            f"--percentile and --collect-method are for inputs of convolutions, and this {type(backbone).__name__}"
            " has none that is quantized",
            fix="leave both out",
        )


_PASSES = {"max": 1, "smoothquant": 1, "awq_lite": 2, "awq_full": 3, "svdquant": 3}
"""How often ModelOpt's method runs all prompts."""
_MAXIMA = ("max", "smoothquant")
"""Methods that note largest values: a batch may be run again, and several at once."""


def algorithm_of(fmt: Format, options: QuantOptions) -> dict[str, Any]:
    """ModelOpt's `algorithm`: the method and what it takes."""
    extra: dict[str, dict[str, Any]] = {
        "smoothquant": {"alpha": options.alpha},
        "svdquant": {"lowrank": options.lowrank},
    }
    method = "awq_full" if fmt.algorithm == "awq_lite" and options.awq == "full" else fmt.algorithm
    return {"method": method, **extra.get(fmt.algorithm or "", {})}


def _check_finite(backbone: nn.Module) -> None:
    """Raise DiffcError for a weight with NaN or infinity: ModelOpt runs for hours before it stumbles over one."""
    import torch

    for name, weight in backbone.named_parameters():
        if fake_mode_of(weight) is None and not weight.is_meta and not torch.isfinite(weight).all():
            raise DiffcError(
                f"the weight {name!r} holds NaN or infinity: it is damaged, or its training has diverged",
                fix="download the model again",
            )


def _component(pipe: Any, component: str) -> nn.Module:
    backbone = getattr(pipe, component, None)
    if backbone is None:
        raise unknown(f"component of {type(pipe).__name__}", component, sorted(pipe.components))
    return backbone  # type: ignore[no-any-return]  # diffusers pipelines have no type information


def _collect(
    backbone: nn.Module,
    algorithm: dict[str, Any],
    run_prompts: Callable[[nn.Module], None],
    stream: WeightStream | None = None,
) -> None:
    """Let ModelOpt's calibration run the prompts; its assertion on NaN or infinity becomes our error."""
    import modelopt.torch.quantization as mtq
    import torch

    try:
        with (
            torch.no_grad(),
            cpu_block_quant(),
            portable_scaling(),
            attention_as(plain_attention),
            streamed_weights(stream),
            redirect_stdout(StringIO()),
        ):
            mtq.calibrate(backbone, algorithm, forward_loop=run_prompts)  # prints a line per layer
    except AssertionError as error:
        name = _raised_in(error, enabled_quantizers(backbone))
        if name is None:
            raise
        raise DiffcError(
            f"{name} saw NaN or infinity during calibration: the model overflows in {_dtype(backbone)}",
            fix="load the model in bfloat16 or float32",
        ) from error


def _raised_in(error: BaseException, quantizers: Mapping[str, Any]) -> str | None:
    """The path of the quantizer in whose methods `error` was raised; ModelOpt's message does not name it."""
    names = {id(quantizer): name for name, quantizer in quantizers.items()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = (names.get(id(frame.f_locals.get("self"))) for frame in reversed(frames))
    return next((name for name in found if name is not None), None)


def _dtype(backbone: nn.Module) -> str:
    return str(next(backbone.parameters()).dtype).removeprefix("torch.")


def _finish(backbone: nn.Module) -> None:
    """Check every enabled quantizer's amax and keep it in float32."""
    disable_unused(backbone)
    for name, quantizer in enabled_quantizers(backbone).items():
        kind = kind_of(settings_of(quantizer.get_modelopt_state()))
        if not kind.has_amax:
            continue
        amax = usable_amax(name, getattr(quantizer, "_amax", None), kind)
        quantizer.reset_amax()  # assigning to a buffer would keep its dtype
        quantizer.amax = amax
