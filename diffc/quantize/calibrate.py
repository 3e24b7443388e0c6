"""Calibration: the real diffusers pipeline runs on prompts while ModelOpt watches every quantizer's input."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError, unknown
from diffc.quantize.convert import enabled_quantizers, insert_quantizers
from diffc.quantize.formats import Format
from diffc.quantize.state import usable_amax

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[int, int], None]
"""Called after every denoising step with steps done and steps in all."""

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
    call_args: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Quantize `pipe.<component>` in place: insert the quantizers of `fmt` and set their amax, in float32.

    Prompt i starts from noise of its own generator, seeded with seed + i, so two runs on one machine agree
    bit for bit and the batch size changes no noise. `call_args` goes to the pipeline's call (guidance, image
    size). The pipeline's own progress bars are switched off. Raises DiffcError for empty or non-positive
    settings, and when a quantizer ends without a finite, non-zero amax.
    """
    if not prompts:
        raise DiffcError("no prompts to calibrate with", mend="put at least one prompt into the prompts file")
    for name, value in (("steps", steps), ("batch size", batch_size)):
        if value < 1:
            raise DiffcError(f"calibration {name} is {value}, expected at least 1")
    if fmt.preset is None:
        return
    backbone = _component(pipe, component)
    insert_quantizers(backbone, fmt, unquantized)
    pipe.set_progress_bar_config(disable=True)

    def run_prompts(_: nn.Module) -> None:
        _run(pipe, prompts, batch_size, seed, {**call_args, "num_inference_steps": steps}, progress)

    _collect(backbone, fmt, run_prompts)
    _finish(backbone)


def _component(pipe: Any, component: str) -> nn.Module:
    backbone = getattr(pipe, component, None)
    if backbone is None:
        raise unknown(f"component of {type(pipe).__name__}", component, sorted(pipe.components))
    return backbone  # type: ignore[no-any-return]  # diffusers pipelines have no type information


def _collect(backbone: nn.Module, fmt: Format, run_prompts: Callable[[nn.Module], None]) -> None:
    """Let ModelOpt's calibration run the prompts; its assertion on NaN or infinity becomes our error."""
    import modelopt.torch.quantization as mtq
    import torch

    try:
        with torch.no_grad():
            mtq.calibrate(backbone, fmt.config()["algorithm"], forward_loop=run_prompts)
    except AssertionError as error:
        name = _raised_in(error, enabled_quantizers(backbone))
        if name is None:
            raise
        raise DiffcError(
            f"{name} saw NaN or infinity during calibration: the model overflows in {_dtype(backbone)}",
            mend="load the model in bfloat16 or float32",
        ) from error


def _raised_in(error: BaseException, quantizers: Mapping[str, Any]) -> str | None:
    """The path of the quantizer in whose methods `error` was raised; ModelOpt's message does not name it."""
    names = {id(quantizer): name for name, quantizer in quantizers.items()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = (names.get(id(frame.f_locals.get("self"))) for frame in reversed(frames))
    return next((name for name in found if name is not None), None)


def _dtype(backbone: nn.Module) -> str:
    return str(next(backbone.parameters()).dtype).removeprefix("torch.")


def _run(
    pipe: Any,
    prompts: Sequence[str],
    batch_size: int,
    seed: int,
    call_args: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Denoise every prompt, batch by batch; the VAE does not run."""
    import torch

    batches = [range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)]
    for number, batch in enumerate(batches):

        def step_done(pipe: Any, step: int, _time: Any, tensors: Any, number: int = number) -> Any:
            per_batch = pipe.num_timesteps  # schedulers of second order take more than num_inference_steps
            progress(number * per_batch + step + 1, len(batches) * per_batch)
            return tensors

        pipe(
            prompt=[prompts[i] for i in batch],
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in batch],
            output_type="latent",
            callback_on_step_end=step_done,
            **call_args,
        )


def _finish(backbone: nn.Module) -> None:
    """Check every enabled quantizer's amax and keep it in float32."""
    for name, quantizer in enabled_quantizers(backbone).items():
        amax = usable_amax(name, getattr(quantizer, "_amax", None), quantizer.num_bits)
        quantizer.reset_amax()  # assigning to a buffer would keep its dtype
        quantizer.amax = amax
