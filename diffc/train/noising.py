"""Noise on latents and what a backbone learns to predict of it, as the scheduler of its pipeline says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffc.errors import UnsupportedError


@dataclass(frozen=True)
class Noising:
    """How a scheduler mixes latents x with noise n at a time, and the target of the loss.

    "flow": (1 - s) x + s n, target n - x (rectified flow; Esser et al. 2024, eq. 13), where s is a uniform number
    moved up by `shift`: shift u / (1 + (shift - 1) u).
    "epsilon", "v_prediction", "sample": sqrt(a) x + sqrt(1 - a) n with a = `kept` at the time; targets n (Ho et al.
    2020, eq. 14), sqrt(a) n - sqrt(1 - a) x (Salimans and Ho 2022, section 4), and x.

    `is_sigma`: backbones of the family are told s itself, and not s times `times`.
    """

    kind: str
    shift: float = 1.0
    kept: Tensor | None = None
    is_sigma: bool = False
    times: int = 1000

    @classmethod
    def of_scheduler(cls, scheduler: Any, *, is_sigma: bool, tokens: int) -> Noising:
        """The noise of a diffusers scheduler; `tokens` of the image decide the shift where it is dynamic.

        Raises UnsupportedError for a scheduler that is of neither kind.
        """
        config = scheduler.config
        times = int(config.num_train_timesteps)
        if "FlowMatch" in type(scheduler).__name__:
            shift = config.shift or 1.0
            if config.get("use_dynamic_shifting"):
                slope = (config.max_shift - config.base_shift) / (
                    config.max_image_seq_len - config.base_image_seq_len
                )
                shift = math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len))
            return cls("flow", float(shift), None, is_sigma, times)
        kept, kind = getattr(scheduler, "alphas_cumprod", None), config.get("prediction_type")
        if kept is None or kind not in ("epsilon", "v_prediction", "sample"):
            raise UnsupportedError(
                f"training on data knows flow matching, epsilon, v and sample prediction, and"
                f" {type(scheduler).__name__} is none of these (prediction_type {kind!r})",
                fix="give --method qad, which asks the unquantized backbone instead",
            )
        return cls(kind, 1.0, kept.float().cpu(), is_sigma, times)

    def draw(
        self, latents: Tensor, generator: torch.Generator, *, one_time: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, the time as the backbone is told it (one number with `one_time`, else [N]), and the target."""
        count = 1 if one_time else len(latents)
        noise = torch.randn(latents.shape, generator=generator)
        u = torch.rand(count, generator=generator)
        wide = (-1, *[1] * (latents.dim() - 1))
        if self.kind == "flow":
            sigma = self.shift * u / (1 + (self.shift - 1) * u)
            s = sigma.reshape(wide)
            time = sigma if self.is_sigma else sigma * self.times
            noisy, target = (1 - s) * latents + s * noise, noise - latents
        else:
            assert self.kept is not None
            steps = (u * len(self.kept)).long()
            a = self.kept[steps].reshape(wide)
            time = steps.float()
            noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
            velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
            target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[self.kind]
        return noisy, time.reshape(()) if one_time else time, target
