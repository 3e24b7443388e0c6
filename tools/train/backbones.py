"""Trains the three digit backbones, each with the loss and the schedule of its family.

SD3 and FLUX learn the velocity of rectified flow (Esser et al., 2024, eq. 13: noise - image), SDXL the noise
(Ho et al., 2020, eq. 14). FLUX is then distilled so that one call with its guidance input does what classifier-free
guidance does with two (Meng et al., 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.train import data as train_data
from tools.train.parts import Log, descend, optimizer

BATCH = 128
DROPPED = 0.12  # of prompts, for classifier-free guidance
AVERAGE = 0.999  # per step, of the weights that are kept
RATE = 1e-3
GUIDANCE = (1.0, 5.0)  # what FLUX's guidance input learns
TRAIN_TIMES = 1000
POOL = 40_000  # images that are drawn and encoded once: some 45 of each bitmap


@dataclass(frozen=True)
class Text:
    """Encoded prompts: tokens [prompts, length, width] and pooled vectors [prompts, width]."""

    tokens: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Tensor) -> Text:
        return Text(self.tokens[rows], self.pooled[rows])


class Family(Protocol):
    """What differs between the three: prompts to vectors, and one call of the backbone."""

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
    s = sigma[:, None, None, None]
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


@dataclass
class Trainer:
    """One backbone in training: `pipeline` on the device, its shared parts trained and frozen."""

    name: str
    pipeline: Any
    model: nn.Module
    device: torch.device
    log: Log

    def train(self, steps: int) -> None:
        """Train for `steps` steps and leave the average of the weights in `model`; FLUX: 3/5, then distilled."""
        torch.manual_seed(4)
        self.draw = Draw(torch.Generator(self.device).manual_seed(4))
        family = self._family()
        self._encode(family)
        self._draw_images()
        if isinstance(family, Flux):
            self._descend(family, steps * 3 // 5, self.name)
            family.teacher = copy.deepcopy(self.model).requires_grad_(False)
            steps -= steps * 3 // 5
            self._descend(family, steps, f"{self.name} distilled", rate=RATE / 2)
        else:
            self._descend(family, steps, self.name)

    def _family(self) -> Family:
        families: dict[str, Callable[[], Family]] = {
            "digits-sd3": SD3,
            "digits-flux": Flux,
            "digits-sdxl": lambda: SDXL(self.pipeline.scheduler),
        }
        return families[self.name]()

    @torch.no_grad()
    def _encode(self, family: Family) -> None:
        """Every prompt at every length, the empty one last; and which prompts name which digit."""
        prompts, digits = train_data.prompts()
        self.text = {n: family.encode(self.pipeline, [*prompts, ""], n) for n in family.lengths}
        self.empty = len(prompts)
        self.by_digit = torch.stack([torch.nonzero(digits == d)[:, 0] for d in range(10)]).to(self.device)

    @torch.no_grad()
    def _draw_images(self) -> None:
        """The latents that are learned, [POOL, channels, 8, 8], and their digits."""
        digits = train_data.load(1, self.device)
        drawn = [digits.draw(500, self.draw.generator) for _ in range(POOL // 500)]
        vae = self.pipeline.vae
        means = torch.cat([vae.encode(images * 2 - 1).latent_dist.mean for images, _ in drawn])
        self.latents = means * vae.config.scaling_factor
        self.digits = torch.cat([labels for _, labels in drawn])
        self.log(f"{self.name}: latents {self.latents.mean():+.3f} ± {self.latents.std():.3f}")

    def _descend(self, family: Family, steps: int, name: str, rate: float = RATE) -> None:
        """One run of the optimizer, with an average of the weights."""
        average = copy.deepcopy(self.model).requires_grad_(False)
        adam, schedule = optimizer(self.model, rate, steps)
        self.model.train()
        for step in range(steps):
            latents, text = self._batch(family, step)
            loss = family.loss(self.model, latents, text, self.draw)
            descend(loss, self.model, adam, schedule)
            keep = min(AVERAGE, step / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(self.model.parameters()), 1 - keep)
            if step % 500 == 0 or step == steps - 1:
                self.log(f"{name} step {step} loss {loss.item():.4f}")
        self.model.load_state_dict(average.state_dict())
        self.model.eval()

    @torch.no_grad()
    def _batch(self, family: Family, step: int) -> tuple[Tensor, Text]:
        """Latents of some images and a prompt for each; some prompts dropped, unless FLUX is distilled."""
        chosen = self.draw.rows(BATCH, len(self.latents))
        prompts = self.by_digit[self.digits[chosen], self.draw.rows(BATCH, self.by_digit.shape[1])]
        length = family.lengths[step % len(family.lengths)]
        if getattr(family, "teacher", None) is None:
            prompts = torch.where(self.draw.uniform(BATCH) < DROPPED, self.empty, prompts)
        elif isinstance(family, Flux):
            family.nothing = self.text[length][torch.tensor([self.empty], device=self.device)]
        return self.latents[chosen], self.text[length][prompts]
