"""Calibration in bounded room: what ModelOpt's methods need to work on weights that are not there at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffc.quantize.convert import enabled_quantizers
from diffc.quantize.encoded import EncodedPrompts
from diffc.quantize.stream import WeightStream

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Bounded:
    """A pipeline whose prompts are encoded first, and whose backbone then streams its weights.

    `release` is called with the names of the encoders as soon as they are not needed any more. `together`: how many
    batches go through the backbone at once; None for as many as a GPU has room for, and one on a CPU.
    """

    stream: WeightStream
    encoded: EncodedPrompts
    release: Callable[[Sequence[str]], None]
    together: int | None = None


@contextmanager
def streamed_weights(stream: WeightStream | None) -> Iterator[None]:
    """While this is open, ModelOpt's methods get a streamed weight for as long as they look at it."""
    from modelopt.torch.quantization import model_calib

    if stream is None:
        yield
        return
    original = model_calib.enable_weight_access_and_writeback

    def access(module: nn.Module, *_: Any, **__: Any) -> Any:
        return stream.access(module)

    model_calib.enable_weight_access_and_writeback = access
    try:
        yield
    finally:
        model_calib.enable_weight_access_and_writeback = original


def use_unchecked_maxima(backbone: nn.Module) -> None:
    """Let the enabled quantizers collect amax without waiting for the GPU.

    ModelOpt's calibrator checks each amax for NaN, and so waits for every layer, which leaves no time to send the
    weights of the next. NaN and infinity stay in the maximum here, and are refused at the end (`usable_amax`).
    """
    from modelopt.torch.quantization import utils
    from modelopt.torch.quantization.calib import MaxCalibrator

    class UncheckedMax(MaxCalibrator):  # type: ignore[misc]  # ModelOpt has no type information
        """The largest magnitude of all tensors, by ModelOpt's arithmetic."""

        def collect(self, x: torch.Tensor) -> None:
            """Take `x` into the maximum."""
            axes = utils.convert_quantization_axis_to_reduce_axis(x, self._axis)
            amax = utils.reduce_amax(x, axis=axes).detach()
            before: torch.Tensor | None = self.compute_amax()
            self._calib_amax = amax if before is None else before.maximum(amax)

    for quantizer in enabled_quantizers(backbone).values():
        if type(quantizer._calibrator) is MaxCalibrator:
            quantizer._calibrator.__class__ = UncheckedMax
