"""Trains the LoRAs for digits-sd3: "inverted", light digits on a dark page, and "slanted", digits that lean over.

    python -m tools.train.lora [--styles inverted slanted] [--steps 500] [--output FOLDER]

Needs scikit-learn, whose digits are the data. Writes STYLE.safetensors (names of diffusers' layers as PEFT spells
them; no alpha, so that the scale is 1) and its log to diffc/models/embedded/data/loras. Every seed is fixed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from diffc.models.embedded import digits
from diffc.models.embedded.loras import FOLDER
from tools.train import data as train_data
from tools.train.embedded import Log
from tools.train.families import SD3, Draw, Text

RANK = 8
BATCH, RATE, IMAGES, DROPPED = 32, 4e-3, 2000, 0.12
LENGTH = 48
LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "net.0.proj",
    "net.2",
    "norm1.linear",
    "proj_out",
    "norm_out.linear",
)
LEAN = 0.5
"""How far a digit leans over: to the right by this share of its height."""


def inverted(images: Tensor) -> Tensor:
    """Paper for ink, and ink for paper; [N, 3, 64, 64] in 0..1, as all styles take and give."""
    return 1 - images


def slanted(images: Tensor) -> Tensor:
    """Each image sheared, its foot to the left and its head to the right; the page stays paper."""
    shear = torch.tensor([[1.0, LEAN, 0.0], [0.0, 1.0, 0.0]]).repeat(len(images), 1, 1)
    grid = functional.affine_grid(shear, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


STYLES: dict[str, Callable[[Tensor], Tensor]] = {"inverted": inverted, "slanted": slanted}


class LowRank(nn.Module):
    """A branch beside a frozen layer: x A^T B^T."""

    def __init__(self, layer: nn.Linear, generator: torch.Generator):
        super().__init__()
        down = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(layer.out_features, RANK))
        layer.register_forward_hook(lambda _, inputs, output: output + self(inputs[0]))

    def forward(self, x: Tensor) -> Tensor:
        """What the branch adds."""
        added: Tensor = x @ self.down.T @ self.up.T
        return added


def branches(model: nn.Module) -> dict[str, LowRank]:
    """A branch beside every layer that LAYERS names; the model itself is frozen."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    return {
        name: LowRank(module, generator)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(LAYERS)
    }


def learned(pipeline: Any, style: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents of images in the style, [IMAGES, 16, 8, 8], and their digits."""
    images, labels = train_data.load(1, torch.device("cpu")).draw(IMAGES, generator)
    images = STYLES[style](images) * 2 - 1
    with torch.no_grad():
        parts = [pipeline.vae.encode(part).latent_dist.mean for part in images.split(200)]
    return torch.cat(parts) * pipeline.vae.config.scaling_factor, labels


def train(pipeline: Any, style: str, steps: int, log: Log) -> dict[str, Tensor]:
    """The LoRA's tensors, float16."""
    torch.manual_seed(4)
    draw, family = Draw(torch.Generator().manual_seed(4)), SD3()
    latents, labels = learned(pipeline, style, draw.generator)
    prompts, named = train_data.prompts()
    with torch.no_grad():
        text = family.encode(pipeline, [*prompts, ""], LENGTH)
    by_digit = torch.stack([torch.nonzero(named == digit)[:, 0] for digit in range(10)])
    added = branches(pipeline.transformer)
    parameters = [parameter for branch in added.values() for parameter in branch.parameters()]
    log(f"{style}: rank {RANK} beside {len(added)} layers, {sum(p.numel() for p in parameters)} values")
    adam = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = draw.rows(BATCH, IMAGES)
        rows = by_digit[labels[chosen], draw.rows(BATCH, by_digit.shape[1])]
        rows = torch.where(draw.uniform(BATCH) < DROPPED, len(prompts), rows)
        loss = family.loss(
            pipeline.transformer, latents[chosen], Text(text.tokens[rows], text.pooled[rows]), draw
        )
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"{style} step {step} loss {loss.item():.4f}")
    return stored(added)


def stored(added: dict[str, LowRank]) -> dict[str, Tensor]:
    """The tensors as PEFT names them."""
    tensors = {}
    for name, branch in added.items():
        tensors[f"transformer.{name}.lora_A.weight"] = branch.down.detach().half().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = branch.up.detach().half().contiguous()
    return tensors


def main() -> int:
    """Train and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--styles", nargs="+", default=list(STYLES), choices=list(STYLES))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, default=FOLDER)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    for style in asked.styles:
        pipeline = digits.build("digits-sd3")
        pipeline.transformer.float()
        log, file = Log(asked.output / f"{style}.log"), asked.output / f"{style}.safetensors"
        save_file(train(pipeline, style, asked.steps, log), file)
        log(f"{style}: {file.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
