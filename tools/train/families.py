"""The training loss of each family of digit backbones, and how its prompts are encoded.

SD3, FLUX and LTX-Video learn the velocity of rectified flow (Esser et al., 2024, eq. 13: noise - image), SD1.5 and SDXL
the noise (Ho et al., 2020, eq. 14). FLUX is then distilled so that one call with its guidance input does what
classifier-free guidance does with two (Meng et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from diffc.models.embedded.digits_video import PIXELS

GUIDANCE = (1.0, 5.0)  # what FLUX's guidance input learns
TRAIN_TIMES = 1000
FRAME_RATE = 25  # the default of LTXPipeline


@dataclass(frozen=True)
class Text:
    """Encoded prompts: tokens [prompts, length, width] and pooled vectors [prompts, width], or a mask of the tokens."""

    tokens: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Tensor) -> Text:
        return Text(self.tokens[rows], self.pooled[rows])


class Family(Protocol):
    """What differs between them: prompts to vectors, and one call of the backbone."""

    lengths: tuple[int, ...]

    def encode(self, pipeline: Any, prompts: list[str], length: int) -> Text:
        """As the pipeline encodes them at that `max_sequence_length`, the unconditional prompt included."""

    def loss(self, model: Any, latents: Tensor, text: Text, draw: Draw) -> Tensor:
        """The training loss of one batch."""


@dataclass(frozen=True)
class Draw:
    """Random numbers of one device and one generator."""

    generator: torch.Generator

    def normal(self, like: Tensor) -> Tensor:
        """Unit normal values, of the shape of `like`."""
        return torch.randn(like.shape, generator=self.generator, device=like.device)

    def uniform(self, count: int) -> Tensor:
        """`count` values in 0..1."""
        return torch.rand(count, generator=self.generator, device=self.generator.device)

    def rows(self, count: int, below: int) -> Tensor:
        """`count` integers from 0 on."""
        return torch.randint(below, (count,), generator=self.generator, device=self.generator.device)


def flow(latents: Tensor, shift: float, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their sigma in 0..1 (moved up by the scheduler's shift) and the velocity to learn."""
    u = draw.uniform(len(latents))
    sigma = shift * u / (1 + (shift - 1) * u)
    noise = draw.normal(latents)
    s = sigma.reshape(-1, *(1,) * (latents.ndim - 1))
    return (1 - s) * latents + s * noise, sigma, noise - latents


class SD3:
    """Joint transformer, 77 CLIP tokens beside those of T5."""

    lengths = (256, 128, 48)

    def encode(self, pipeline: Any, prompts: list[str], length: int) -> Text:
        """See `Family`."""
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        return Text(tokens, pooled)

    def loss(self, model: Any, latents: Tensor, text: Text, draw: Draw) -> Tensor:
        """See `Family`."""
        noisy, sigma, velocity = flow(latents, 3.0, draw)
        out = model(
            hidden_states=noisy,
            timestep=sigma * TRAIN_TIMES,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
        ).sample
        return functional.mse_loss(out, velocity)


class Flux:
    """Packed latents, rotary positions, and guidance as an input; `teacher` is set for the distillation."""

    lengths = (512, 128, 48)

    def __init__(self) -> None:
        self.teacher: Any = None
        self.nothing: Text | None = None  # the empty prompt at the current length

    def encode(self, pipeline: Any, prompts: list[str], length: int) -> Text:
        """See `Family`."""
        device = pipeline.text_encoder.device
        tokens, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=device, max_sequence_length=length
        )
        return Text(tokens, pooled)

    def loss(self, model: Any, latents: Tensor, text: Text, draw: Draw) -> Tensor:
        """Flow matching, or the distance to the guided teacher."""
        noisy, sigma, velocity = flow(latents, 1.6, draw)  # what dynamic shifting gives for 16 tokens
        one = torch.ones_like(sigma)
        if self.teacher is None:
            return functional.mse_loss(self.call(model, noisy, sigma, one, text), self.pack(velocity))
        low, high = GUIDANCE
        guidance = low + (high - low) * draw.uniform(len(latents))
        with torch.no_grad():
            assert self.nothing is not None
            nothing = self.nothing[torch.zeros(len(latents), dtype=torch.long, device=latents.device)]
            asked = self.call(self.teacher, noisy, sigma, one, text)
            free = self.call(self.teacher, noisy, sigma, one, nothing)
            target = free + guidance[:, None, None] * (asked - free)
        return functional.mse_loss(self.call(model, noisy, sigma, guidance, text), target)

    def call(self, model: Any, noisy: Tensor, sigma: Tensor, guidance: Tensor, text: Text) -> Tensor:
        """The velocity of packed latents, [N, tokens, 64]."""
        from diffusers import FluxPipeline

        rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
        ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, noisy.device, noisy.dtype)
        velocity: Tensor = model(
            hidden_states=self.pack(noisy),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.tokens,
            txt_ids=torch.zeros(text.tokens.shape[1], 3, device=noisy.device),
            img_ids=ids,
        ).sample
        return velocity

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        """[N, 16, H, W] to tokens of 2 x 2 latents, [N, H/2 * W/2, 64]."""
        from diffusers import FluxPipeline

        packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
        return packed


