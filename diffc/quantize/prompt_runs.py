"""Runs a pipeline on all batches of prompts, one by one or several in turns, and goes on where it was stopped."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError
from diffc.quantize.card import card_limit, measure_call, share, window_of
from diffc.quantize.lanes import Lanes
from diffc.quantize.pipeline_call import takes

if TYPE_CHECKING:
    from torch import nn

    from diffc.quantize.bounded import Bounded
    from diffc.quantize.kept import KeptRuns
    from diffc.quantize.runs import Passes

Step = Callable[[int, int], None]
"""Called after a step of a batch with steps done and steps in all."""


@dataclass
class PromptRuns:
    """ModelOpt's `forward_loop`: `pipe` is called with what each of `calls` gives, once for every batch.

    `repeatable`: whether a batch that is run twice, or beside others, changes nothing of what is collected. Then
    several batches go through a backbone that is streamed to a GPU at once, and weights stay there, as far as there is
    room.
    """

    pipe: Any
    backbone: nn.Module
    calls: Sequence[Callable[[], Mapping[str, Any]]]
    passes: Passes
    kept: KeptRuns
    note: Callable[[str], None]
    bounded: Bounded | None
    repeatable: bool

    def __call__(self, _: nn.Module) -> None:
        """Run all batches that are not kept from an interrupted run."""
        done, count = self.kept.take_up(self.backbone, self.passes.done), len(self.calls)
        if done:
            run = f"run {self.passes.done + 1} of {self.passes.total}"
            self.note(f"calibration goes on after batch {done} of {count}, {run}")
        together = self._together(done)
        while done < count:
            group = range(done, min(done + together, count))
            try:
                self._run(group)
            except DiffcError as error:
                if not self._smaller(error, group):
                    raise
                together = 1
            else:
                done = group.stop
                self.kept.keep(self.backbone, self.passes.done, done)
            gc.collect()  # the frames of an error hold what it had no room for
        self.passes.done += 1

    def _together(self, done: int) -> int:
        """How many batches go through the backbone at once; weights get the rest of the room."""
        bounded, left = self.bounded, len(self.calls) - done
        if bounded is None or not self.repeatable or left < 1:
            return 1
        if not bounded.stream.on_gpu:
            return bounded.together or 1
        bounded.stream.arrivals.window = window_of(card_limit(), bounded.stream.sizes)
        need = measure_call(self.backbone, bounded.stream, partial(self._run, range(done, done + 1)))
        most = left if bounded.together is None else min(left, bounded.together)
        together, room = share(need, card_limit(), bounded.stream.sizes, most)
        bounded.stream.room = room
        if together > 1:
            self.note(
                f"{together} batches at a time go through the backbone, and share each weight that comes"
            )
        return together

    def _smaller(self, error: DiffcError, group: range) -> bool:
        """Give back what was taken beyond the room for one batch; whether anything was, if `error` says it is full."""
        import torch

        if not isinstance(error.__cause__, torch.OutOfMemoryError) or not self.repeatable:
            return False
        held = self.bounded is not None and self.bounded.stream.let_go()
        if held or len(group) > 1:
            self.note("the GPU has less room than it had: batches run one by one, and no weight stays there")
        return held or len(group) > 1

    def _run(self, group: range) -> None:
        """Run the batches of `group`, in turns when there are several."""
        step = _steps_of(group, len(self.calls), self.passes)
        if len(group) == 1:
            self._run_batch(self.pipe, group[0], step)
            return
        assert self.bounded is not None
        lanes = Lanes([partial(self._run_batch, _beside(self.pipe), number, step) for number in group])
        with self.bounded.stream.in_turns(lanes.pass_on):
            lanes.run()

    def _run_batch(self, pipe: Any, number: int, step: Callable[[int, int, int], None]) -> None:
        import torch

        replayed = self.bounded.encoded.replayed(pipe, number) if self.bounded is not None else nullcontext()
        with torch.no_grad(), replayed:  # what autograd notes is of a thread
            _call(pipe, self.calls[number](), partial(step, number))


def _steps_of(group: range, batches: int, progress: Step) -> Callable[[int, int, int], None]:
    """Tells `progress` of a step when every batch of `group` is done with it: (batch, steps done, steps of a batch)."""
    done = dict.fromkeys(group, 0)

    def step(number: int, at: int, per_batch: int) -> None:
        done[number] = at
        if at == min(done.values()):
            progress(group.start * per_batch + len(group) * at, batches * per_batch)

    return step


def _beside(pipe: Any) -> Any:
    """A pipeline of the same models with a scheduler of its own."""
    from torch import nn

    other = copy.copy(pipe)
    for name, part in pipe.components.items():
        if part is not None and not isinstance(part, nn.Module) and not callable(part):
            vars(other)[name] = copy.deepcopy(part)
    return other


def _call(pipe: Any, call: Mapping[str, Any], step: Step) -> None:
    """Denoise the prompts of a batch, for which the pipeline is called with `call`."""
    tells = takes(pipe.__call__, "callback_on_step_end")

    def step_done(pipe: Any, at: int, _time: Any, tensors: Any) -> Any:
        step(at + 1, pipe.num_timesteps)  # schedulers of second order take more than num_inference_steps
        return tensors

    with pipeline_errors(pipe):
        pipe(**call, **({"callback_on_step_end": step_done} if tells else {}))
    if not tells:  # PixArt has no such callback
        step(1, 1)


@contextmanager
def pipeline_errors(pipe: Any) -> Iterator[None]:
    """Say of an error in a pipeline's call where it comes from."""
    import torch

    try:
        yield
    except (DiffcError, AssertionError):  # ours, and ModelOpt's word for NaN
        raise
    except torch.OutOfMemoryError as error:
        raise DiffcError(
            f"the GPU has no room for a calibration step: {str(error).partition('. GPU')[0]}",
            fix="give a smaller --batch-size, or a smaller --image-size",
        ) from error
    except Exception as error:
        raise DiffcError(
            f"{type(pipe).__name__} failed on a calibration prompt: {type(error).__name__}: {error}",
            fix="see whether the pipeline paints without diffc; --debug shows where it failed, and"
            " --calibrate synthetic does not run it",
        ) from error
