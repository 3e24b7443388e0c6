"""The teacher's calls: what a pipeline feeds its unquantized backbone while it paints, and what that answers.

Such calls are a data set for distillation that needs no images, no noise schedule and nothing that is special to a
family: they have the noise, the times and the guidance at which the quantized backbone will be asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from diffc.models.inputs import named_inputs
from diffc.models.sources.source import ModelSource
from diffc.progress import Update
from diffc.train.calls import Recorder
from diffc.train.request import TrainPlan

UNSEEN = 5
"""Of so many images of the teacher, one is kept from the training."""


def split(prompts: Sequence[str], images: int) -> tuple[list[str], list[str]]:
    """The prompts of the images to train on, and of those to judge by; each list has at least one.

    Where there are enough prompts, no prompt is in both lists. Prompts repeat, with other noise, when there are fewer
    than images.
    """
    unseen = max(1, images // UNSEEN)
    apart = len(prompts) >= UNSEEN
    ours = [p for number, p in enumerate(prompts) if not apart or number % UNSEEN]
    theirs = [p for number, p in enumerate(prompts) if not apart or not number % UNSEEN]
    return list(islice(cycle(ours), max(1, images - unseen))), list(islice(cycle(theirs), unseen))


def record_calls(
    pipe: Any,
    source: ModelSource,
    prompts: Sequence[str],
    recorder: Recorder,
    *,
    steps: int,
    batch: int,
    seed: int,
    call: Mapping[str, Any],
    update: Update,
) -> None:
    """Let `pipe` paint one image for each of `prompts` and record every call of its backbone.

    Image i begins with noise seeded with `seed` + i. `call` goes to the pipeline's call. The VAE does not run.
    """
    pipe.set_progress_bar_config(disable=True)
    starts = range(0, len(prompts), batch)

    def answered(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = named_inputs(source.family, source.config, args, kwargs)
        recorder.add(inputs, output[0] if isinstance(output, tuple) else output.sample)

    with torch.no_grad(), hooked(getattr(pipe, source.family.component), answered):
        for done, start in enumerate(starts):
            some = prompts[start : start + batch]
            pipe(
                prompt=list(some),
                generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(some))],
                num_inference_steps=steps,
                output_type="latent",
                **call,
            )
            update(done + 1, len(starts))


def call_arguments(pipe: Any, plan: TrainPlan) -> dict[str, Any]:
    """What the pipeline's call is given beside prompts, steps and noise, of what it takes."""
    call = dict(plan.source.family.calibration) | {"height": plan.pixels, "width": plan.pixels}
    for name, value in (
        ("guidance_scale", plan.sampling.guidance),
        ("max_sequence_length", plan.request.text_tokens),
    ):
        call |= {} if value is None else {name: value}
    taken = signature(pipe.__call__).parameters
    return {name: value for name, value in call.items() if name in taken}


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """While this is open, `hook` (module, args, kwargs, output) runs after every call of `module`."""
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
