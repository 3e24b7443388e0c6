"""Calibration of INT8 convolutions by denoising step: ModelOpt's methods, for which magnitudes are kept apart.

Early steps see mostly noise and late ones mostly image, so the largest magnitude of a convolution's input
changes from step to step, and a maximum over all steps suits few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError, unknown_value

if TYPE_CHECKING:
    import torch
    from torch import nn

Reduce = Callable[["torch.Tensor"], "torch.Tensor"]

METHODS: Mapping[str, tuple[Reduce, Reduce]] = {
    "global_min": (lambda batches: batches.min(), lambda steps: steps.min()),
    "min-max": (lambda batches: batches.max(), lambda steps: steps.min()),
    "min-mean": (lambda batches: batches.mean(), lambda steps: steps.min()),
    "mean-max": (lambda batches: batches.max(), lambda steps: steps.mean()),
}
"""Method -> how the batches of one step are reduced, and then the steps. The name has the second first."""


@dataclass
class PercentileCalibrator:
    """A calibrator as ModelOpt's TensorQuantizer calls it, per tensor: collect, compute_amax, reset.

    Call c since the last reset is step c mod `steps` of batch c div `steps`. With a[b, t] = max |x| of the whole
    tensor in step t of batch b, and t over the first max(1, floor(percentile * steps)) steps, amax is

    - global_min: min over t and b of a[b, t]
    - min-max: min over t of (max over b of a[b, t])
    - min-mean: min over t of (mean over b of a[b, t])
    - mean-max: mean over t of (max over b of a[b, t])

    in float32. ModelOpt's script (`plugin_calib.py`) divides the sums of min-mean by `steps` instead of by the
    number of batches, so that its scale grows with the number of prompts.
    """

    percentile: float
    steps: int
    method: str
    _amaxes: list[torch.Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Refuse what no step or no method fits. Raises DiffcError."""
        if self.method not in METHODS:
            raise unknown_value("collect method", self.method, METHODS)
        if not 0 < self.percentile <= 1:
            raise DiffcError(
                f"percentile is {self.percentile}, expected a share of steps: above 0, at most 1",
                fix="give such a number",
            )
        if self.steps < 1:
            raise DiffcError(
                f"calibration steps is {self.steps}, expected at least 1", fix="give such a number"
            )

    def collect(self, x: torch.Tensor) -> None:
        """Note max |x| of the next step. Raises AssertionError for NaN and infinity, as ModelOpt's own do."""
        amax = x.detach().abs().amax().float()
        if not amax.isfinite():
            raise AssertionError("detected nan or inf values in amax")
        self._amaxes.append(amax)

    def reset(self) -> None:
        """Forget all steps."""
        self._amaxes.clear()

    def compute_amax(self) -> torch.Tensor | None:
        """The amax of all steps so far by the method, float32 of shape []; None before the first step."""
        import torch

        if not self._amaxes:
            return None
        kept = max(1, int(self.percentile * self.steps + 1e-6))  # 0.29 * 100 is 28.999...
        over_batches, over_steps = METHODS[self.method]
        steps = [self._amaxes[step :: self.steps] for step in range(min(kept, len(self._amaxes)))]
        return over_steps(torch.stack([over_batches(torch.stack(step)) for step in steps]))


def use_percentile(backbone: nn.Module, percentile: float, steps: int, collect_method: str) -> int:
    """Give the enabled input quantizers of the Conv2d layers of `backbone` a PercentileCalibrator.

    To be called between inserting quantizers and calibrating. Linear layers and weights keep theirs. `steps` is
    how often the backbone is called for one batch of prompts. Returns the number of quantizers; raises
    DiffcError for a share of steps outside (0, 1] and for an unknown method.
    """
    from torch import nn

    layers: list[Any] = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    quantizers = [layer.input_quantizer for layer in layers if hasattr(layer, "input_quantizer")]
    enabled = [quantizer for quantizer in quantizers if quantizer.is_enabled]
    for quantizer in enabled:
        quantizer._calibrator = PercentileCalibrator(percentile, steps, collect_method)
    return len(enabled)
