"""Data for training on images (QAT): pictures with prompts, as latents and as the inputs that a pipeline makes of them.

Nothing here is special to a family. The pipeline itself encodes a prompt: its call is stopped at the first call of the
backbone, whose inputs, but for the latents and the time, are what the prompt becomes. The VAE's config says how latents
are scaled, the scheduler what noise is and what is learned, the family whether time is a sigma or a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.models.inputs import named_inputs
from diffc.models.sources.source import ModelSource
from diffc.progress import Update
from diffc.train.calls import Batch, rows_of
from diffc.train.digits import digit_pictures
from diffc.train.noising import Noising
from passes.base import PassError
from passes.files.bounded import parse_object, read_text
from passes.files.contained import contained

DROPPED = 0.1
"""Share of prompts that are left out of a batch, so that guidance still has its other half."""
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DIGITS = 2000
"""Images of digits that are drawn."""


@dataclass(frozen=True)
class Picture:
    """A picture's pixels, [3, H, W] in 0..1, when they are asked for, and its prompt."""

    pixels: Callable[[], Tensor]
    prompt: str


class _Stop(Exception):
    """The backbone was called, which is all that is asked of the pipeline."""


@dataclass(frozen=True)
class Pictures:
    """Latents [N, channels, H, W], the prompt of each, what each prompt is to the backbone, and how noise is added.

    `prompts` holds the inputs of one row by name; "" is among them. `sample` and `time` name the other two inputs.
    """

    latents: Tensor
    texts: Sequence[str]
    prompts: Mapping[str, Mapping[str, Tensor]]
    by_row: frozenset[str]
    sample: str
    time: str
    noising: Noising
    pack: Callable[[Tensor], Tensor]

    def draw(self, generator: torch.Generator, rows: int) -> Batch:
        """`rows` latents at random with noise at random times; the target is what the scheduler has models predict."""
        chosen = torch.randint(len(self.latents), (rows,), generator=generator)
        dropped = torch.rand(rows, generator=generator) < DROPPED
        texts = ["" if drop else self.texts[i] for i, drop in zip(chosen, dropped, strict=True)]
        noisy, time, target = self.noising.draw(
            self.latents[chosen], generator, one_time=self.time not in self.by_row
        )
        inputs = {self.sample: self.pack(noisy), self.time: time}
        for name, value in self.prompts[""].items():
            each = [self.prompts[text][name] for text in texts]
            inputs[name] = torch.cat(each) if name in self.by_row else value
        return Batch(inputs, self.pack(target))


def read_pictures(data: str, pixels: int, seed: int) -> list[Picture]:
    """The pictures of `data`: "digits", or a folder.

    A folder has metadata.jsonl, whose lines have "file_name" and "text" (or "prompt"), as Hugging Face's ImageFolder
    has it; or beside each picture a text file of the same name with its prompt. Pictures are cut to a square in their
    middle and scaled to `pixels`. Raises DiffcError for a folder without pictures, and for one that lacks prompts.
    """
    if data == "digits":
        return [Picture(lambda x=x: x, text) for x, text in digit_pictures(_DIGITS, pixels, seed)]  # type: ignore[misc]
    folder = Path(data)
    pairs = _listed(folder) if (folder / "metadata.jsonl").is_file() else _beside(folder)
    if not pairs:
        raise DiffcError(
            f"{folder} has no picture ({', '.join(_ENDINGS)})", fix="give a folder of pictures with prompts"
        )
    return [Picture(lambda file=file: read_pixels(file, pixels), text) for file, text in pairs]  # type: ignore[misc]


def _listed(folder: Path) -> list[tuple[Path, str]]:
    pairs = []
    lines = read_text(folder / "metadata.jsonl").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_object(line, "it")
            name = row["file_name"]
        except (PassError, KeyError) as error:
            raise DiffcError(
                f"{folder / 'metadata.jsonl'}, line {number}: {error}",
                fix='write a JSON object a line: {"file_name": "a.png", "text": "a fox"}',
            ) from error
        pairs.append((contained(folder, name), str(row.get("text", row.get("prompt")) or "")))
    return pairs


