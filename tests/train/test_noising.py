"""Noise as diffusers' own schedulers add it, and targets from which the latents come back."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffc.errors import UnsupportedError
from diffc.train.noising import Noising


def latents() -> torch.Tensor:
    return torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def drawn(noising: Noising, one_time: bool = False) -> tuple[torch.Tensor, ...]:
    return noising.draw(latents(), torch.Generator().manual_seed(2), one_time=one_time)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("one_time", [False, True])
def test_targets_are_those_of_ddpm(kind: str, one_time: bool) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    noisy, time, target = drawn(Noising.of_scheduler(scheduler, is_sigma=False, tokens=16), one_time)
    assert time.shape == (() if one_time else (6,))
    steps = time.long().expand(6)
    noise = torch.randn(latents().shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(noisy, scheduler.add_noise(latents(), noise, steps))
    expected = noise if kind == "epsilon" else scheduler.get_velocity(latents(), noise, steps)
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("is_sigma", [False, True])
def test_flow_matching_is_that_of_the_scheduler(is_sigma: bool) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    noisy, time, target = drawn(Noising.of_scheduler(scheduler, is_sigma=is_sigma, tokens=16))
    sigma = time if is_sigma else time / 1000
    assert bool(((sigma > 0) & (sigma < 1)).all())
    s = sigma.reshape(-1, 1, 1, 1)
    noise = torch.randn(latents().shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(noisy, (1 - s) * latents() + s * noise)
    torch.testing.assert_close(noisy - s * target, latents())  # a step of length sigma against the velocity
    assert float(sigma.mean()) > 0.5  # the shift moves times up


def test_a_dynamic_shift_is_that_of_the_pipeline() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    found = Noising.of_scheduler(scheduler, is_sigma=True, tokens=1024)
    c = scheduler.config
    mu = calculate_shift(1024, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    scheduler.set_timesteps(sigmas=[0.5], mu=mu)
    assert float(scheduler.sigmas[0]) == pytest.approx(
        found.shift * 0.5 / (1 + (found.shift - 1) * 0.5), rel=1e-5
    )


def test_a_scheduler_of_another_kind_is_refused() -> None:
    scheduler = diffusers.DDPMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(UnsupportedError, match="DDPMScheduler is none of these"):
        Noising.of_scheduler(scheduler, is_sigma=False, tokens=16)
