"""Trains what the digit pipelines share: the reader of digits, the CLIP text encoders and the VAEs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffc.models.embedded.digits import untrained
from diffc.models.embedded.tiny_text import CLIP_WIDTH, clip_encoder, clip_tokenizer
from diffc.quality.classifier import DigitReader
from tools.train import data as train_data

Log = Callable[[str], None]
KL_WEIGHT = (
    3e-4  # against the mean squared error of pixels in -1..1: noise of about 0.05 is worth keeping out
)
CLIP_TOKENS = 64  # the random prompts' length; shorter than the encoder's, for time


def optimizer(module: nn.Module, rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW, and its schedule: 5 % of warming up, then half a cosine to zero."""
    fused = next(module.parameters()).is_cuda
    adam = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.01, betas=(0.9, 0.98), fused=fused)
    return adam, torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps, pct_start=0.05)


def descend(loss: Tensor, module: nn.Module, adam: Any, schedule: Any) -> None:
    """One step down, gradients clipped to a norm of 1."""
    adam.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    adam.step()
    schedule.step()


def train_classifier(device: torch.device, steps: int, log: Log) -> DigitReader:
    """The reader, from half 0; logs its share of right answers on half 1, which it never saw."""
    torch.manual_seed(1)
    generator = torch.Generator(device).manual_seed(1)
    seen, unseen = train_data.load(0, device), train_data.load(1, device)
    reader = DigitReader().to(device)
    adam, schedule = optimizer(reader, 3e-3, steps)
    for step in range(steps):
        images, labels = seen.draw(256, generator)
        images = images + 0.05 * torch.randn(images.shape, generator=generator, device=device)
        loss = functional.cross_entropy(reader(images), labels, label_smoothing=0.05)
        descend(loss, reader, adam, schedule)
        if step % 500 == 0:
            log(f"classifier step {step} loss {loss.item():.4f}")
    reader.eval()
    with torch.no_grad():
        for name, digits in (("its half", seen), ("the other half", unseen)):
            images, labels = digits.plain()
            right = (reader(images).argmax(dim=1) == labels).float().mean().item()
            log(f"classifier reads {right:.2%} of {name} ({len(labels)} images)")
    return reader


def train_clip(name: str, device: torch.device, steps: int, log: Log) -> nn.Module:
    """A CLIP encoder from whose two pooled outputs the digit of any prompt can be told by a linear map."""
    source = random.Random(name)
    torch.manual_seed(2)
    tokenizer = clip_tokenizer()
    encoder = clip_encoder(f"digits/{name}", projection=True).to(device)
    heads = nn.ModuleList(nn.Linear(CLIP_WIDTH, 11) for _ in range(2)).to(device)
    both = nn.ModuleList([encoder, heads])
    adam, schedule = optimizer(both, 1e-3, steps)
    drawn = (train_data.random_prompt(source) for _ in range(min(200_000, 128 * steps)))
    pool = [pair for pair in drawn if len(pair[0].replace(" ", "")) <= CLIP_TOKENS - 2]  # none is cut short
    tokens = tokenizer(
        [text for text, _ in pool],
        padding="max_length",
        max_length=CLIP_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(device)
    digits = torch.tensor([digit for _, digit in pool], device=device)
    for step in range(steps):
        batch = torch.randint(len(pool), (128,), device=device)
        out = encoder(tokens[batch])
        logits = [head(x) for head, x in zip(heads, _pooled(encoder, out, tokens[batch]), strict=True)]
        loss = sum(functional.cross_entropy(x, digits[batch]) for x in logits)
        descend(loss, both, adam, schedule)
        if step % 500 == 0 or step == steps - 1:
            right = (logits[0].argmax(dim=1) == digits[batch]).float().mean().item()
            log(f"{name} step {step} loss {loss.item():.4f}, tells {right:.0%} of random prompts")
    return encoder.eval()


def _pooled(encoder: Any, out: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The projected output and the one before the projection, both [N, 64]: pipelines take either."""
    end = (tokens == encoder.config.eos_token_id).int().argmax(dim=1)
    return out.text_embeds, out.last_hidden_state[torch.arange(len(tokens), device=tokens.device), end]


def train_vae(channels: int, device: torch.device, steps: int, log: Log) -> nn.Module:
    """An autoencoder of half 1 whose latents are pulled to unit variance."""
    torch.manual_seed(3)
    generator = torch.Generator(device).manual_seed(3)
    digits = train_data.load(1, device)
    vae = untrained("digits-sdxl" if channels == 4 else "digits-sd3").vae.to(device).train()
    adam, schedule = optimizer(vae, 2e-3, steps)
    for step in range(steps):
        images = digits.draw(128, generator)[0] * 2 - 1
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        error = functional.mse_loss(vae.decode(posterior.mean + posterior.std * noise).sample, images)
        loss = error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        descend(loss, vae, adam, schedule)
        if step % 500 == 0 or step == steps - 1:
            mean = posterior.mean
            log(f"vae{channels} step {step} error {error.item():.5f} kl {posterior.kl().mean().item():.1f}"
                f" latents {mean.mean().item():+.3f} ± {mean.std().item():.3f}")  # fmt: skip
    return vae.eval()  # type: ignore[no-any-return]
