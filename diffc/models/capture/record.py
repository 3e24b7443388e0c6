"""Runs a pipeline up to the first call of its backbone, at chosen settings, and keeps what the call holds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffc.errors import UnsupportedError
from diffc.models.batched import LISTS
from diffc.models.call import frames_argument, parameters_of, plain_sizes, text_cleaner
from diffc.models.capture.pipeline import Stage
from diffc.models.capture.stand_ins import Enough, words
from diffc.models.lists import joined
from diffc.models.nested import Path, places, tuple_places, without_repeats

Leaves = dict[Path, Any]
"""Every value of a call by its place; nothing (None) has no place."""

_LONG = 2048
"""Words of a prompt that is longer than what a pipeline takes, where no tokens are asked for."""


@dataclass(frozen=True)
class Recorder:
    """Runs the pipeline of a `stage`.

    Tokens of a prompt are asked for by the call's max_sequence_length where it has one, otherwise by the length of
    the first tokenizer, to which pipelines pad.
    """

    stage: Stage

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the pipeline's call."""
        return parameters_of(self.stage.cls)

    @property
    def is_video(self) -> bool:
        """Whether the call takes a number of frames."""
        return frames_argument(self.parameters) is not None

    def run(self, setting: Mapping[str, int]) -> Leaves:
        """What the backbone is called with. Settings that are not there are left to the pipeline.

        Raises UnsupportedError with the pipeline's own reason where it does not get that far.
        """
        call: dict[str, Any] = {"prompt": [words(setting.get("text", _LONG))] * setting.get("batch", 1)}
        given: dict[str, Any] = {"height": setting.get("height"), "width": setting.get("width")}
        given |= {"num_inference_steps": 2, "output_type": "latent"}
        if name := frames_argument(self.parameters):
            given[name] = setting.get("frames")
        if "max_sequence_length" in self.parameters:
            given["max_sequence_length"] = setting.get("text")
        call |= {k: v for k, v in given.items() if k in self.parameters and v is not None}
        call |= plain_sizes(self.parameters)
        if "prompt_template" in self.parameters:
            call["prompt_template"] = {"template": "{}", "crop_start": 0}
        self._set_lengths(setting.get("text"))
        return self._call(call)

    def _call(self, call: Mapping[str, Any]) -> Leaves:
        import torch

        backbone, name = self.stage.backbone, self.stage.cls.__name__
        backbone.calls.clear()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), text_cleaner(self.stage.cls):
                torch.manual_seed(1)
                self.stage.pipe(**call)
        except Enough:
            pass
        except Exception as error:  # anything that diffusers may raise is the reason of the refusal
            raise UnsupportedError(
                f"the inputs of {name}'s backbone cannot be read off its call: {type(error).__name__}: {error}",
                fix="write a family file for this class: CONTRIBUTING.md, Adding a model family",
            ) from error
        if not backbone.calls:
            raise UnsupportedError(
                f"{name} ended without a call of its backbone", fix="give a pipeline that calls its backbone"
            )
        return places(joined(without_repeats(backbone.calls[0]), self.lists))

    @property
    def lists(self) -> Mapping[str, bool]:
        """The arguments of the backbone that are lists of one tensor per image, and that one tensor is to take over."""
        return LISTS.get(type(self.stage.backbone.real).__name__, {})

    @property
    def tuples(self) -> tuple[Path, ...]:
        """The places of tuples in the call that was recorded last."""
        return tuple_places(joined(self.stage.backbone.calls[0], self.lists))

    def _set_lengths(self, text: int | None) -> None:
        """The length of the first tokenizer, where the call has no other way to ask for one; None for its own."""
        for number, (name, own) in enumerate(self.stage.lengths.items()):
            asked = text is not None and number == 0 and "max_sequence_length" not in self.parameters
            getattr(self.stage.pipe, name).model_max_length = text if asked else own
