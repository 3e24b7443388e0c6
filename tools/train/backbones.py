"""Trains the digit backbones: images and prompts drawn once, an average of the weights kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tools.train import data as train_data
from tools.train.families import LTX, SD3, SD15, SDXL, Draw, Family, Flux, Text
from tools.train.moving import MovingDigits, moving_prompts
from tools.train.parts import Log, descend, optimizer

BATCH = 128
DROPPED = 0.12  # of prompts, for classifier-free guidance
AVERAGE = 0.999  # per step, of the weights that are kept
RATE = 1e-3
POOL = 40_000  # images that are drawn and encoded once: some 45 of each bitmap


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
        self._draw_images(steps)
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
            "digits-sd15": lambda: SD15(self.pipeline.scheduler),
            "digits-video": LTX,
        }
        return families[self.name]()

    @torch.no_grad()
    def _encode(self, family: Family) -> None:
        """Every prompt at every length, the empty one last; and which prompts ask for which kind of picture."""
        prompts, kinds = moving_prompts() if self.moves else train_data.prompts()
        self.text = {n: family.encode(self.pipeline, [*prompts, ""], n) for n in family.lengths}
        self.empty = len(prompts)
        asked = range(int(kinds.max()) + 1)
        self.by_kind = torch.stack([torch.nonzero(kinds == k)[:, 0] for k in asked]).to(self.device)

    @property
    def moves(self) -> bool:
        """Whether the model paints videos."""
        return self.name == "digits-video"

    @torch.no_grad()
    def _draw_images(self, steps: int) -> None:
        """The latents that are learned, [POOL, channels, 8, 8], of videos [POOL, tokens, channels]; and their kinds."""
        digits = train_data.load(1, self.device)
        source = MovingDigits(digits) if self.moves else digits
        vae, latents, kinds = self.pipeline.vae, [], []
        for _ in range(max(1, min(POOL, 8 * steps) // 500)):
            drawn, labels = source.draw(500, self.draw.generator)
            means = vae.encode(drawn * 2 - 1).latent_dist.mean * vae.config.scaling_factor
            latents.append(self.pipeline._pack_latents(means) if self.moves else means)
            kinds.append(labels)
        self.latents, self.kinds = torch.cat(latents), torch.cat(kinds)
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
        prompts = self.by_kind[self.kinds[chosen], self.draw.rows(BATCH, self.by_kind.shape[1])]
        length = family.lengths[step % len(family.lengths)]
        if getattr(family, "teacher", None) is None:
            prompts = torch.where(self.draw.uniform(BATCH) < DROPPED, self.empty, prompts)
        elif isinstance(family, Flux):
            family.nothing = self.text[length][torch.tensor([self.empty], device=self.device)]
        return self.latents[chosen], self.text[length][prompts]