def _beside(folder: Path) -> list[tuple[Path, str]]:
    pairs = []
    for file in sorted(p for p in folder.rglob("*") if p.suffix.lower() in _ENDINGS):
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise DiffcError(
                f"{file} has no prompt: there is no {text.name} beside it, and no metadata.jsonl in {folder}",
                fix="write its prompt into that text file",
            )
        pairs.append((file, text.read_text(encoding="utf-8-sig").strip()))
    return pairs


def read_pixels(file: Path, pixels: int) -> Tensor:
    """A picture as [3, pixels, pixels] in 0..1: the square in its middle, scaled. Raises DiffcError when it is none."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DiffcError(f"cannot read the picture {file}: {error}", fix="take it out of the data") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize(
        (pixels, pixels), Image.Resampling.BICUBIC
    )
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def encode_pictures(
    pipe: Any, source: ModelSource, pictures: Sequence[Picture], call: Mapping[str, Any], update: Update
) -> Pictures:
    """All pictures as latents, all their prompts as inputs of the backbone; the VAE and the encoders run once each."""
    items = source.family.inputs(source.config)
    sample = items[0].name
    time = next(item.name for item in items if item.sample in ("timestep", "sigma"))
    texts = [picture.prompt for picture in pictures]
    prompts = dict.fromkeys(["", *texts])
    total, done = len(pictures) + len(prompts), 0
    latents, inputs = [], {}
    with torch.no_grad():
        for picture in pictures:
            latents.append(encode(pipe.vae, picture.pixels()[None]))
            update(done := done + 1, total)
        for text in prompts:
            inputs[text] = prompt_inputs(pipe, source, text, call, without=(sample, time))
            update(done := done + 1, total)
    noising = Noising.of_scheduler(
        pipe.scheduler, is_sigma=_is_sigma(items, time), tokens=_tokens(source, call)
    )
    packs = len(items[0].dims) == 3
    pack = (lambda x: type(pipe)._pack_latents(x, *x.shape)) if packs else (lambda x: x)
    return Pictures(
        torch.cat(latents), texts, inputs, rows_of(source.family, source.config), sample, time, noising, pack
    )


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels [N, 3, H, W] in 0..1 as latents, the mean of the VAE's distribution, scaled as its pipelines do."""
    reference = next(vae.parameters())
    mean = vae.encode((pixels * 2 - 1).to(reference)).latent_dist.mean
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled: Tensor = (mean - shift) * vae.config.scaling_factor
    return scaled.float().cpu()


def prompt_inputs(
    pipe: Any, source: ModelSource, text: str, call: Mapping[str, Any], *, without: Sequence[str]
) -> dict[str, Tensor]:
    """What the pipeline feeds its backbone for a prompt, one row, on the CPU; the backbone itself does not run."""
    found: dict[str, Tensor] = {}

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(named_inputs(source.family, source.config, args, kwargs))
        raise _Stop

    backbone = getattr(pipe, source.family.component)
    handle = backbone.register_forward_pre_hook(stop, with_kwargs=True)
    guided = {} if _guidance_is_an_input(source) else {"guidance_scale": 1.0}
    try:
        pipe(prompt=[text], num_inference_steps=1, output_type="latent", **{**call, **guided})
    except _Stop:
        pass
    finally:
        handle.remove()
    by_row = rows_of(source.family, source.config)
    return {
        name: (value[-1:] if name in by_row and value.dim() else value).cpu()  # the last row is the prompt's
        for name, value in found.items()
        if name not in without
    }


def _guidance_is_an_input(source: ModelSource) -> bool:
    return any(item.sample == "guidance" for item in source.family.inputs(source.config))


def _is_sigma(items: Sequence[Any], time: str) -> bool:
    return any(item.name == time and item.sample == "sigma" for item in items)


def _tokens(source: ModelSource, call: Mapping[str, Any]) -> int:
    multiple = source.family.pixel_multiple(source.config)
    return int(call["height"] // multiple) * int(call["width"] // multiple)
