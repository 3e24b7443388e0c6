"""Trains what digits-video has beside its backbone: the T5 text encoder and the video VAE."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffc.models.embedded.digits import untrained
from diffc.models.embedded.digits_video import DIRECTIONS
from diffc.models.embedded.tiny_text import T5_WIDTH, t5_encoder, t5_tokenizer
from tools.train import data as train_data
from tools.train.moving import MovingDigits, random_moving_prompt
from tools.train.parts import KL_WEIGHT, Log, descend, optimizer

LENGTHS = (64, 128)  # in turn: the pipeline pads to either, and its encoder attends to what was padded
PROMPTS = 60_000
BATCH = 64  # videos at a time


def train_t5(device: torch.device, steps: int, log: Log) -> nn.Module:
    """A T5 encoder from the mean of whose tokens digit and direction of any prompt can be told by linear maps."""
    torch.manual_seed(2)
    encoder = t5_encoder("digits/t5_video").to(device).train()
    heads = nn.ModuleList(nn.Linear(T5_WIDTH, n) for n in (11, len(DIRECTIONS))).to(device)
    both = nn.ModuleList([encoder, heads])
    adam, schedule = optimizer(both, 1e-3, steps)
    tokens, masks, answers = _prompts(min(PROMPTS, 128 * steps), device)
    for step in range(steps):
        rows = torch.randint(len(tokens), (128,), device=device)
        length = LENGTHS[step % 2]
        mask = masks[rows, :length, None]
        states = encoder(tokens[rows, :length]).last_hidden_state
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        logits = [head(mean) for head in heads]
        loss = sum(functional.cross_entropy(x, a[rows]) for x, a in zip(logits, answers, strict=True))
        descend(loss, both, adam, schedule)
        if step % 500 == 0 or step == steps - 1:
            right = [
                (x.argmax(dim=1) == a[rows]).float().mean().item()
                for x, a in zip(logits, answers, strict=True)
            ]
            log(
                f"t5_video step {step} loss {loss.item():.4f}, tells digit of {right[0]:.0%}, "
                f"direction of {right[1]:.0%}"
            )
    return encoder.eval()


def _prompts(count: int, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Tokens and mask of random prompts, [count, 128], and their digits and directions; those that fit in 64 tokens."""
    source = random.Random("t5_video")
    drawn = [random_moving_prompt(source) for _ in range(count)]
    drawn = [prompt for prompt in drawn if len(prompt[0]) < LENGTHS[0] - 2]
    texts, digits, directions = zip(*drawn, strict=True)
    found = t5_tokenizer()(list(texts), padding="max_length", max_length=LENGTHS[1], return_tensors="pt")
    answers = (torch.tensor(digits, device=device), torch.tensor(directions, device=device))
    return found.input_ids.to(device), found.attention_mask.to(device), answers


def train_video_vae(device: torch.device, steps: int, log: Log) -> Any:
    """An autoencoder of videos of half 1, whose latents have unit variance."""
    torch.manual_seed(3)
    generator = torch.Generator(device).manual_seed(3)
    videos = MovingDigits(train_data.load(1, device))
    vae = untrained("digits-video").vae.to(device).train()
    adam, schedule = optimizer(vae, 2e-3, steps)
    for step in range(steps):
        drawn = videos.draw(BATCH, generator)[0] * 2 - 1
        posterior = vae.encode(drawn).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        error = functional.mse_loss(vae.decode(posterior.mean + posterior.std * noise).sample, drawn)
        loss = error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        descend(loss, vae, adam, schedule)
        if step % 500 == 0 or step == steps - 1:
            log(f"vae_video step {step} error {error.item():.5f} kl {posterior.kl().mean().item():.1f}")
    vae.eval()
    with torch.no_grad():
        drawn = videos.draw(500, generator)[0] * 2 - 1
        before = vae.decode(vae.encode(drawn).latent_dist.mean).sample
        _scale_latents(vae, float(vae.encode(drawn).latent_dist.mean.std()))
        mean = vae.encode(drawn).latent_dist.mean
        after = vae.decode(mean).sample
        log(f"vae_video latents {mean.mean():+.3f} ± {mean.std():.3f}, error {functional.mse_loss(after, drawn):.5f}"
            f" of their means; scaling them changed the videos by {(after - before).abs().max():.1e}")  # fmt: skip
    return vae


def _scale_latents(vae: Any, std: float) -> None:
    """Divide the latents by `std`, and multiply what reads them, so that a scaling factor of 1 suits."""
    out, into = vae.encoder.conv_out.conv, vae.decoder.conv_in.conv
    out.weight[:-1] /= std  # the last channel is the logarithm of all variances
    out.bias[:-1] /= std
    out.bias[-1] -= 2 * torch.log(torch.tensor(std))
    into.weight *= std