class SDXL:
    """UNet that predicts noise; without a prompt its text is zeros, as the pipeline has it."""

    lengths = (77,)

    def __init__(self, scheduler: Any) -> None:
        self.kept = scheduler.alphas_cumprod  # share of the image's variance, by time

    def encode(self, pipeline: Any, prompts: list[str], length: int) -> Text:  # noqa: ARG002
        """See `Family`."""
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, device=pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        named = torch.tensor([float(bool(text)) for text in prompts], device=pooled.device)
        return Text(tokens * named[:, None, None], pooled * named[:, None])

    def loss(self, model: Any, latents: Tensor, text: Text, draw: Draw) -> Tensor:
        """See `Family`."""
        time = draw.rows(len(latents), TRAIN_TIMES)
        kept = self.kept.to(latents.device)[time][:, None, None, None]
        noise = draw.normal(latents)
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]], device=latents.device).repeat(len(latents), 1)
        out = model(
            kept.sqrt() * latents + (1 - kept).sqrt() * noise,
            time,
            text.tokens,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes},
        ).sample
        return functional.mse_loss(out, noise)


class SD15:
    """UNet that predicts noise, with tokens of one CLIP encoder."""

    lengths = (77,)

    def __init__(self, scheduler: Any) -> None:
        self.kept = scheduler.alphas_cumprod  # share of the image's variance, by time

    def encode(self, pipeline: Any, prompts: list[str], length: int) -> Text:  # noqa: ARG002
        """See `Family`."""
        tokens, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)
        return Text(tokens, tokens[:, 0])

    def loss(self, model: Any, latents: Tensor, text: Text, draw: Draw) -> Tensor:
        """See `Family`."""
        time = draw.rows(len(latents), TRAIN_TIMES)
        kept = self.kept.to(latents.device)[time][:, None, None, None]
        noise = draw.normal(latents)
        out = model(kept.sqrt() * latents + (1 - kept).sqrt() * noise, time, text.tokens).sample
        return functional.mse_loss(out, noise)


class LTX:
    """Tokens of a video's latents, and T5's tokens with their mask in the place of pooled vectors."""

    lengths = (128, 64)

    def encode(self, pipeline: Any, prompts: list[str], length: int) -> Text:
        """See `Family`."""
        tokens, mask, _, _ = pipeline.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=pipeline.text_encoder.device,
        )
        return Text(tokens, mask)

    def loss(self, model: Any, latents: Tensor, text: Text, draw: Draw) -> Tensor:
        """See `Family`; `latents` are packed, [N, tokens, 16]."""
        noisy, sigma, velocity = flow(latents, 3.0, draw)
        side = PIXELS // 8
        out = model(
            hidden_states=noisy,
            encoder_hidden_states=text.tokens,
            timestep=sigma * TRAIN_TIMES,
            encoder_attention_mask=text.pooled,
            num_frames=latents.shape[1] // side**2,
            height=side,
            width=side,
            rope_interpolation_scale=(4 / FRAME_RATE, 8, 8),  # as the pipeline has it: frames, rows, columns
        ).sample
        return functional.mse_loss(out, velocity)
